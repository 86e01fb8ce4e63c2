"""All trajectories of a step at once, as complete groups in the order of their slots.

Owns the event loop on which engine and retriever live, and the refills of groups without contrast. Each trajectory is
a task of its own (``episode.py``); a group is complete when its last sibling is, and nothing of an incomplete group
leaves. What is asked is ``requests.py``'s, what a score means ``data/scoring.py``'s.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from megatron_sdsearch.config import RunConfig
from megatron_sdsearch.data.prompts import get_profile
from megatron_sdsearch.data.scoring import group_class, score_trajectory
from megatron_sdsearch.errors import ConfigError, EngineError
from megatron_sdsearch.records import RolloutGroup
from megatron_sdsearch.retrieval.base import Retriever
from megatron_sdsearch.rollout.engine import Engine
from megatron_sdsearch.rollout.episode import EpisodeRunner
from megatron_sdsearch.rollout.lost import LostTrajectories
from megatron_sdsearch.rollout.requests import GroupRequest, Slot
from megatron_sdsearch.tokenization.renderer import Renderer

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """What one rank has rolled out.

    Attributes:
        groups: complete, in the order of their slots.
        num_refilled: groups without contrast that gave way to another question, thrown away whole.
        lost: trajectories of these groups, and of those thrown away, that say nothing of the policy.
    """

    groups: tuple[RolloutGroup, ...]
    num_refilled: int
    lost: LostTrajectories


class RolloutCollector:
    """Runs episodes on an event loop of its own, which lives as long as the collector.

    Args:
        engine: belongs to the collector from now on, as does ``retriever``: ``close`` closes both.
        retriever: searches.
        renderer: of the engine's tokenizer.
        config: ``seed``, ``data.prompt_profile``, ``rollout``, ``retrieval.top_k``, ``hindsight.rho`` and
            ``objective.reward`` are read.
        runner: of the event loop on which the retriever was opened, where that matters; the collector's from now on.

    Raises:
        ConfigError: there is no retrieval section, or an observation cannot hold its tags.
    """

    def __init__(
        self,
        engine: Engine,
        retriever: Retriever,
        renderer: Renderer,
        config: RunConfig,
        runner: asyncio.Runner | None = None,
    ) -> None:
        if config.retrieval is None:
            raise ConfigError("retrieval", "missing, and rollouts search", "set retrieval")
        profile = get_profile(config.data.prompt_profile)
        top_k, seed = config.retrieval.top_k, config.seed
        self._episodes = EpisodeRunner(engine, retriever, renderer, profile, config.rollout, top_k=top_k, seed=seed)
        self._engine = engine
        self._retriever = retriever
        self._config = config
        self._runner = runner or asyncio.Runner()
        self._is_closed = False

    def collect(self, slots: Sequence[Slot], *, policy_version: int, is_greedy: bool = False) -> Collected:
        """Roll out one group per slot.

        Args:
            slots: the requests of each.
            policy_version: of the weights that every token must have been sampled from.
            is_greedy: sample at temperature 0 instead of ``rollout.temperature`` and ``rollout.top_p``.

        Raises:
            RetrievalDownError: the search engine is down. A single search that failed is counted instead.
            EngineError: the engine failed, or serves another policy version.
            Exception: whatever else a trajectory raised, as it is, after all others have ended.
        """
        lost = LostTrajectories()
        try:
            filled = self.run(_run_all([self._fill(slot, is_greedy, lost) for slot in slots]))
        finally:
            lost.log_failed_searches()
        groups = tuple(group for group, _ in filled)
        versions = {s.policy_version for g in groups for t in g.trajectories for s in t.sampled_spans}
        if versions - {policy_version}:
            raise EngineError(f"sampled from policy versions {sorted(versions)} instead of {policy_version}")
        return Collected(groups=groups, num_refilled=sum(number for _, number in filled), lost=lost)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Do other work that needs the engine or the retriever, on the loop where they live."""
        return self._runner.run(work)

    def close(self) -> None:
        """Close engine, retriever and the event loop. A second call does nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        try:
            self._runner.run(self._engine.close())
        finally:
            try:
                self._runner.run(self._retriever.close())
            finally:
                self._runner.close()

    async def _fill(self, slot: Slot, is_greedy: bool, lost: LostTrajectories) -> tuple[RolloutGroup, int]:
        """The slot's first group with a contrast, else its last one; and how many groups gave way to it.

        Contrast is what training would see: two trainable siblings, one right and one wrong by F1, never by the shaped
        reward. A trajectory lost to a failed search is neither, and a group of such alone has no contrast.
        """
        groups: list[RolloutGroup] = []
        for request in slot:
            groups.append(await self._roll_out(request, is_greedy, lost))
            if group_class(groups[-1]) == "mixed":
                break
        return groups[-1], len(groups) - 1

    async def _roll_out(self, request: GroupRequest, is_greedy: bool, lost: LostTrajectories) -> RolloutGroup:
        rollout, question = self._config.rollout, request.question
        temperature, top_p = (0.0, 1.0) if is_greedy else (rollout.temperature, rollout.top_p)
        trajectories = await _run_all(
            [
                self._episodes.run(question, trajectory_id, temperature=temperature, top_p=top_p, lost=lost)
                for trajectory_id in request.trajectory_ids
            ]
        )
        scores = tuple(
            score_trajectory(t, question, self._config.objective.reward, self._config.hindsight.rho)
            for t in trajectories
        )
        return RolloutGroup(question=question, trajectories=tuple(trajectories), scores=scores)


async def _run_all(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All results in order; when one raises, the others are cancelled and end before its exception comes out."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
