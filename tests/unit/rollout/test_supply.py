"""Which questions stand at which places: exact shares, no id twice, and nothing that depends on who asks."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sdsearch.config import RolloutConfig
from megatron_sdsearch.data.questions import QuestionSampler
from megatron_sdsearch.records import Question
from megatron_sdsearch.rollout.supply import Draw, Supply, exactly, supply_of

GROUP_SIZE = 2
SIZES = st.integers(1, 20).flatmap(lambda size: st.tuples(st.just(size), st.integers(1, size)))
STEPS, WORLDS, REFILLS, OVERSAMPLES = st.integers(0, 9), st.integers(1, 4), st.integers(0, 3), st.floats(1.0, 3.0)


def sampler_of(size: int, per_step: int) -> QuestionSampler:
    pool = [Question(question_id=f"q{i}", text="?", gold_answers=("x",)) for i in range(size)]
    return QuestionSampler(pool, seed=1, questions_per_step=per_step)


def supplies(sizes: tuple[int, int], step: int, world_size: int, **rollout: Any) -> list[Supply]:
    config = RolloutConfig(group_size=GROUP_SIZE, **rollout)
    sampler = sampler_of(*sizes)
    return [supply_of(sampler, config, step=step, rank=rank, world_size=world_size) for rank in range(world_size)]


def draws(supply: Supply) -> dict[tuple[int, int], Draw]:
    """Everything that may ever be drawn."""
    attempts = range(supply.max_refills + 1)
    return {(place, attempt): supply.draw(place, attempt) for place in supply.places for attempt in attempts}


@given(SIZES, STEPS, WORLDS, REFILLS)
def test_any_number_of_processes_asks_what_one_asks(
    sizes: tuple[int, int], step: int, world_size: int, max_refills: int
) -> None:
    (alone,) = supplies(sizes, step, 1, max_refills=max_refills)
    shares = supplies(sizes, step, world_size, max_refills=max_refills)
    together = [item for share in shares for item in draws(share).items()]
    assert len(together) == len(dict(together)), "no place belongs to two"
    assert dict(together) == draws(alone)
    assert [alone.draw(place, 0).question for place in alone.places] == list(sampler_of(*sizes).batch(step))


@given(SIZES, STEPS, WORLDS, REFILLS, OVERSAMPLES)
def test_no_trajectory_id_is_used_twice(
    sizes: tuple[int, int], step: int, world_size: int, max_refills: int, oversample: float
) -> None:
    shares = supplies(sizes, step, world_size, max_refills=max_refills, oversample=oversample)
    ids = [i for share in shares for draw in draws(share).values() for i in draw.trajectory_ids]
    assert len(ids) == len(set(ids))
    assert {i.step for i in ids} == {step}


@given(SIZES, STEPS, WORLDS, REFILLS, OVERSAMPLES)
def test_what_is_asked_beside_the_batch_is_not_in_it_while_there_are_others(
    sizes: tuple[int, int], step: int, world_size: int, max_refills: int, oversample: float
) -> None:
    size, per_step = sizes
    batch = {question.question_id for question in sampler_of(*sizes).batch(step)}
    for share in supplies(sizes, step, world_size, max_refills=max_refills, oversample=oversample):
        for (place, attempt), draw in draws(share).items():
            is_of_batch = place < per_step and attempt == 0
            assert (draw.question.question_id in batch) == (is_of_batch or size == per_step)


@given(SIZES, WORLDS, OVERSAMPLES)
def test_a_share_is_exact_and_over_sampling_begins_so_many_times_as_much(
    sizes: tuple[int, int], world_size: int, oversample: float
) -> None:
    shares = supplies(sizes, 0, world_size, oversample=oversample)
    assert sum(share.num_groups for share in shares) == sizes[1]
    for share in shares:
        assert oversample * share.num_groups - 1e-9 <= len(share.places) < oversample * share.num_groups + 1
        assert sum(place < sizes[1] for place in share.places) == share.num_groups
        assert list(share.places) == sorted(share.places)


@pytest.mark.parametrize(("oversample", "num_begun"), [(1.0, 10), (1.1, 11), (1.11, 12), (2.0, 20)])
def test_rounding_up_begins_no_group_too_many(oversample: float, num_begun: int) -> None:
    (share,) = supplies((30, 10), 0, 1, oversample=oversample)
    assert (share.num_groups, len(share.places)) == (10, num_begun)


def test_a_small_pool_goes_round_and_numbers_siblings_on() -> None:
    (supply,) = supplies((2, 2), 0, 1, max_refills=3)
    for place in supply.places:
        firsts = [supply.draw(place, attempt).trajectory_ids[0] for attempt in range(4)]
        assert firsts[0].sibling == 0
        assert len(set(firsts)) == 4


def test_exactly_asks_what_it_is_given() -> None:
    one, other = (Question(question_id=name, text="?", gold_answers=("x",)) for name in "ab")
    supply = exactly([one, other, one], step=3, group_size=2)
    assert (supply.num_groups, list(supply.places), supply.max_refills) == (3, [0, 1, 2], 0)
    ids = [[str(i) for i in supply.draw(place, 0).trajectory_ids] for place in supply.places]
    assert ids == [["3/a/0", "3/a/1"], ["3/b/0", "3/b/1"], ["3/a/2", "3/a/3"]]
