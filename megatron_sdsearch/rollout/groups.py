"""Groups of a step as they complete: begun together, refilled one by one, ended when enough are there.

Owns the tasks. Each trajectory runs on its own, a group is complete when its last sibling is, and nothing of a group
that is not complete ever leaves. What a trajectory does is ``episode.py``'s, what is asked is ``supply.py``'s.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Collection, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from megatron_sdsearch.data.scoring import group_class
from megatron_sdsearch.records import CollectionCounts, Question, RolloutGroup, Score, Trajectory, TrajectoryId
from megatron_sdsearch.rollout.supply import Draw, Supply

T = TypeVar("T")
RollOut = Callable[[Question, TrajectoryId], Coroutine[Any, Any, Trajectory]]
ScoreOne = Callable[[Trajectory, Question], Score]


class GroupCollection:
    """Rolls out one supply, once.

    Args:
        supply: what is asked, and how much of it is wanted.
        roll_out: one trajectory; releases what it holds when it is cancelled.
        score: one trajectory.
    """

    def __init__(self, supply: Supply, roll_out: RollOut, score: ScoreOne) -> None:
        self._supply = supply
        self._roll_out = roll_out
        self._score = score
        self._num_refilled = 0

    async def run(self) -> tuple[list[RolloutGroup], CollectionCounts]:
        """The first ``num_groups`` groups to complete, in order of their places; the others are cancelled.

        Of groups that complete in the same turn of the event loop the lower places come first.

        Raises:
            Exception: whatever a trajectory raised, as it is, after all others have ended.
        """
        wanted, places = self._supply.num_groups, self._supply.places
        complete: dict[int, RolloutGroup] = {}
        async with aclosing(_as_completed(places, self._fill)) as stream:
            async for place, group in stream:
                complete[place] = group
                if len(complete) == wanted:
                    break
        counts = CollectionCounts(num_refilled=self._num_refilled, num_abandoned=len(places) - len(complete))
        return [complete[place] for place in sorted(complete)], counts

    async def _fill(self, place: int) -> RolloutGroup:
        """The first group at a place with a contrast, or the last one there may be.

        Contrast is what training would see: two trainable siblings, one right and one wrong by F1, never by the shaped
        reward. A trajectory lost to a failed search is neither, and a group of such alone has no contrast.
        """
        for attempt in range(self._supply.max_refills):
            group = await self._group(self._supply.draw(place, attempt))
            if group_class(group) == "mixed":
                return group
            self._num_refilled += 1
        return await self._group(self._supply.draw(place, self._supply.max_refills))

    async def _group(self, draw: Draw) -> RolloutGroup:
        question = draw.question
        trajectories = await _all([self._roll_out(question, trajectory_id) for trajectory_id in draw.trajectory_ids])
        scores = tuple(self._score(trajectory, question) for trajectory in trajectories)
        return RolloutGroup(question=question, trajectories=tuple(trajectories), scores=scores)


async def _as_completed(
    places: Sequence[int], work: Callable[[int], Coroutine[Any, Any, T]]
) -> AsyncGenerator[tuple[int, T], None]:
    """(place, result) as they come; whatever still runs when the caller leaves is cancelled and waited for."""
    place_of = {asyncio.create_task(work(place)): place for place in places}
    pending = set(place_of)
    try:
        while pending:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=place_of.__getitem__):
                yield place_of[task], task.result()
    except GeneratorExit:
        # The caller has enough. What broke beside the last result, or breaks on its way out, is heard all the same.
        for failure in await _end(place_of):
            raise failure from None
        raise
    finally:
        await _end(place_of)


async def _all(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All results in order; when one raises, the others end and its exception comes out as it is."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await _end(tasks)


async def _end(tasks: Collection[asyncio.Task[Any]]) -> list[Exception]:
    """Cancel what still runs and see every task to its end; returns what was raised, cancellation aside."""
    for task in tasks:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    return [result for result in results if isinstance(result, Exception)]
