"""Group-relative advantages."""

import math
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sdsearch.batching.advantages import group_advantages
from megatron_sdsearch.records import (
    Action,
    ContextSpan,
    Question,
    RolloutGroup,
    SampledSpan,
    Score,
    Trajectory,
    TrajectoryId,
    TrajectoryStatus,
)


def group_of(rewards: Sequence[float], failed: Sequence[int] = ()) -> RolloutGroup:
    answer = SampledSpan(
        token_ids=(2,),
        logprobs=(-1.0,),
        text="x",
        action=Action.INVALID,
        argument="",
        query_positions=(),
        policy_version=0,
        finish_reason="eos",
    )
    return RolloutGroup(
        question=Question(question_id="q", text="q", gold_answers=("a",)),
        trajectories=tuple(
            Trajectory(
                trajectory_id=TrajectoryId(step=0, question_id="q", sibling=i),
                spans=(ContextSpan(kind="prompt", token_ids=(1,)), answer),
                status=TrajectoryStatus.ABORTED if i in failed else TrajectoryStatus.ANSWERED,
            )
            for i in range(len(rewards))
        ),
        scores=tuple(Score(f1=reward, em=0.0, reward=reward, is_correct=reward > 0) for reward in rewards),
    )


def test_the_published_formula_by_hand() -> None:
    # mean 0.25, unbiased variance ((0.75)^2 + 3 * 0.25^2) / 3 = 0.25, deviation 0.5
    advantages = group_advantages(group_of([1.0, 0.0, 0.0, 0.0]), normalize_std=True)
    assert advantages == pytest.approx([0.75 / 0.500001] + [-0.25 / 0.500001] * 3, abs=1e-12)


def test_without_normalisation_only_the_mean_goes() -> None:
    assert group_advantages(group_of([1.0, 0.0, 0.0, 0.0]), normalize_std=False) == [0.75, -0.25, -0.25, -0.25]


@pytest.mark.parametrize("normalize_std", [True, False])
def test_equal_rewards_give_exactly_zero(normalize_std: bool) -> None:
    # Three times 0.1 has a mean of 0.10000000000000002 by naive summation: it would train on 1e-17 / 1e-6.
    assert group_advantages(group_of([0.1] * 3), normalize_std) == [0.0] * 3


def test_untrainable_trajectories_neither_count_nor_learn() -> None:
    advantages = group_advantages(group_of([1.0, 0.0, 0.5], failed=[2]), normalize_std=False)
    assert advantages == [0.5, -0.5, 0.0]


def test_a_single_trainable_trajectory_has_nothing_to_compare_with() -> None:
    assert group_advantages(group_of([1.0, 0.0], failed=[1]), normalize_std=True) == [0.0, 0.0]


def test_an_equal_remainder_is_zero_although_the_group_differs() -> None:
    assert group_advantages(group_of([1.0, 0.0, 0.0], failed=[0]), normalize_std=True) == [0.0] * 3


@settings(deadline=None)  # a busy machine is no failure
@given(st.lists(st.floats(0, 1), min_size=2, max_size=8))
def test_advantages_sum_to_zero_and_keep_the_order_of_rewards(rewards: list[float]) -> None:
    advantages = group_advantages(group_of(rewards), normalize_std=True)
    assert math.fsum(advantages) == pytest.approx(0.0, abs=1e-9)
    assert all(
        (a - b) * (x - y) >= 0
        for a, x in zip(rewards, advantages, strict=True)
        for b, y in zip(rewards, advantages, strict=True)
    )
