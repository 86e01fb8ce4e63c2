"""The paper's run in docs/planning.md: the planned hours that are written there are the plan's."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sdsearch.allocation import Allocation
from megatron_sdsearch.plan.report import plan_run
from tests.unit.plan.models import QWEN_3B, run, shape_of

DOCUMENT = (Path(__file__).parents[3] / "docs/planning.md").read_text()
PUBLISHED_HOURS = {"SD-Search, 200 steps": 11.9, "baseline, 200 steps": 10.3}  # arXiv 2605.18299


def _hours(alpha: float, *assumptions: str) -> float:
    config = run(model={"recompute": "full"}, train={"max_tokens_per_microbatch": 8704}, objective={"alpha": alpha})
    shape = shape_of(QWEN_3B)
    plan = plan_run(config, shape, Allocation(gpus_per_node=8), hardware="h800", assumptions=assumptions)
    assert plan.given.why_not is None
    return plan.given.step_s * 200 / 3600


def _cells(first: str) -> list[str]:
    (line,) = [line for line in DOCUMENT.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_documented_hours_and_their_errors_are_the_planned_ones() -> None:
    planned = (_hours(1e-3), _hours(0.0))
    for (row, published), hours in zip(PUBLISHED_HOURS.items(), planned, strict=True):
        off = f"{(hours / published - 1) * 100:.0f} %"
        assert _cells(row) == [row, f"{published} h", f"{hours:.1f} h", off]
    assert _cells("SD-Search over baseline")[1:3] == ["+15.5 %", f"+{(planned[0] / planned[1] - 1) * 100:.1f} %"]


@pytest.mark.parametrize("assumption", ["fill=0.25", "fill=0.75", "training=0.2", "decode_step_s=0.01"])
def test_the_documented_sensitivities_are_the_planned_ones(assumption: str) -> None:
    ours, baseline = _hours(1e-3, assumption), _hours(0.0, assumption)
    expected = [f"{ours:.1f} h", f"{baseline:.1f} h", f"+{(ours / baseline - 1) * 100:.1f} %"]
    assert _cells(f"`{assumption}`")[1:] == expected
