"""Compute headline numbers, charts and the table of metrics on a run's page.

Charts are coordinates: ``page.html.j2`` draws them as SVG, ``page.css`` colours them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import timedelta
from statistics import fmean
from typing import Any, NamedTuple

from megatron_sdsearch.logging import names
from megatron_sdsearch.logging.progress import DIVERGENCES
from megatron_sdsearch.logging.summary import short
from megatron_sdsearch.records import GROUP_CLASSES

WIDTH, HEIGHT = 460, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 26
#: A longer series has no dots: they would merge, and each takes 80 bytes.
MAX_DOTS = 120
Points = Sequence[tuple[float, float]]
#: Noisy training metrics are compared as means over this many first and last steps.
EDGE_STEPS = 5
# Counts of trajectories that were lost or never started.
_LEFT_OUT = {
    names.NUM_LOST: "training, lost",
    names.EVAL_NUM_LOST: "held-out, lost",
    names.NUM_PROMPT_TOO_LONG: "training, prompt too long",
    names.EVAL_NUM_PROMPT_TOO_LONG: "held-out, prompt too long",
}
Rows = Sequence[Mapping[str, Any]]


class Tile(NamedTuple):
    """One headline number and its source."""

    label: str
    value: str
    note: str


def make_tiles(rows: Rows) -> list[Tile]:
    """Make headline numbers from the metrics that a run has."""
    tiles = [
        _compare_ends(rows, names.EVAL_EM, "Held-out EM", edge=1, lost=names.EVAL_NUM_LOST),
        _compare_ends(rows, names.REWARD, "Training reward", lost=names.NUM_LOST),
        _compare_ends(rows, names.HIT_RATE, "Retrieval hit rate"),
        *(_compare_ends(rows, name, label) for name, label in DIVERGENCES.items()),
    ]
    if seconds := [row[names.STEP_SECONDS] for row in rows if names.STEP_SECONDS in row]:
        total = timedelta(seconds=round(sum(seconds)))
        tiles.append(Tile("Time", str(total), f"{fmean(seconds):.2f} s per step"))
    return [tile for tile in tiles if tile is not None]


def _compare_ends(rows: Rows, name: str, label: str, edge: int = EDGE_STEPS, lost: str = "") -> Tile | None:
    """Compare the first and last values of a metric; ``lost`` names the count of trajectories that it leaves out."""
    rows = [row for row in rows if name in row]
    values = [float(row[name]) for row in rows]
    if not values:
        return None
    edge = min(edge, max(1, len(values) // 2))
    note = "first and last" if edge == 1 else f"means of the first and last {edge} steps"
    counts = [sum(row.get(lost, 0) for row in part) for part in (rows[:edge], rows[-edge:])]
    note += f"; lost and left out: {counts[0]} and {counts[1]} trajectories" if any(counts) else ""
    if len(values) == 1:
        return Tile(label, f"{values[0]:.3g}", note.replace("first and last", "so far once"))
    return Tile(label, f"{fmean(values[:edge]):.3g} → {fmean(values[-edge:]):.3g}", note)


def make_charts(rows: Rows) -> list[Chart]:
    """Draw charts of the metrics that a run has."""

    def series(curves: Mapping[str, str]) -> list[Series]:
        return [
            Series(label=label, points=[(row["step"], row[name]) for row in rows if name in row])
            for name, label in curves.items()
        ]

    def by_class(name: str) -> list[Series]:
        classes = {f"{name}_{each}": each.replace("_", " ") for each in reversed(GROUP_CLASSES)}
        return series({name: "all groups"} | classes)

    phases = dict.fromkeys(name for row in rows for name in row if name.startswith(names.PHASE_PREFIX))
    accuracy = {names.REWARD: "training reward", names.EM: "training EM", names.EVAL_EM: "held-out EM"}
    left_out = {name: label for name, label in _LEFT_OUT.items() if any(row.get(name) for row in rows)}
    seconds = series({name: name.removeprefix(names.PHASE_PREFIX) for name in phases})
    drawn = [
        line_chart("Exact match and reward", series(accuracy)),
        line_chart("Retrieval hit rate", series({names.HIT_RATE: "training", names.EVAL_HIT_RATE: "held-out"})),
        line_chart("Trajectories left out", series(left_out)),
        *(line_chart(f"Teacher and student: {label}", by_class(name)) for name, label in DIVERGENCES.items()),
        line_chart("Entropy at query tokens, student minus teacher, nats", by_class(names.ENTROPY_GAP)),
        stacked_chart("Seconds by phase", seconds),
    ]
    return [chart for chart in drawn if chart is not None]


def metric_table(rows: Rows) -> list[tuple[str, str, str, str, str]]:
    """List name, first, last, lowest and highest value of every metric; texts have no lowest or highest."""
    table = []
    for name in sorted({name for row in rows for name in row} - {"step"}):
        values = [row[name] for row in rows if name in row]
        is_number = all(isinstance(value, (int, float)) for value in values)
        low, high = (short(min(values)), short(max(values))) if is_number else ("-", "-")
        table.append((name, short(values[0]), short(values[-1]), low, high))
    return table


class Series(NamedTuple):
    """A named curve of (step, value) by ascending step; in a stacked chart, the outline of an area."""

    label: str
    points: Points


class Chart:
    """Series over common axes; the y axis includes 0. ``x`` and ``y`` turn steps and values into pixels."""

    def __init__(self, title: str, series: Sequence[Series], *, is_stacked: bool = False) -> None:
        self.title, self.series, self.is_stacked = title, series, is_stacked
        xs = [step for one in series for step, _ in one.points]
        ys = [value for one in series for _, value in one.points]
        x_low, y_low, y_high = min(xs), min(0.0, *ys), max(0.0, *ys)
        self._x_range = (x_low, max(xs) if max(xs) > x_low else x_low + 1)
        self._y_range = (y_low, y_high if y_high > y_low else y_low + 1)

    def x(self, step: float) -> float:
        """Return the pixel of a step."""
        low, high = self._x_range
        return round(LEFT + (step - low) / (high - low) * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        """Return the pixel of a value, from the top."""
        low, high = self._y_range
        return round(HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    def coordinates(self, points: Points) -> str:
        """Return the ``points`` attribute of an SVG polyline or polygon."""
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
    """Draw curves; ``None`` when no series has a point."""
    drawn = [one for one in series if one.points]
    return Chart(title, drawn) if drawn else None


def stacked_chart(title: str, series: Sequence[Series]) -> Chart | None:
    """Stack areas, the first at the bottom; a step missing in a series counts 0."""
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
    """Return about ``num`` multiples of 1, 2 or 5 times a power of ten within ``low`` and ``high``."""
    rough = (high - low) / num
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]
