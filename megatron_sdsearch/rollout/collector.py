"""Rolls out all trajectories of a step concurrently and returns complete groups in the order of their slots.

Owns the event loop of engine and retriever, and refills groups without contrast. Each trajectory is a separate task
(``episode.py``). ``requests.py`` chooses the questions, ``data/scoring.py`` scores the trajectories.
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
    """Rollouts of one rank.

    Attributes:
        groups: complete, in the order of their slots.
        num_refilled: groups without contrast that were discarded for another question's.
        lost: trajectories lost to an outage, including those of discarded groups.
    """

    groups: tuple[RolloutGroup, ...]
    num_refilled: int
    lost: LostTrajectories


class RolloutCollector:
    """Runs episodes on its own event loop.

    Args:
        engine: samples; closed by ``close``.
        retriever: searches; closed by ``close``.
        renderer: of the engine's tokenizer.
        config: ``seed``, ``data.prompt_profile``, ``rollout``, ``retrieval.top_k``, ``hindsight.rho`` and
            ``objective.reward`` are read.
        runner: of the event loop on which the retriever was opened, if that matters; closed by ``close``.

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
            raise ConfigError("retrieval", "missing, but rollouts search", "set retrieval")
        profile = get_profile(config.data.prompt_profile)
        top_k, seed = config.retrieval.top_k, config.seed
        self._episodes = EpisodeRunner(engine, retriever, renderer, profile, config.rollout, top_k=top_k, seed=seed)
        self._engine = engine
        self.retriever = retriever
        self._config = config
        self._runner = runner or asyncio.Runner()
        self._is_closed = False

    def collect(self, slots: Sequence[Slot], *, policy_version: int, is_greedy: bool = False) -> Collected:
        """Roll out one group per slot.

        Args:
            slots: the requests of each.
            policy_version: of the weights from which every token must be sampled.
            is_greedy: sample at temperature 0 instead of ``rollout.temperature`` and ``rollout.top_p``.

        Raises:
            RetrievalDownError: the search engine is down; single failed searches are only counted.
            EngineError: the engine failed, or sampled from another policy version.
            Exception: any other error of a trajectory, after all others have ended.
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
        """Run other work that needs the engine or the retriever, on their event loop."""
        return self._runner.run(work)

    def close(self) -> None:
        """Close engine, retriever and the event loop. A second call does nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        with self._runner:
            try:
                self._runner.run(self._engine.close())
            finally:
                self._runner.run(self.retriever.close())

    async def _fill(self, slot: Slot, is_greedy: bool, lost: LostTrajectories) -> tuple[RolloutGroup, int]:
        """Return the slot's first group with contrast, else its last one, and the number of discarded groups.

        Contrast means one right and one wrong trainable sibling by F1, never by the shaped reward. A trajectory lost to
        a failed search is neither.
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
    """Return all results in order; if one raises, cancel the others and wait for them first."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
