"""What stands in which slot, and which ranks roll out: exact, no id twice, and independent of the number of ranks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.parallel_state import RankGenerator

from megatron_sdsearch.config import RolloutConfig, RunConfig, parse_config
from megatron_sdsearch.data.questions import QuestionSampler
from megatron_sdsearch.records import Question
from megatron_sdsearch.rollout.requests import Slot, one_group_each, plan_step, rollout_ranks

GROUP_SIZE = 2
SIZES = st.integers(1, 20).flatmap(lambda size: st.tuples(st.just(size), st.integers(1, size)))
STEPS, REFILLS = st.integers(0, 9), st.integers(0, 3)


def sampler_of(size: int, per_step: int) -> QuestionSampler:
    pool = [Question(question_id=f"q{i}", text="?", gold_answers=("x",)) for i in range(size)]
    return QuestionSampler(pool, seed=1, questions_per_step=per_step)


def plan(sizes: tuple[int, int], step: int, max_refills: int) -> list[Slot]:
    return plan_step(sampler_of(*sizes), RolloutConfig(group_size=GROUP_SIZE, max_refills=max_refills), step=step)


@given(SIZES, STEPS, REFILLS)
def test_a_slot_begins_with_its_question_of_the_batch(sizes: tuple[int, int], step: int, max_refills: int) -> None:
    slots = plan(sizes, step, max_refills)
    assert [slot[0].question for slot in slots] == list(sampler_of(*sizes).batch(step))
    assert all(len(slot) == max_refills + 1 for slot in slots)
    assert all(len(request.trajectory_ids) == GROUP_SIZE for slot in slots for request in slot)
    assert slots == plan(sizes, step, max_refills), "a pure function"


@given(SIZES, STEPS, REFILLS)
def test_no_trajectory_id_is_used_twice(sizes: tuple[int, int], step: int, max_refills: int) -> None:
    ids = [i for slot in plan(sizes, step, max_refills) for request in slot for i in request.trajectory_ids]
    assert len(ids) == len(set(ids))
    assert {i.step for i in ids} == {step}


@given(SIZES, STEPS, REFILLS)
def test_refills_are_not_in_the_batch_while_there_are_other_questions(
    sizes: tuple[int, int], step: int, max_refills: int
) -> None:
    size, per_step = sizes
    batch = {question.question_id for question in sampler_of(*sizes).batch(step)}
    for slot in plan(sizes, step, max_refills):
        for request in slot[1:]:
            assert (request.question.question_id in batch) == (size == per_step)


def test_a_small_pool_goes_round_and_numbers_siblings_on() -> None:
    for slot in plan((2, 2), 0, 3):
        firsts = [request.trajectory_ids[0] for request in slot]
        assert firsts[0].sibling == 0
        assert len(set(firsts)) == 4


def test_one_group_each_asks_what_it_is_given() -> None:
    one, other = (Question(question_id=name, text="?", gold_answers=("x",)) for name in "ab")
    slots = one_group_each([one, other, one], step=3, group_size=2)
    ids = [[str(i) for i in request.trajectory_ids] for slot in slots for request in slot]
    assert ids == [["4/a/0", "4/a/1"], ["4/b/0", "4/b/1"], ["4/a/2", "4/a/3"]], "users count steps from 1"


def _config(engine: str, tensor: int, pipeline: int) -> RunConfig:
    sizes = {"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline}
    return parse_config(
        {
            "run_dir": "run",
            "model": {"hf_dir": "model"},
            "data": {"train": "train.jsonl"},
            "retrieval": {"corpus": "corpus.jsonl"},
            "rollout": {"engine": engine, "sglang": {"urls": ["http://h:1"]} if engine == "sglang" else {}},
            "parallel": sizes,
        }
    )


@pytest.mark.parametrize(("tensor", "pipeline", "data"), [(1, 1, 4), (2, 1, 1), (2, 2, 1), (2, 2, 3), (4, 2, 2)])
def test_with_servers_the_first_rank_of_each_replica_rolls_out(tensor: int, pipeline: int, data: int) -> None:
    world_size = tensor * pipeline * data
    replicas = RankGenerator(tp=tensor, ep=1, dp=data, pp=pipeline, cp=1, order="tp-cp-ep-dp-pp").get_ranks("tp-pp")
    assert len(replicas) == data
    assert list(rollout_ranks(_config("sglang", tensor, pipeline), world_size)) == sorted(map(min, replicas))
    assert rollout_ranks(_config("embedded", tensor, pipeline), world_size) == range(world_size)
