"""Line charts and stacked areas as coordinates. ``page.html.j2`` draws them as SVG, ``page.css`` colours them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 460, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 26
#: A longer series is drawn without dots: they would merge, and each one weighs 80 bytes.
MAX_DOTS = 120
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """A named curve: (step, value) by ascending step; in a stacked chart, the outline of an area."""

    label: str
    points: Points


class Chart:
    """Series over common axes, whose y axis holds 0; ``x`` and ``y`` turn steps and values into pixels."""

    def __init__(self, title: str, series: Sequence[Series], *, is_stacked: bool = False) -> None:
        self.title, self.series, self.is_stacked = title, series, is_stacked
        xs = [step for one in series for step, _ in one.points]
        ys = [value for one in series for _, value in one.points]
        x_low, y_low, y_high = min(xs), min(0.0, *ys), max(0.0, *ys)
        self._x_range = (x_low, max(xs) if max(xs) > x_low else x_low + 1)
        self._y_range = (y_low, y_high if y_high > y_low else y_low + 1)

    def x(self, step: float) -> float:
        """Pixel of a step."""
        low, high = self._x_range
        return round(LEFT + (step - low) / (high - low) * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        """Pixel of a value, from the top."""
        low, high = self._y_range
        return round(HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    def coordinates(self, points: Points) -> str:
        """The ``points`` attribute of an SVG polyline or polygon."""
        return " ".join(f"{self.x(x):g},{self.y(y):g}" for x, y in points)

    @property
    def x_ticks(self) -> list[float]:
        """Whole steps to label."""
        return [value for value in nice_ticks(*self._x_range, 6) if value == int(value)]

    @property
    def y_ticks(self) -> list[float]:
        """Values to label and to draw a grid line at."""
        return nice_ticks(*self._y_range)


def line_chart(title: str, series: Sequence[Series]) -> Chart | None:
    """Curves; ``None`` when no series has a point."""
    drawn = [one for one in series if one.points]
    return Chart(title, drawn) if drawn else None


def stacked_chart(title: str, series: Sequence[Series]) -> Chart | None:
    """Areas on top of each other, the first at the bottom; a step that a series lacks counts 0."""
    steps = sorted({step for one in series for step, _ in one.points})
    if not steps:
        return None
    floor = dict.fromkeys(steps, 0.0)
    areas = []
    for one in series:
        values = dict(one.points)
        ceiling = {step: floor[step] + values.get(step, 0.0) for step in steps}
        areas.append(Series(label=one.label, points=[*ceiling.items(), *reversed(floor.items())]))
        floor = ceiling
    return Chart(title, areas, is_stacked=True)


def nice_ticks(low: float, high: float, num: int = 4) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten from ``low`` to at most ``high``, about ``num`` of them."""
    rough = (high - low) / num
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]
