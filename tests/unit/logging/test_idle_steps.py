"""Steps that teach nothing: found in metrics, warned of at growing distances, with causes that the metrics support."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_sdsearch.logging import names
from megatron_sdsearch.logging.idle_steps import WARN_AFTER, due_warnings, find_idle_steps, idle_step_warnings


def row(step: int, *, share: float = 1.0, grad_norm: float | None = 0.5, **more: float) -> dict[str, Any]:
    """A training step in which no group had an advantage, unless ``share`` says otherwise."""
    values = {"step": step, names.STEP_SECONDS: 1.0, names.SHARE_WITHOUT_ADVANTAGE: share, **more}
    return values if grad_norm is None else values | {names.GRAD_NORM: grad_norm}


def rows(*shares: float) -> list[dict[str, Any]]:
    return [row(step, share=share) for step, share in enumerate(shares, start=1)]


def test_a_run_of_steps_is_found_with_its_ends() -> None:
    found = find_idle_steps(rows(0.5, 1.0, 1.0, 0.0, 1.0), "contrast")
    assert [[row["step"] for row in stretch] for stretch in found] == [[2, 3], [5]]


def test_one_group_with_an_advantage_is_enough() -> None:
    assert idle_step_warnings(rows(*[0.99] * 20)) == []


def test_evaluations_and_metrics_of_an_older_version_count_for_nothing() -> None:
    assert find_idle_steps([{"step": 0, names.EVAL_EM: 0.5}], "gradient") == []
    old = [{"step": step, names.STEP_SECONDS: 1.0, names.GRAD_NORM: 0.1} for step in range(1, 20)]
    assert idle_step_warnings(old) == []


@pytest.mark.parametrize("grad_norm", [0.0, None])
def test_a_gradient_of_exactly_0_and_a_step_without_tokens_are_the_same(grad_norm: float | None) -> None:
    idle = [row(step, share=0.0, grad_norm=grad_norm) for step in range(3, 3 + WARN_AFTER)]
    assert idle_step_warnings(idle) == ["the gradient was exactly 0 for 5 steps (3 to 7): nothing is learned"]
    assert idle_step_warnings([*idle[:-1], row(7, share=0.0, grad_norm=1e-12)]) == []


def test_warnings_come_at_5_10_20_40_steps() -> None:
    warned = [n for n in range(1, 90) if due_warnings(rows(*[1.0] * n))]
    assert warned == [5, 10, 20, 40, 80]


def test_warnings_end_once_there_was_contrast() -> None:
    history = rows(*[1.0] * 5, 0.5)
    assert due_warnings(history) == []
    assert len(idle_step_warnings(history)) == 1, "a later reader of the metrics still sees it"


def test_two_stretches_are_two_lines_in_order() -> None:
    lines = idle_step_warnings(rows(*[1.0] * 5, 0.0, *[1.0] * 6))
    assert ["(1 to 5)" in lines[0], "(7 to 12)" in lines[1], len(lines)] == [True, True, 2]


@pytest.mark.parametrize(
    ("metrics", "named", "not_named"),
    [
        ({"train/status/no_answer": 0.9, "train/share_all_wrong": 1.0}, "data.prompt_profile", "gold answers"),
        ({"train/status/truncated": 0.6, "train/share_all_wrong": 1.0}, "rollout.max_total_tokens", "prompt_profile"),
        ({"train/status/prompt_too_long": 1.0}, "rollout.max_prompt_tokens", "max_total_tokens"),
        ({"train/status/answered": 1.0, "train/share_all_wrong": 1.0}, "gold answers", "prompt_profile"),
        ({"train/status/answered": 1.0, "train/share_all_correct": 1.0}, "harder questions", "all answers are wrong"),
        ({"train/status/answered": 1.0, "train/share_all_correct": 0.5}, "objective.reward", "harder"),
    ],
)
def test_causes_fit_the_metrics(metrics: dict[str, float], named: str, not_named: str) -> None:
    (line,) = idle_step_warnings([row(step, **metrics) for step in range(1, 6)])
    assert line.startswith("no group had contrast for 5 steps (1 to 5): ")
    assert named in line
    assert not_named not in line
