"""All trajectories of one step at once, as complete groups in the order of their places.

Owns the event loop on which engine and retriever live, and the limit on failed searches. What is asked is
``supply.py``'s, refills and early ends are ``groups.py``'s, what one trajectory does is ``episode.py``'s, what a score
means is ``data/scoring.py``'s.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import TypeVar

from megatron_sdsearch.config import RunConfig
from megatron_sdsearch.data.prompts import get_profile
from megatron_sdsearch.data.scoring import score_trajectory
from megatron_sdsearch.errors import ConfigError, EngineError, RetrievalError
from megatron_sdsearch.records import CollectionCounts, Question, RolloutGroup, Score, Trajectory, TrajectoryId
from megatron_sdsearch.retrieval.base import Retriever
from megatron_sdsearch.rollout.engine import Engine
from megatron_sdsearch.rollout.episode import ObservationWriter, run_episode
from megatron_sdsearch.rollout.groups import GroupCollection
from megatron_sdsearch.rollout.supply import Supply, exactly
from megatron_sdsearch.tokenization.renderer import Renderer

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """One process's part of a step.

    Attributes:
        groups: complete, in the order of their places.
        counts: what it took beside them.
    """

    groups: tuple[RolloutGroup, ...]
    counts: CollectionCounts


class RolloutCollector:
    """Runs episodes on an event loop of its own, which lives as long as the collector.

    Args:
        engine: belongs to the collector from now on, as does ``retriever``: ``close`` closes both.
        retriever: searches.
        renderer: of the engine's tokenizer.
        config: ``seed``, ``data.prompt_profile``, ``rollout``, ``retrieval.top_k``, ``hindsight.rho`` and
            ``objective.reward`` are read.

    Raises:
        ConfigError: there is no retrieval section, or an observation cannot hold its tags.
    """

    def __init__(
        self,
        engine: Engine,
        retriever: Retriever,
        renderer: Renderer,
        config: RunConfig,
    ) -> None:
        if config.retrieval is None:
            raise ConfigError("retrieval", "missing, and rollouts search", "set retrieval")
        self._engine = engine
        self._retriever = retriever
        self._renderer = renderer
        self._config = config
        self._top_k = config.retrieval.top_k
        self._profile = get_profile(config.data.prompt_profile)
        ObservationWriter(renderer, self._profile, config.rollout.max_observation_tokens)  # raises before any rollout
        self._runner = asyncio.Runner()
        self._is_closed = False

    @property
    def engine(self) -> Engine:
        """The engine, for publishing weights to."""
        return self._engine

    def collect(self, supply: Supply, *, policy_version: int) -> Collected:
        """Sample the groups of a step that this process is to give.

        Args:
            supply: questions, ids, how many groups are wanted, begun and refilled.
            policy_version: which every token must have been sampled from.

        Raises:
            RetrievalError: more trajectories than ``rollout.max_failed_search_share`` were lost to failed searches, of
                all that ended, those of replaced and abandoned groups included.
            EngineError: the engine failed, or serves another policy version.
        """
        rollout = self._config.rollout
        collected = self._roll_out(supply, rollout.temperature, rollout.top_p)
        versions = {s.policy_version for g in collected.groups for t in g.trajectories for s in t.sampled_spans}
        if versions - {policy_version}:
            raise EngineError(f"sampled from policy versions {sorted(versions)} instead of {policy_version}")
        return collected

    def evaluate(self, questions: Sequence[Question], *, step: int) -> list[RolloutGroup]:
        """One greedy trajectory of every question, as groups of one; raises as ``collect`` does."""
        return list(self._roll_out(exactly(questions, step=step, group_size=1), 0.0, 1.0).groups)

    def run(self, work: Coroutine[None, None, T]) -> T:
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

    def _roll_out(self, supply: Supply, temperature: float, top_p: float) -> Collected:
        ended: list[TrajectoryId] = []
        causes: list[RetrievalError] = []

        async def roll_out(question: Question, trajectory_id: TrajectoryId) -> Trajectory:
            trajectory = await run_episode(
                question,
                trajectory_id,
                engine=self._engine,
                retriever=self._retriever,
                renderer=self._renderer,
                profile=self._profile,
                rollout=self._config.rollout,
                top_k=self._top_k,
                seed=self._config.seed,
                temperature=temperature,
                top_p=top_p,
                on_failed_search=causes.append,
            )
            ended.append(trajectory_id)
            return trajectory

        collection = GroupCollection(supply, roll_out, self._score, self._config.hindsight.rho)
        groups, counts = self._runner.run(collection.run())
        self._check_failed_searches(len(ended), causes)
        return Collected(groups=tuple(groups), counts=counts)

    def _score(self, trajectory: Trajectory, question: Question) -> Score:
        return score_trajectory(trajectory, question, self._config.objective.reward)

    def _check_failed_searches(self, num_ended: int, causes: Sequence[RetrievalError]) -> None:
        limit = self._config.rollout.max_failed_search_share
        if len(causes) > limit * num_ended:
            raise RetrievalError(
                f"{len(causes)} of {num_ended} trajectories ({len(causes) / num_ended:.0%}) were lost to failed "
                f"searches, more than rollout.max_failed_search_share = {limit:.0%}; first cause: {causes[0]}"
            ) from causes[0]
