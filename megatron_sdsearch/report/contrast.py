"""Stretches of steps in which a run learned nothing, from its metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

from megatron_sdsearch.telemetry import names

SHARE_MIXED = "train/share_mixed"
MIN_STEPS = 3
"""A shorter stretch is chance, with few groups a step; unless it is the whole run."""


def contrast_warnings(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """One sentence for each kind of step that taught nothing, with the stretches in which it came.

    Args:
        rows: of ``metrics.jsonl``, by ascending step; those without the metric are passed over.
    """
    without_contrast = _stretches(rows, SHARE_MIXED, lambda share: share == 0)
    without_gradient = _stretches(rows, names.GRAD_NORM, lambda norm: norm == 0)
    warnings = []
    if without_contrast:
        warnings.append(
            f"No group had contrast in {without_contrast}: all siblings were right or all wrong, and their outcomes "
            "teach the policy nothing. Usual causes: questions too hard or too easy, answers cut off by a length "
            "limit, a prompt whose tags the model does not write."
        )
    if without_gradient:
        warnings.append(f"The gradient norm was 0 in {without_gradient}: nothing was learned.")
    return warnings


def _stretches(rows: Sequence[Mapping[str, Any]], name: str, is_bad: Callable[[float], bool]) -> str:
    """Such as "steps 3-9, 14-20"; empty without any."""
    known = [(row["step"], is_bad(row[name])) for row in rows if name in row]
    runs = [[step for step, _ in group] for bad, group in groupby(known, key=lambda item: item[1]) if bad]
    long = [steps for steps in runs if len(steps) >= min(MIN_STEPS, len(known))]
    parts = [f"{steps[0]}-{steps[-1]}" if len(steps) > 1 else f"{steps[0]}" for steps in long]
    if not parts:
        return ""
    return f"{'step' if sum(map(len, long)) == 1 else 'steps'} {', '.join(parts)}"
