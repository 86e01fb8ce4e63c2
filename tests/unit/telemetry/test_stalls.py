"""Steps that teach nothing: found in metrics, said at growing distances, with causes that the metrics bear out."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_sdsearch.logging import names
from megatron_sdsearch.logging.stalls import STALL_STEPS, due_warnings, num_stalled, stalls, warnings_of


def row(step: int, *, share: float = 1.0, grad_norm: float | None = 0.5, **more: float) -> dict[str, Any]:
    """A training step in which no group had an advantage, unless told otherwise."""
    values = {"step": step, names.STEP_SECONDS: 1.0, names.SHARE_WITHOUT_ADVANTAGE: share, **more}
    return values if grad_norm is None else values | {names.GRAD_NORM: grad_norm}


def rows(*shares: float) -> list[dict[str, Any]]:
    return [row(step, share=share) for step, share in enumerate(shares, start=1)]


def test_a_run_of_steps_is_found_with_its_ends() -> None:
    found = stalls(rows(0.5, 1.0, 1.0, 0.0, 1.0), "contrast")
    assert [(stall.first, stall.last, stall.num_steps) for stall in found] == [(2, 3, 2), (5, 5, 1)]
    assert num_stalled(rows(0.5, 1.0, 1.0, 0.0, 1.0), "contrast") == 3


def test_one_group_with_an_advantage_is_enough() -> None:
    assert warnings_of(rows(*[0.99] * 20)) == []


def test_evaluations_and_metrics_of_an_older_version_count_for_nothing() -> None:
    assert stalls([{"step": 0, names.EVAL_EM: 0.5}], "gradient") == []
    old = [{"step": step, names.STEP_SECONDS: 1.0, names.GRAD_NORM: 0.1} for step in range(1, 20)]
    assert warnings_of(old) == []


@pytest.mark.parametrize("grad_norm", [0.0, None])
def test_a_gradient_of_exactly_0_and_a_step_without_tokens_are_the_same(grad_norm: float | None) -> None:
    stalled = [row(step, share=0.0, grad_norm=grad_norm) for step in range(3, 3 + STALL_STEPS)]
    assert warnings_of(stalled) == ["the gradient was exactly 0 for 5 steps (3 to 7): nothing is learned"]
    assert warnings_of([*stalled[:-1], row(7, share=0.0, grad_norm=1e-12)]) == []


def test_it_is_said_at_5_10_20_40_steps() -> None:
    said = [n for n in range(1, 90) if due_warnings(rows(*[1.0] * n))]
    assert said == [5, 10, 20, 40, 80]


def test_nothing_is_said_any_more_once_there_was_contrast() -> None:
    history = rows(*[1.0] * 5, 0.5)
    assert due_warnings(history) == []
    assert len(warnings_of(history)) == 1, "who reads the metrics later sees it still"


def test_two_stalls_are_two_lines_in_order() -> None:
    lines = warnings_of(rows(*[1.0] * 5, 0.0, *[1.0] * 6))
    assert ["(1 to 5)" in lines[0], "(7 to 12)" in lines[1], len(lines)] == [True, True, 2]


@pytest.mark.parametrize(
    ("metrics", "told", "untold"),
    [
        ({"train/status/no_answer": 0.9, "train/share_all_wrong": 1.0}, "data.prompt_profile", "gold answers"),
        ({"train/status/truncated": 0.6, "train/share_all_wrong": 1.0}, "rollout.max_total_tokens", "prompt_profile"),
        ({"train/status/prompt_too_long": 1.0}, "rollout.max_prompt_tokens", "max_total_tokens"),
        ({"train/status/answered": 1.0, "train/share_all_wrong": 1.0}, "gold answers", "prompt_profile"),
        ({"train/status/answered": 1.0, "train/share_all_correct": 1.0}, "harder questions", "all answers are wrong"),
        ({"train/status/answered": 1.0, "train/share_all_correct": 0.5}, "objective.reward", "harder"),
    ],
)
def test_causes_fit_the_metrics(metrics: dict[str, float], told: str, untold: str) -> None:
    (line,) = warnings_of([row(step, **metrics) for step in range(1, 6)])
    assert line.startswith("no group had contrast for 5 steps (1 to 5): ")
    assert told in line
    assert untold not in line
