"""One self-contained page about a run: headline numbers, curves, and a few groups to read.

Reads only what the run wrote (``metrics.jsonl``, ``summary.json``, ``stopped.json``, ``trajectories/``), finished or
not. The page holds no script and asks the network for nothing; all text of a run is escaped, whatever a model or a
passage put into it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from megatron_sdsearch.config import flatten
from megatron_sdsearch.errors import DataError
from megatron_sdsearch.files import write_file
from megatron_sdsearch.logging import names, warnings_of
from megatron_sdsearch.logging.metrics import METRICS_FILE, read_metrics
from megatron_sdsearch.logging.summary import SUMMARY_FILE, short
from megatron_sdsearch.report import charts
from megatron_sdsearch.report.charts import Chart, Series, line_chart, stacked_chart
from megatron_sdsearch.report.examples import pick_examples
from megatron_sdsearch.report.state import read_object, run_state

PAGE_FILE = "report.html"
EDGE_STEPS = 5
"""Noisy training numbers are compared as means over so many first and last steps."""

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """One headline number, and where it came from."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricRow:
    """One metric in the table of all."""

    name: str
    first: str
    last: str
    low: str
    high: str


def write_page(run_dir: Path, out: Path | None = None, *, is_running: bool = False) -> Path:
    """Write the page of a run that is going, has stopped, failed or finished, replacing an older one whole.

    Args:
        run_dir: of the run.
        out: the page's file; ``run_dir/report.html`` without one.
        is_running: True when the run itself writes.

    Returns:
        The page's path.

    Raises:
        DataError: the folder is no run's, or one of its files is malformed; names it.
        StorageError: the page cannot be written.
    """
    path = run_dir / PAGE_FILE if out is None else out
    if not (run_dir / METRICS_FILE).exists():
        raise DataError(f"{run_dir / METRICS_FILE} does not exist; give the folder of a run (its run_dir)")
    write_file(path, _html(run_dir, is_running=is_running), is_shared=True)
    return path


def _html(run_dir: Path, *, is_running: bool) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"short": short, "time": lambda time: time.isoformat(" ", "seconds")}
    rows = read_metrics(run_dir)
    return environment.get_template("page.html.j2").render(
        title=run_dir.resolve().name,
        state=run_state(run_dir, rows[-1]["step"] if rows else 0, is_running=is_running),
        now=datetime.now().astimezone(),
        warnings=warnings_of(rows),
        tiles=_tiles(rows),
        charts=_charts(rows),
        frame=charts,
        summary=flatten(read_object(run_dir / SUMMARY_FILE)),
        metrics=_metric_rows(rows),
        examples=pick_examples(run_dir),
    )


def _series(rows: Rows, name: str, label: str) -> Series:
    return Series(label=label, points=[(row["step"], row[name]) for row in rows if name in row])


def _tiles(rows: Rows) -> list[Tile]:
    tiles = [
        _change(rows, names.EVAL_EM, "Held-out EM", edge=1, lost=names.EVAL_NUM_LOST),
        _change(rows, names.REWARD, "Training reward", lost=names.NUM_LOST),
        _change(rows, names.HIT_RATE, "Retrieval hit rate"),
        _change(rows, names.JSD, "JSD, nats"),
        _seconds(rows),
    ]
    return [tile for tile in tiles if tile is not None]


def _change(rows: Rows, name: str, label: str, edge: int = EDGE_STEPS, lost: str = "") -> Tile | None:
    """First and last values of a metric; ``lost`` names the count of trajectories that it leaves out."""
    rows = [row for row in rows if name in row]
    values = [float(row[name]) for row in rows]
    if not values:
        return None
    edge = min(edge, max(1, len(values) // 2))
    note = "first and last" if edge == 1 else f"means of the first and last {edge} steps"
    counts = [sum(row.get(lost, 0) for row in part) for part in (rows[:edge], rows[-edge:])]
    note += f"; lost and left out: {counts[0]} and {counts[1]} trajectories" if any(counts) else ""
    if len(values) == 1:
        return Tile(label=label, value=f"{values[0]:.3g}", note=note.replace("first and last", "so far once"))
    return Tile(label=label, value=f"{fmean(values[:edge]):.3g} → {fmean(values[-edge:]):.3g}", note=note)


def _seconds(rows: Rows) -> Tile | None:
    seconds = [row[names.STEP_SECONDS] for row in rows if names.STEP_SECONDS in row]
    if not seconds:
        return None
    total = timedelta(seconds=round(sum(seconds)))
    return Tile(label="Time", value=str(total), note=f"{fmean(seconds):.2f} s per step")


def _charts(rows: Rows) -> list[Chart]:
    phases = dict.fromkeys(name for row in rows for name in row if name.startswith(names.PHASE_PREFIX))
    drawn = [
        line_chart(
            "Exact match and reward",
            [
                _series(rows, names.REWARD, "training reward"),
                _series(rows, names.EM, "training EM"),
                _series(rows, names.EVAL_EM, "held-out EM"),
            ],
        ),
        line_chart(
            "Retrieval hit rate",
            [_series(rows, names.HIT_RATE, "training"), _series(rows, names.EVAL_HIT_RATE, "held-out")],
        ),
        line_chart("Trajectories left out", _left_out(rows)),
        line_chart(
            "Divergence of teacher and student, nats",
            _by_class(rows, names.JSD, names.JSD_BY_CLASS_PREFIX),
        ),
        line_chart(
            "Entropy at query tokens, student minus teacher, nats",
            _by_class(rows, names.ENTROPY_GAP, names.ENTROPY_GAP_BY_CLASS_PREFIX),
        ),
        stacked_chart(
            "Seconds by phase", [_series(rows, name, name.removeprefix(names.PHASE_PREFIX)) for name in phases]
        ),
    ]
    return [chart for chart in drawn if chart is not None]


def _left_out(rows: Rows) -> list[Series]:
    """Counts of what is in no mean or never began; nothing where all of them are 0 throughout."""
    counts = {
        names.NUM_LOST: "training, lost",
        names.EVAL_NUM_LOST: "held-out, lost",
        names.NUM_PROMPT_TOO_LONG: "training, prompt too long",
        names.EVAL_NUM_PROMPT_TOO_LONG: "held-out, prompt too long",
    }
    return [_series(rows, name, label) for name, label in counts.items() if any(row.get(name) for row in rows)]


def _by_class(rows: Rows, name: str, prefix: str) -> list[Series]:
    classes = ("all_correct", "mixed", "all_wrong")
    return [
        _series(rows, name, "all groups"),
        *(_series(rows, prefix + kind, kind.replace("_", " ")) for kind in classes),
    ]


def _metric_rows(rows: Rows) -> list[MetricRow]:
    result = []
    for name in sorted({name for row in rows for name in row} - {"step"}):
        values = [row[name] for row in rows if name in row]
        ends = {"name": name, "first": short(values[0]), "last": short(values[-1])}
        is_number = all(isinstance(value, (int, float)) for value in values)
        low, high = (short(min(values)), short(max(values))) if is_number else ("-", "-")
        result.append(MetricRow(**ends, low=low, high=high))
    return result
