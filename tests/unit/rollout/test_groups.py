"""Groups as they complete: refills, early ends, failures; and never a task left behind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sdsearch.records import (
    Action,
    CollectionCounts,
    ContextSpan,
    Question,
    RolloutGroup,
    SampledSpan,
    Score,
    Trajectory,
    TrajectoryId,
    TrajectoryStatus,
)
from megatron_sdsearch.rollout.groups import GroupCollection
from megatron_sdsearch.rollout.supply import Draw, Supply

GROUP_SIZE = 3
Result = tuple[list[RolloutGroup], CollectionCounts]


def place_of(trajectory_id: TrajectoryId) -> tuple[int, int]:
    """(place, attempt), which the fakes' question ids spell out."""
    place, attempt = trajectory_id.question_id.split("#")
    return int(place), int(attempt)


def supply_of(num_groups: int, *, num_begun: int | None = None, max_refills: int = 0) -> Supply:
    def draw(place: int, attempt: int) -> Draw:
        question = Question(question_id=f"{place}#{attempt}", text="?", gold_answers=("x",))
        return Draw.of(question, step=0, group_size=GROUP_SIZE, num_before=0)

    return Supply(num_groups=num_groups, places=range(num_begun or num_groups), max_refills=max_refills, draw=draw)


class World:
    """Trajectories that take as many turns of the event loop as they are told, and end as they are told.

    Attributes:
        begun: ids in the order in which they began.
        ended: ids that came to their end.
        released: ids whose holdings were given back, whatever became of them.
    """

    def __init__(
        self,
        *,
        num_turns: Callable[[TrajectoryId], int] = lambda i: 1,
        f1: Callable[[TrajectoryId], float] = lambda i: float(i.sibling == 0),
        status: Callable[[TrajectoryId], TrajectoryStatus] = lambda i: TrajectoryStatus.ANSWERED,
        error: Callable[[TrajectoryId], Exception | None] = lambda i: None,
        release_error: Exception | None = None,
    ) -> None:
        self._num_turns, self._f1, self._status, self._error = num_turns, f1, status, error
        self._release_error = release_error
        self.begun: list[TrajectoryId] = []
        self.ended: list[TrajectoryId] = []
        self.released: list[TrajectoryId] = []

    async def roll_out(self, question: Question, trajectory_id: TrajectoryId) -> Trajectory:
        self.begun.append(trajectory_id)
        try:
            for _ in range(self._num_turns(trajectory_id)):
                await asyncio.sleep(0)
            if error := self._error(trajectory_id):
                raise error
        except asyncio.CancelledError:
            if self._release_error is not None:
                raise self._release_error from None
            raise
        finally:
            self.released.append(trajectory_id)
        self.ended.append(trajectory_id)
        prompt, answer = ContextSpan(kind="prompt", token_ids=(1,)), _span()
        return Trajectory(trajectory_id=trajectory_id, spans=(prompt, answer), status=self._status(trajectory_id))

    def collect(self, supply: Supply) -> Result:
        """Run on a loop of its own, which nothing outlives."""

        async def run() -> Result:
            collection = GroupCollection(supply, self.roll_out, self._score)
            try:
                return await collection.run()
            finally:
                assert asyncio.all_tasks() == {asyncio.current_task()}
                assert sorted(map(str, self.released)) == sorted(map(str, self.begun))

        return asyncio.run(run())

    def _score(self, trajectory: Trajectory, question: Question) -> Score:
        f1 = self._f1(trajectory.trajectory_id)
        return Score(
            f1=f1,
            em=0.0,
            reward=0.5 + trajectory.trajectory_id.sibling,  # a shaped reward always differs
            is_correct=f1 > 0,
        )


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


def test_all_trajectories_run_at_once_and_groups_are_whole_and_in_order() -> None:
    world = World(num_turns=lambda i: 10 - place_of(i)[0] - i.sibling)
    groups, counts = world.collect(supply_of(4))
    assert asked(groups) == ["0#0", "1#0", "2#0", "3#0"]
    assert [[t.trajectory_id.sibling for t in group.trajectories] for group in groups] == [[0, 1, 2]] * 4
    assert [[s.f1 for s in group.scores] for group in groups] == [[1.0, 0.0, 0.0]] * 4
    assert counts == CollectionCounts()
    assert place_of(world.ended[0])[0] == 3, "the fast ones did not wait for the slow ones"


@given(st.randoms(use_true_random=False))
def test_what_stands_at_a_place_does_not_depend_on_who_is_quick(random: Random) -> None:
    """Place p finds its contrast at attempt p; the last one never does."""
    turns: dict[TrajectoryId, int] = {}

    def num_turns(trajectory_id: TrajectoryId) -> int:
        return turns.setdefault(trajectory_id, random.randint(0, 9))

    def f1(trajectory_id: TrajectoryId) -> float:
        place, attempt = place_of(trajectory_id)
        return float(attempt == place and trajectory_id.sibling == 1)

    groups, counts = World(num_turns=num_turns, f1=f1).collect(supply_of(5, max_refills=3))
    assert asked(groups) == ["0#0", "1#1", "2#2", "3#3", "4#3"]
    assert counts == CollectionCounts(num_refilled=0 + 1 + 2 + 3 + 3)


@pytest.mark.parametrize("f1", [0.0, 0.7])
@pytest.mark.parametrize("max_refills", [0, 1, 4])
def test_refills_are_bounded_and_the_last_group_stays(f1: float, max_refills: int) -> None:
    world = World(f1=lambda i: f1)  # all wrong or all right, while rewards differ: F1 decides
    groups, counts = world.collect(supply_of(2, max_refills=max_refills))
    assert asked(groups) == [f"0#{max_refills}", f"1#{max_refills}"]
    assert counts.num_refilled == 2 * max_refills
    assert len(world.begun) == 2 * (max_refills + 1) * GROUP_SIZE


def test_a_sibling_lost_to_a_failed_search_is_neither_right_nor_wrong() -> None:
    """Without it place 0 is all right and place 1 has a contrast; place 2 has nobody left at first."""
    lost = {"0#0": (1, 2), "1#0": (2,), "2#0": (0, 1, 2)}

    def status(i: TrajectoryId) -> TrajectoryStatus:
        is_lost = i.sibling in lost.get(i.question_id, ())
        return TrajectoryStatus.RETRIEVAL_FAILED if is_lost else TrajectoryStatus.ANSWERED

    groups, counts = World(status=status).collect(supply_of(3, max_refills=1))
    assert asked(groups) == ["0#1", "1#0", "2#1"]
    assert counts.num_refilled == 2


def test_over_sampling_keeps_who_comes_first_and_ends_the_rest() -> None:
    slow = {0: 50, 3: 60}
    world = World(num_turns=lambda i: slow.get(place_of(i)[0], 5 - i.sibling))
    groups, counts = world.collect(supply_of(3, num_begun=5))
    assert asked(groups) == ["1#0", "2#0", "4#0"]
    assert all(len(group.trajectories) == GROUP_SIZE for group in groups)
    assert counts == CollectionCounts(num_abandoned=2)
    assert {place_of(i)[0] for i in world.begun} == set(range(5))
    assert {place_of(i)[0] for i in world.ended} == {1, 2, 4}


def test_a_group_with_one_sibling_missing_is_no_group() -> None:
    world = World(num_turns=lambda i: 100 if (place_of(i)[0], i.sibling) == (0, 2) else 1)
    groups, _ = world.collect(supply_of(1, num_begun=2))
    assert asked(groups) == ["1#0"]
    assert len([i for i in world.ended if place_of(i)[0] == 0]) == 2


def test_groups_of_the_same_turn_count_from_the_lowest_place() -> None:
    groups, counts = World().collect(supply_of(2, num_begun=6))
    assert asked(groups) == ["0#0", "1#0"]
    assert counts.num_abandoned == 4


def test_a_place_that_refills_may_be_overtaken() -> None:
    world = World(f1=lambda i: float(place_of(i) != (0, 0) and i.sibling == 0))
    groups, counts = world.collect(supply_of(1, num_begun=2, max_refills=5))
    assert asked(groups) == ["1#0"]
    assert counts == CollectionCounts(num_refilled=1, num_abandoned=1)


def test_no_groups_are_wanted() -> None:
    assert World().collect(supply_of(0)) == ([], CollectionCounts())


@pytest.mark.parametrize("turns", [0, 1, 7])
@pytest.mark.parametrize("attempt", [0, 1])
def test_a_failure_ends_all_others_and_comes_out_as_it_is(turns: int, attempt: int) -> None:
    error = ZeroDivisionError("a bug")
    culprit = TrajectoryId(step=0, question_id=f"1#{attempt}", sibling=2)
    world = World(
        num_turns=lambda i: turns if i == culprit else 3 if place_of(i) == (1, 0) else 1000,
        f1=lambda i: 0.0,
        error=lambda i: error if i == culprit else None,
    )
    with pytest.raises(ZeroDivisionError) as caught:
        world.collect(supply_of(3, num_begun=4, max_refills=2))
    assert caught.value is error
    assert all(place_of(i) == (1, 0) for i in world.ended)


def test_a_failure_beside_the_last_wanted_group_is_heard() -> None:
    error = ZeroDivisionError("a bug")
    world = World(error=lambda i: error if place_of(i)[0] == 3 else None)
    with pytest.raises(ZeroDivisionError) as caught:
        world.collect(supply_of(2, num_begun=4))
    assert caught.value is error


def test_what_breaks_while_it_is_given_up_is_heard() -> None:
    error = OSError("the engine went away")
    world = World(num_turns=lambda i: 1 + 99 * place_of(i)[0], release_error=error)
    with pytest.raises(OSError, match="went away") as caught:
        world.collect(supply_of(1, num_begun=2))
    assert caught.value is error
