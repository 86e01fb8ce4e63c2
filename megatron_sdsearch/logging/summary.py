"""Summarize a finished run's metrics in ``summary.json``, and as a table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from rich.table import Table
from rich.text import Text

from megatron_sdsearch.config import RunConfig, flatten
from megatron_sdsearch.files import write_file
from megatron_sdsearch.logging import names
from megatron_sdsearch.logging.idle_steps import find_idle_steps
from megatron_sdsearch.logging.metrics import read_metrics

if TYPE_CHECKING:  # the page reads SUMMARY_FILE without torch
    from megatron_sdsearch.parallel.groups import ParallelState

#: In ``run_dir``; only a finished run has it.
SUMMARY_FILE: Final = "summary.json"
_TOTALS: Final = (
    *(names.NUM_TRAJECTORIES, names.NUM_RETRIEVAL_FAILED, names.NUM_LOST, names.NUM_PROMPT_TOO_LONG),
    *(names.NUM_EOS_WITHOUT_ACTION, names.NUM_LEAKS),
)
_EVALUATED: Final = {
    "em": names.EVAL_EM,
    "f1": names.EVAL_F1,
    "hit": names.EVAL_HIT_RATE,
    "num_evaluated": names.EVAL_NUM_TRAJECTORIES,
    "num_lost": names.EVAL_NUM_LOST,
}
_PROBE_SHARES: Final = ("student_hit", "teacher_hit", "student_hit_mixed", "teacher_hit_mixed")


def write_summary(config: RunConfig, parallel: ParallelState, wall_s: float) -> dict[str, Any]:
    """Summarize a run on every rank; the main rank also writes ``summary.json``.

    Args:
        config: of the run.
        parallel: its ranks.
        wall_s: seconds taken by the finished steps.
    """
    summary = {
        "steps": config.train.num_steps,
        "tp": parallel.tp_size,
        "pp": parallel.pp_size,
        "dp": parallel.dp_size,
        "seed": config.seed,
        "rl_wall_s" if config.is_rl else "warm_start_wall_s": wall_s,
        **_figures(read_metrics(config.run_dir)),
    }
    if parallel.is_main:
        write_file(config.run_dir / SUMMARY_FILE, json.dumps(summary, indent=1) + "\n")
    return summary


def _figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return totals over all steps, the first and the last evaluation, and the probe's shares."""
    seconds = [row[names.STEP_SECONDS] for row in rows if names.STEP_SECONDS in row]
    figures: dict[str, Any] = {"s_per_step": sum(seconds) / len(seconds) if seconds else None}
    for metric in _TOTALS:
        figures[metric.partition("/")[2]] = sum(row[metric] for row in rows if metric in row)
    figures["steps_without_contrast"] = sum(map(len, find_idle_steps(rows, "contrast")))
    figures["steps_without_gradient"] = sum(map(len, find_idle_steps(rows, "gradient")))
    if evaluated := [row for row in rows if names.EVAL_EM in row]:
        for name, metric in _EVALUATED.items():
            for when, row in (("start", evaluated[0]), ("end", evaluated[-1])):
                if metric in row:
                    figures[f"{name}_{when}"] = row[metric]
    figures |= dict.fromkeys(_PROBE_SHARES)
    probed = {name: value for row in rows for name, value in row.items() if name.startswith(names.PROBE_PREFIX)}
    return figures | {name.removeprefix(names.PROBE_PREFIX): value for name, value in probed.items()}


def final_table(summary: Mapping[str, Any]) -> Table:
    """Lay out ``summary`` in two columns; nested mappings get dotted names."""
    table = Table(title="Summary", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for name, value in flatten(summary).items():
        # Text, since rich reads square brackets in a str as markup.
        table.add_row(Text(name), Text(short(value)))
    return table


def short(value: object) -> str:
    """Format a number with four significant digits, anything else as text; ``None`` is a dash."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
