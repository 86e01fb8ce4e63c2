"""The tasks behind groups: refills, order, failures; and never a task left behind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import megatron_sdsearch.rollout.collector
from megatron_sdsearch.config import parse_config
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
from megatron_sdsearch.rollout.collector import Collected, RolloutCollector
from megatron_sdsearch.rollout.requests import GroupRequest, Slot
from megatron_sdsearch.tokenization.renderer import Renderer
from tests.unit.fakes import DictRetriever, ScriptedEngine

GROUP_SIZE = 3
CONFIG = parse_config(
    {
        "run_dir": "run",
        "model": {"hf_dir": "model"},
        "data": {"train": "train.jsonl", "prompt_profile": "plain"},
        "retrieval": {"corpus": "corpus.jsonl"},
    }
)
Collect = Callable[["ScriptedEpisodes", Sequence[Slot]], Collected]


def slot_of(trajectory_id: TrajectoryId) -> tuple[int, int]:
    """(slot, attempt), which the fakes' question ids spell out."""
    slot, attempt = trajectory_id.question_id.split("#")
    return int(slot), int(attempt)


def make_slots(num_slots: int, *, max_refills: int = 0) -> list[Slot]:
    def request(slot: int, attempt: int) -> GroupRequest:
        question = Question(question_id=f"{slot}#{attempt}", text="?", gold_answers=("x",))
        ids = (TrajectoryId(step=0, question_id=question.question_id, sibling=s) for s in range(GROUP_SIZE))
        return GroupRequest(question=question, trajectory_ids=tuple(ids))

    return [tuple(request(slot, attempt) for attempt in range(max_refills + 1)) for slot in range(num_slots)]


class ScriptedEpisodes:
    """Trajectories that take a given number of turns of the event loop, and end as they are scripted.

    Attributes:
        begun: ids in the order in which they began.
        ended: ids that came to their end.
        released: ids whose holdings were given back, however they ended.
    """

    def __init__(
        self,
        *,
        num_turns: Callable[[TrajectoryId], int] = lambda i: 1,
        f1: Callable[[TrajectoryId], float] = lambda i: float(i.sibling == 0),
        status: Callable[[TrajectoryId], TrajectoryStatus] = lambda i: TrajectoryStatus.ANSWERED,
        error: Callable[[TrajectoryId], Exception | None] = lambda i: None,
    ) -> None:
        self._num_turns, self._f1, self._status, self._error = num_turns, f1, status, error
        self.begun: list[TrajectoryId] = []
        self.ended: list[TrajectoryId] = []
        self.released: list[TrajectoryId] = []

    async def run(self, question: Question, trajectory_id: TrajectoryId, **sampling: Any) -> Trajectory:
        self.begun.append(trajectory_id)
        try:
            for _ in range(self._num_turns(trajectory_id)):
                await asyncio.sleep(0)
            if error := self._error(trajectory_id):
                raise error
        finally:
            self.released.append(trajectory_id)
        self.ended.append(trajectory_id)
        prompt, answer = ContextSpan(kind="prompt", token_ids=(1,)), _span()
        return Trajectory(trajectory_id=trajectory_id, spans=(prompt, answer), status=self._status(trajectory_id))

    def score(self, trajectory: Trajectory, *_: object) -> Score:
        f1 = self._f1(trajectory.trajectory_id)
        reward = 0.5 + trajectory.trajectory_id.sibling  # a shaped reward always differs
        return Score(f1=f1, em=0.0, reward=reward, is_correct=f1 > 0)


@pytest.fixture
def collect(renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Collect]:
    collector = RolloutCollector(ScriptedEngine(renderer, []), DictRetriever(), renderer, CONFIG)

    async def num_tasks() -> int:
        return len(asyncio.all_tasks())

    def collect(episodes: ScriptedEpisodes, slots: Sequence[Slot]) -> Collected:
        monkeypatch.setattr(collector, "_episodes", episodes)
        monkeypatch.setattr(megatron_sdsearch.rollout.collector, "score_trajectory", episodes.score)
        try:
            return collector.collect(slots, policy_version=0)
        finally:
            assert collector.run(num_tasks()) == 1, "its own: no other outlives the call"
            assert sorted(map(str, episodes.released)) == sorted(map(str, episodes.begun))

    yield collect
    collector.close()


def _span() -> SampledSpan:
    return SampledSpan(
        token_ids=(2,),
        logprobs=(-1.0,),
        text="x",
        action=Action.ANSWER,
        argument="x",
        query_positions=(),
        policy_version=0,
        finish_reason="eos",
    )


def asked(groups: Sequence[RolloutGroup]) -> list[str]:
    return [group.question.question_id for group in groups]


def test_all_trajectories_run_at_once_and_groups_are_whole_and_in_order(collect: Collect) -> None:
    episodes = ScriptedEpisodes(num_turns=lambda i: 10 - slot_of(i)[0] - i.sibling)
    collected = collect(episodes, make_slots(4))
    assert asked(collected.groups) == ["0#0", "1#0", "2#0", "3#0"]
    assert [[t.trajectory_id.sibling for t in group.trajectories] for group in collected.groups] == [[0, 1, 2]] * 4
    assert [[s.f1 for s in group.scores] for group in collected.groups] == [[1.0, 0.0, 0.0]] * 4
    assert collected.num_refilled == 0
    assert slot_of(episodes.ended[0])[0] == 3, "the fast ones did not wait for the slow ones"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # nothing of one example is left to the next
@given(random=st.randoms(use_true_random=False))
def test_the_group_of_a_slot_does_not_depend_on_which_is_quick(collect: Collect, random: Random) -> None:
    """Slot s finds its contrast at attempt s; the last one never does."""
    turns: dict[TrajectoryId, int] = {}

    def num_turns(trajectory_id: TrajectoryId) -> int:
        return turns.setdefault(trajectory_id, random.randint(0, 9))

    def f1(trajectory_id: TrajectoryId) -> float:
        slot, attempt = slot_of(trajectory_id)
        return float(attempt == slot and trajectory_id.sibling == 1)

    collected = collect(ScriptedEpisodes(num_turns=num_turns, f1=f1), make_slots(5, max_refills=3))
    assert asked(collected.groups) == ["0#0", "1#1", "2#2", "3#3", "4#3"]
    assert collected.num_refilled == 0 + 1 + 2 + 3 + 3


@pytest.mark.parametrize("f1", [0.0, 0.7])
@pytest.mark.parametrize("max_refills", [0, 1, 4])
def test_refills_are_bounded_and_the_last_group_stays(collect: Collect, f1: float, max_refills: int) -> None:
    episodes = ScriptedEpisodes(f1=lambda i: f1)  # all wrong or all right, while rewards differ: F1 decides
    collected = collect(episodes, make_slots(2, max_refills=max_refills))
    assert asked(collected.groups) == [f"0#{max_refills}", f"1#{max_refills}"]
    assert collected.num_refilled == 2 * max_refills
    assert len(episodes.begun) == 2 * (max_refills + 1) * GROUP_SIZE


def test_a_sibling_lost_to_a_failed_search_is_neither_right_nor_wrong(collect: Collect) -> None:
    """Without it slot 0 is all right and slot 1 has a contrast; slot 2 has no sibling left at first."""
    lost = {"0#0": (1, 2), "1#0": (2,), "2#0": (0, 1, 2)}

    def status(i: TrajectoryId) -> TrajectoryStatus:
        is_lost = i.sibling in lost.get(i.question_id, ())
        return TrajectoryStatus.RETRIEVAL_FAILED if is_lost else TrajectoryStatus.ANSWERED

    collected = collect(ScriptedEpisodes(status=status), make_slots(3, max_refills=1))
    assert asked(collected.groups) == ["0#1", "1#0", "2#1"]
    assert collected.num_refilled == 2


def test_no_slots_give_no_groups(collect: Collect) -> None:
    collected = collect(ScriptedEpisodes(), [])
    assert (collected.groups, collected.num_refilled) == ((), 0)


@pytest.mark.parametrize("turns", [0, 1, 7])
@pytest.mark.parametrize("attempt", [0, 1])
def test_a_failure_ends_all_others_and_comes_out_as_it_is(collect: Collect, turns: int, attempt: int) -> None:
    error = ZeroDivisionError("a bug")
    culprit = TrajectoryId(step=0, question_id=f"1#{attempt}", sibling=2)
    episodes = ScriptedEpisodes(
        num_turns=lambda i: turns if i == culprit else 3 if slot_of(i) == (1, 0) else 1000,
        f1=lambda i: 0.0,
        error=lambda i: error if i == culprit else None,
    )
    with pytest.raises(ZeroDivisionError) as caught:
        collect(episodes, make_slots(4, max_refills=2))
    assert caught.value is error
    assert all(slot_of(i) == (1, 0) for i in episodes.ended)
