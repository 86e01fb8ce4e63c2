"""Line charts and stacked areas as plain coordinates. ``page.html.j2`` draws them as SVG, ``page.css`` colours them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 460, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 26
MAX_DOTS = 120
"""A longer series is drawn without dots: they would merge, and each one weighs 80 bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """A named curve: (step, value) by ascending step."""

    label: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """A grid line: its pixel and what is written at it."""

    at: float
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Dot:
    """A point that tells its value when pointed at."""

    x: float
    y: float
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One drawn series: ``coordinates`` for an SVG polyline or polygon."""

    label: str
    coordinates: str
    dots: Sequence[Dot] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """Everything a template needs to draw."""

    title: str
    is_stacked: bool
    shapes: Sequence[Shape]
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]


def line_chart(title: str, series: Sequence[Series]) -> Chart | None:
    """Curves over a common axis that holds 0; ``None`` when no series has a point."""
    drawn = [one for one in series if one.points]
    if not drawn:
        return None
    axes = _Axes.around([point for one in drawn for point in one.points])
    shapes = [Shape(label=one.label, coordinates=axes.coordinates(one.points), dots=_dots(one, axes)) for one in drawn]
    return Chart(title=title, is_stacked=False, shapes=shapes, x_ticks=axes.x_ticks(), y_ticks=axes.y_ticks())


def stacked_chart(title: str, series: Sequence[Series]) -> Chart | None:
    """Areas on top of each other, the first at the bottom; a step that a series lacks counts 0."""
    steps = sorted({step for one in series for step, _ in one.points})
    if not steps:
        return None
    floor = dict.fromkeys(steps, 0.0)
    layers = []
    for one in series:
        values = dict(one.points)
        ceiling = {step: floor[step] + values.get(step, 0.0) for step in steps}
        layers.append((one.label, [*ceiling.items()], [*reversed(floor.items())]))
        floor = ceiling
    axes = _Axes.around(list(floor.items()))
    shapes = [Shape(label=label, coordinates=axes.coordinates(top + bottom)) for label, top, bottom in layers]
    return Chart(title=title, is_stacked=True, shapes=shapes, x_ticks=axes.x_ticks(), y_ticks=axes.y_ticks())


def nice_ticks(low: float, high: float, num: int = 4) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten from ``low`` to at most ``high``, about ``num`` of them."""
    rough = (high - low) / num
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Axes:
    """Data ranges; never empty."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    @classmethod
    def around(cls, points: Sequence[tuple[float, float]]) -> _Axes:
        xs, ys = [x for x, _ in points], [y for _, y in points]
        y_low, y_high = min(0.0, *ys), max(0.0, *ys)
        return cls(
            x_low=min(xs),
            x_high=max(xs) if max(xs) > min(xs) else min(xs) + 1,
            y_low=y_low,
            y_high=y_high if y_high > y_low else y_low + 1,
        )

    def x(self, value: float) -> float:
        return round(LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        return round(HEIGHT - BOTTOM - (value - self.y_low) / (self.y_high - self.y_low) * (HEIGHT - TOP - BOTTOM), 1)

    def coordinates(self, points: Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{self.x(x):g},{self.y(y):g}" for x, y in points)

    def x_ticks(self) -> list[Tick]:
        whole = [value for value in nice_ticks(self.x_low, self.x_high, 6) if value == int(value)]
        return [Tick(at=self.x(value), label=f"{value:g}") for value in whole]

    def y_ticks(self) -> list[Tick]:
        return [Tick(at=self.y(value), label=f"{value:.6g}") for value in nice_ticks(self.y_low, self.y_high)]


def _dots(series: Series, axes: _Axes) -> list[Dot]:
    if len(series.points) > MAX_DOTS:
        return []
    return [
        Dot(x=axes.x(step), y=axes.y(value), label=f"{series.label}, step {step:g}: {value:.4g}")
        for step, value in series.points
    ]
