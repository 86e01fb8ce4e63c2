"""Labels in place of the true ones: what they keep, and that a placebo depends on no outcome of its own."""

from __future__ import annotations

import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Literal, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sdsearch.hindsight.labels import shown_labels
from megatron_sdsearch.records import RolloutGroup, TrajectoryId

Labels = Literal["outcome", "none", "shuffled", "permuted"]


def step_of(*groups: Sequence[bool], step: int = 3) -> list[RolloutGroup]:
    """Groups of nothing but ids and outcomes, one for each question's siblings."""
    return [group_of(f"q{i}", group, step) for i, group in enumerate(groups)]


def group_of(question_id: str, correct: Sequence[bool], step: int = 3) -> RolloutGroup:
    ids = [TrajectoryId(step=step, question_id=question_id, sibling=j) for j in range(len(correct))]
    group = SimpleNamespace(
        trajectories=[SimpleNamespace(trajectory_id=one, is_trainable=True) for one in ids],
        scores=[SimpleNamespace(is_correct=one) for one in correct],
    )
    return cast("RolloutGroup", group)


def outcomes_of(groups: Sequence[RolloutGroup]) -> dict[TrajectoryId, bool]:
    return shown(groups, "outcome")


def shown(groups: Sequence[RolloutGroup], labels: Labels, seed: int = 1) -> dict[TrajectoryId, bool]:
    return shown_labels(groups, labels, seed=seed)


@given(correct=st.lists(st.lists(st.booleans(), min_size=1, max_size=5), max_size=6), seed=st.integers(0, 9))
def test_every_kind_labels_every_trajectory_and_keeps_the_number_of_correct_ones(
    correct: list[list[bool]], seed: int
) -> None:
    groups = step_of(*correct)
    ids = [TrajectoryId(step=3, question_id=f"q{i}", sibling=j) for i, g in enumerate(correct) for j in range(len(g))]
    true = dict(zip(ids, (is_correct for group in correct for is_correct in group), strict=True))
    assert shown(groups, "outcome", seed) == shown(groups, "none", seed) == true
    for labels in ("shuffled", "permuted"):
        found = shown(groups, labels, seed)
        assert found.keys() == true.keys()
        assert sum(found.values()) == sum(true.values())
    permuted = shown(groups, "permuted", seed)
    for i, group in enumerate(correct):
        assert sum(label for name, label in permuted.items() if name.question_id == f"q{i}") == sum(group)


def test_in_a_group_without_contrast_a_placebo_lies_where_a_permutation_cannot() -> None:
    groups = step_of(*[[False] * 5] * 20, *[[True] * 5] * 20)
    placebo, permuted = shown(groups, "shuffled"), shown(groups, "permuted")
    true = outcomes_of(groups)
    assert sum(placebo[name] != is_correct for name, is_correct in true.items()) == pytest.approx(100, abs=25)
    assert permuted == true


def test_a_placebo_says_nothing_of_the_own_outcome() -> None:
    """Right answers are shown as CORRECT as often as wrong ones are: a fifth of either, over many steps."""
    counts = {True: [0, 0], False: [0, 0]}
    for step in range(60):
        groups = step_of(*[[True, False, False, False, False]] * 20, step=step)
        labels = shown(groups, "shuffled")
        for name, is_correct in outcomes_of(groups).items():
            counts[is_correct][labels[name]] += 1
    shares = {is_correct: right / (wrong + right) for is_correct, (wrong, right) in counts.items()}
    assert shares == {True: pytest.approx(0.2, abs=0.04), False: pytest.approx(0.2, abs=0.02)}


def test_a_placebo_is_the_same_whatever_the_others_answered() -> None:
    """With as many right answers in the step, it does not matter whose they are."""
    first, second = step_of([True, False, False], [False, True, False]), step_of([False] * 3, [True, False, True])
    assert shown(first, "shuffled") == shown(second, "shuffled")


@given(seed=st.integers(0, 99), num_ranks=st.integers(1, 5))
def test_a_placebo_knows_neither_the_order_of_groups_nor_the_ranks(seed: int, num_ranks: int) -> None:
    groups = step_of(*[[j <= i % 3 for j in range(4)] for i in range(7)])
    gathered = [group for rank in range(num_ranks) for group in groups[rank::num_ranks]]
    assert shown(gathered, "shuffled", seed) == shown(groups, "shuffled", seed)
    mixed = random.Random(seed).sample(groups, len(groups))
    assert shown(mixed, "shuffled", seed) == shown(groups, "shuffled", seed)


def test_permuted_labels_are_those_of_runs_that_called_them_shuffled() -> None:
    groups = [group_of("set:train:1", [sibling < 4 for sibling in range(8)])]
    assert list(shown(groups, "permuted").values()) == [False, False, True, True, True, False, True, False]


@pytest.mark.parametrize("labels", ["shuffled", "permuted"])
def test_labels_change_with_seed_and_step(labels: Labels) -> None:
    groups = [[j < 2 for j in range(5)] for _ in range(4)]

    def pattern(step: int, seed: int) -> tuple[bool, ...]:
        return tuple(label for _, label in sorted(shown(step_of(*groups, step=step), labels, seed).items(), key=str))

    assert pattern(3, 1) == pattern(3, 1)
    assert len({pattern(3, seed) for seed in range(6)}) == 6
    assert len({pattern(step, 1) for step in range(6)}) == 6
