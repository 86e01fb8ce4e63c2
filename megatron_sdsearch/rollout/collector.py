"""All trajectories of one step at once, as complete groups in question order.

Owns the event loop on which engine and retriever live, sibling numbering, and the limit on failed searches. What one
trajectory does is ``episode.py``'s; what a score means is ``data/scoring.py``'s.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from typing import TypeVar

from megatron_sdsearch.config import RunConfig
from megatron_sdsearch.data.prompts import get_profile
from megatron_sdsearch.data.scoring import score_trajectory
from megatron_sdsearch.errors import ConfigError, EngineError, RetrievalError
from megatron_sdsearch.records import Question, RolloutGroup, Trajectory, TrajectoryId, TrajectoryStatus
from megatron_sdsearch.retrieval.base import Retriever
from megatron_sdsearch.rollout.engine import Engine
from megatron_sdsearch.rollout.episode import ObservationWriter, run_episode
from megatron_sdsearch.tokenization.renderer import Renderer

T = TypeVar("T")
ProgressCallback = Callable[[int, int], None]
"""Told (num_done, num_total) after each trajectory."""


class RolloutCollector:
    """Runs episodes on an event loop of its own, which lives as long as the collector.

    Args:
        engine: belongs to the collector from now on, as does ``retriever``: ``close`` closes both.
        retriever: searches.
        renderer: of the engine's tokenizer.
        config: ``seed``, ``data.prompt_profile``, ``rollout``, ``retrieval.top_k`` and ``objective.reward`` are read.
        on_progress: optional, called from the loop.

    Raises:
        ConfigError: there is no retrieval section, or an observation cannot hold its tags.
    """

    def __init__(
        self,
        engine: Engine,
        retriever: Retriever,
        renderer: Renderer,
        config: RunConfig,
        on_progress: ProgressCallback | None = None,
    ) -> None:
        if config.retrieval is None:
            raise ConfigError("retrieval", "missing, and rollouts search", "set retrieval")
        self._engine = engine
        self._retriever = retriever
        self._renderer = renderer
        self._config = config
        self._top_k = config.retrieval.top_k
        self._profile = get_profile(config.data.prompt_profile)
        self._on_progress = on_progress
        ObservationWriter(renderer, self._profile, config.rollout.max_observation_tokens)  # raises before any rollout
        self._runner = asyncio.Runner()
        self._is_closed = False

    @property
    def engine(self) -> Engine:
        """The engine, for publishing weights to."""
        return self._engine

    def collect(self, questions: Sequence[Question], *, step: int, policy_version: int) -> list[RolloutGroup]:
        """Sample ``rollout.group_size`` trajectories of every question.

        A question that occurs twice makes two groups, whose siblings are numbered on, so that every trajectory keeps
        an id and a random stream of its own.

        Args:
            questions: this process's share of the step's batch.
            step: part of each trajectory's id.
            policy_version: which every token must have been sampled from.

        Raises:
            RetrievalError: more trajectories than ``rollout.max_failed_search_share`` were lost to failed searches.
            EngineError: the engine failed, or serves another policy version.
        """
        rollout = self._config.rollout
        groups = self._roll_out(questions, step, rollout.group_size, rollout.temperature, rollout.top_p)
        versions = {s.policy_version for g in groups for t in g.trajectories for s in t.sampled_spans}
        if versions - {policy_version}:
            raise EngineError(f"sampled from policy versions {sorted(versions)} instead of {policy_version}")
        return groups

    def evaluate(self, questions: Sequence[Question], *, step: int) -> list[RolloutGroup]:
        """One greedy trajectory of every question, as groups of one; raises as ``collect`` does."""
        return self._roll_out(questions, step, 1, 0.0, 1.0)

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

    def _roll_out(
        self, questions: Sequence[Question], step: int, group_size: int, temperature: float, top_p: float
    ) -> list[RolloutGroup]:
        causes: list[RetrievalError] = []
        ids = _trajectory_ids(questions, step, group_size)
        episodes = [
            run_episode(
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
            for question, siblings in zip(questions, ids, strict=True)
            for trajectory_id in siblings
        ]
        trajectories = self._runner.run(_gather(episodes, self._on_progress))
        self._check_failed_searches(trajectories, causes)
        starts = range(0, len(trajectories), group_size)
        return [self._group(q, trajectories[i : i + group_size]) for q, i in zip(questions, starts, strict=True)]

    def _group(self, question: Question, trajectories: Sequence[Trajectory]) -> RolloutGroup:
        kind = self._config.objective.reward
        scores = tuple(score_trajectory(trajectory, question, kind) for trajectory in trajectories)
        return RolloutGroup(question=question, trajectories=tuple(trajectories), scores=scores)

    def _check_failed_searches(self, trajectories: Sequence[Trajectory], causes: Sequence[RetrievalError]) -> None:
        num_failed = sum(t.status is TrajectoryStatus.RETRIEVAL_FAILED for t in trajectories)
        limit = self._config.rollout.max_failed_search_share
        if num_failed > limit * len(trajectories):
            raise RetrievalError(
                f"{num_failed} of {len(trajectories)} trajectories ({num_failed / len(trajectories):.0%}) were lost to "
                f"failed searches, more than rollout.max_failed_search_share = {limit:.0%}; first cause: {causes[0]}"
            ) from causes[0]


def _trajectory_ids(questions: Sequence[Question], step: int, group_size: int) -> list[list[TrajectoryId]]:
    """Per question, the ids of its group."""
    num_seen: Counter[str] = Counter()
    ids = []
    for question in questions:
        first = num_seen[question.question_id]
        num_seen[question.question_id] += group_size
        siblings = range(first, first + group_size)
        ids.append([TrajectoryId(step=step, question_id=question.question_id, sibling=s) for s in siblings])
    return ids


async def _gather(
    episodes: Sequence[Coroutine[None, None, Trajectory]], on_progress: ProgressCallback | None
) -> list[Trajectory]:
    """Run all at once; when one raises, end the others and raise its exception as it is."""
    num_done = 0

    async def run(episode: Coroutine[None, None, Trajectory]) -> Trajectory:
        nonlocal num_done
        trajectory = await episode
        num_done += 1
        if on_progress is not None:
            on_progress(num_done, len(episodes))
        return trajectory

    tasks = [asyncio.create_task(run(episode)) for episode in episodes]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
