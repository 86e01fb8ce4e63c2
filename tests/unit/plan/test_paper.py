"""The paper's run as docs/planning.md tells it: what is written there is what the plan says."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from megatron_sdsearch.model.hf_config import is_layout
from megatron_sdsearch.plan.allocation import Allocation
from megatron_sdsearch.plan.planning import plan_run
from megatron_sdsearch.plan.report import RunPlan
from tests.unit.plan.models import QWEN_3B, run, shape_of

DOCUMENT = (Path(__file__).parents[3] / "docs/planning.md").read_text()
PUBLISHED_HOURS = {"SD-Search, 200 steps": 11.9, "baseline, 200 steps": 10.3}  # arXiv 2605.18299


def _plan(alpha: float, *assumptions: str, recompute: str = "full") -> RunPlan:
    config = run(model={"recompute": recompute}, train={"max_tokens_per_microbatch": 8704}, objective={"alpha": alpha})
    legal = partial(is_layout, QWEN_3B)
    return plan_run(
        config,
        shape_of(QWEN_3B),
        Allocation(gpus_per_node=8),
        hardware="h800",
        is_legal=legal,
        assumptions=assumptions,
    )


def _hours(plan: RunPlan) -> float:
    return plan.given.time.step_s * plan.num_steps / 3600


def _cells(first: str) -> list[str]:
    (line,) = [line for line in DOCUMENT.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_documented_hours_and_their_errors_are_the_planned_ones() -> None:
    plans = (_plan(1e-3), _plan(0.0))
    for (row, published), plan in zip(PUBLISHED_HOURS.items(), plans, strict=True):
        assert plan.planner.fits(plan.given)
        planned = _hours(plan)
        off = planned / published - 1
        assert _cells(row) == [row, f"{published} h", f"{planned:.1f} h", f"{off * 100:.0f} %"]
    ratio = _hours(plans[0]) / _hours(plans[1]) - 1
    assert _cells("SD-Search over baseline")[1:3] == ["+15.5 %", f"+{ratio * 100:.1f} %"]


def test_the_documented_share_of_the_teacher_is_the_planned_one() -> None:
    told = _cells("teacher pass over the baseline's passes of the trainer")[2]
    for recompute in ("full", "none"):
        time = _plan(1e-3, recompute=recompute).given.time
        passes = sum(time.phases[name]["compute"] for name in ("reference", "old", "update"))
        assert f"+{time.phases['teacher']['compute'] / passes * 100:.1f} %" in told


@pytest.mark.parametrize(
    "assumption", ["fill=0.25", "fill=0.75", "fill=1", "training=0.2", "search_s=5", "decode_step_s=0.01", "tail=3"]
)
def test_the_documented_sensitivities_are_the_planned_ones(assumption: str) -> None:
    ours, baseline = (_hours(_plan(alpha, assumption)) for alpha in (1e-3, 0.0))
    difference = (ours / baseline - 1) * 100
    assert _cells(f"`{assumption}`")[1:] == [f"{ours:.1f} h", f"{baseline:.1f} h", f"+{difference:.1f} %"]
