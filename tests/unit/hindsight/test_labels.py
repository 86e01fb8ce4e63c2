"""Labels in place of the true ones: what they keep, and that a placebo depends on no outcome of its own."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sdsearch.config import HindsightConfig
from megatron_sdsearch.hindsight.labels import Outcome, shown_labels
from megatron_sdsearch.records import TrajectoryId

Labels = Literal["outcome", "none", "shuffled", "permuted"]


def step_of(*groups: Sequence[bool], step: int = 3) -> list[Outcome]:
    """The outcomes of each question's siblings."""
    return [
        Outcome(trajectory_id=TrajectoryId(step=step, question_id=f"q{i}", sibling=j), is_correct=is_correct)
        for i, group in enumerate(groups)
        for j, is_correct in enumerate(group)
    ]


def shown(outcomes: Sequence[Outcome], labels: Labels, seed: int = 1) -> dict[TrajectoryId, bool]:
    return shown_labels(outcomes, HindsightConfig(labels=labels), seed=seed)


@given(groups=st.lists(st.lists(st.booleans(), min_size=1, max_size=5), max_size=6), seed=st.integers(0, 9))
def test_every_kind_labels_every_trajectory_and_keeps_the_number_of_correct_ones(
    groups: list[list[bool]], seed: int
) -> None:
    outcomes = step_of(*groups)
    true = {outcome.trajectory_id: outcome.is_correct for outcome in outcomes}
    assert shown(outcomes, "outcome", seed) == shown(outcomes, "none", seed) == true
    for labels in ("shuffled", "permuted"):
        found = shown(outcomes, labels, seed)
        assert found.keys() == true.keys()
        assert sum(found.values()) == sum(true.values())
    permuted = shown(outcomes, "permuted", seed)
    for i, group in enumerate(groups):
        assert sum(label for name, label in permuted.items() if name.question_id == f"q{i}") == sum(group)


def test_in_a_group_without_contrast_a_placebo_lies_where_a_permutation_cannot() -> None:
    outcomes = step_of(*[[False] * 5] * 20, *[[True] * 5] * 20)
    placebo, permuted = shown(outcomes, "shuffled"), shown(outcomes, "permuted")
    assert sum(placebo[o.trajectory_id] != o.is_correct for o in outcomes) == pytest.approx(100, abs=25)
    assert all(permuted[o.trajectory_id] == o.is_correct for o in outcomes)


def test_a_placebo_says_nothing_of_the_own_outcome() -> None:
    """Right answers are shown as CORRECT as often as wrong ones are: a fifth of either, over many steps."""
    counts = {True: [0, 0], False: [0, 0]}
    for step in range(60):
        outcomes = step_of(*[[True, False, False, False, False]] * 20, step=step)
        labels = shown(outcomes, "shuffled")
        for outcome in outcomes:
            counts[outcome.is_correct][labels[outcome.trajectory_id]] += 1
    shares = {is_correct: right / (wrong + right) for is_correct, (wrong, right) in counts.items()}
    assert shares == {True: pytest.approx(0.2, abs=0.04), False: pytest.approx(0.2, abs=0.02)}


def test_a_placebo_is_the_same_whatever_the_others_answered() -> None:
    """With as many right answers in the step, it does not matter whose they are."""
    first, second = step_of([True, False, False], [False, True, False]), step_of([False] * 3, [True, False, True])
    assert shown(first, "shuffled") == shown(second, "shuffled")


@given(seed=st.integers(0, 99), num_ranks=st.integers(1, 5))
def test_a_placebo_knows_neither_the_order_of_groups_nor_the_ranks(seed: int, num_ranks: int) -> None:
    outcomes = step_of(*[[j <= i % 3 for j in range(4)] for i in range(7)])
    by_rank = [[o for i, o in enumerate(outcomes) if (i // 4) % num_ranks == rank] for rank in range(num_ranks)]
    gathered = [outcome for part in by_rank for outcome in part]
    assert shown(gathered, "shuffled", seed) == shown(outcomes, "shuffled", seed)
    mixed = random.Random(seed).sample(outcomes, len(outcomes))
    assert shown(mixed, "shuffled", seed) == shown(outcomes, "shuffled", seed)


def test_permuted_labels_are_those_of_runs_that_called_them_shuffled() -> None:
    name = TrajectoryId(step=3, question_id="set:train:1", sibling=0)
    outcomes = [
        Outcome(trajectory_id=dataclasses.replace(name, sibling=sibling), is_correct=sibling < 4)
        for sibling in range(8)
    ]
    assert list(shown(outcomes, "permuted").values()) == [False, False, True, True, True, False, True, False]


@pytest.mark.parametrize("labels", ["shuffled", "permuted"])
def test_labels_change_with_seed_and_step(labels: Labels) -> None:
    groups = [[j < 2 for j in range(5)] for _ in range(4)]

    def pattern(step: int, seed: int) -> tuple[bool, ...]:
        return tuple(label for _, label in sorted(shown(step_of(*groups, step=step), labels, seed).items(), key=str))

    assert pattern(3, 1) == pattern(3, 1)
    assert len({pattern(3, seed) for seed in range(6)}) == 6
    assert len({pattern(step, 1) for step in range(6)}) == 6
