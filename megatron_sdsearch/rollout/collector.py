"""All trajectories of one step at once, as complete groups in the order of their places.

Owns the event loop on which engine and retriever live, and the count of lost trajectories; the limit on them is held
where all processes are known (``RolloutLosses.check``). Of failed searches the first is logged with its cause, the
others are counted in one line. What is asked is ``supply.py``'s, refills and early ends are ``groups.py``'s, what one
trajectory does is ``episode.py``'s, what a score means is ``data/scoring.py``'s.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import TypeVar

from megatron_sdsearch.config import RunConfig
from megatron_sdsearch.data.prompts import get_profile
from megatron_sdsearch.data.scoring import score_trajectory
from megatron_sdsearch.errors import ConfigError, EngineError, RetrievalError
from megatron_sdsearch.records import (
    CollectionCounts,
    Question,
    RolloutGroup,
    Score,
    Trajectory,
    TrajectoryId,
    TrajectoryStatus,
)
from megatron_sdsearch.retrieval.base import Retriever
from megatron_sdsearch.rollout.engine import Engine
from megatron_sdsearch.rollout.episode import EpisodeRunner
from megatron_sdsearch.rollout.groups import GroupCollection
from megatron_sdsearch.rollout.supply import Supply, exactly
from megatron_sdsearch.tokenization.renderer import Renderer

T = TypeVar("T")

_log = logging.getLogger(__name__)

_SHOWN_CAUSES, _CAUSE_LENGTH = 3, 120


class FailedSearches:
    """Those of one collection, which a dead search engine makes thousands of.

    Attributes:
        first_cause: of the first one, whole; empty without one.
    """

    def __init__(self) -> None:
        self.first_cause = ""
        self._causes: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """How many there were."""
        return self._causes.total()

    def add(self, error: RetrievalError) -> None:
        """Count one; the first is logged."""
        if not self._causes:
            self.first_cause = str(error)
            _log.warning("a search failed: %s; further ones are counted until the step's end", error)
        cause = error.cause or "no cause was given"
        self._causes[cause if len(cause) <= _CAUSE_LENGTH else f"{cause[:_CAUSE_LENGTH]}..."] += 1

    def sum_up(self) -> None:
        """One line, by cause, where there was more than one."""
        if self.total < 2:
            return
        shown = [f"{count} x {cause}" for cause, count in self._causes.most_common(_SHOWN_CAUSES)]
        if (num_others := len(self._causes) - len(shown)) > 0:
            shown.append(f"{num_others} other causes")
        _log.warning("%d searches failed: %s", self.total, "; ".join(shown))


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutLosses:
    """Trajectories whose end says nothing of the policy; adds up over processes.

    Attributes:
        num_ended: trajectories that ended in whatever way, those of replaced and abandoned groups included.
        num_failed: of them, lost to failed searches.
        num_aborted: of them, given up by the rollout engine.
        first_cause: of the first failed search; empty without one.
    """

    num_ended: int = 0
    num_failed: int = 0
    num_aborted: int = 0
    first_cause: str = ""

    def __add__(self, other: RolloutLosses) -> RolloutLosses:
        return RolloutLosses(
            num_ended=self.num_ended + other.num_ended,
            num_failed=self.num_failed + other.num_failed,
            num_aborted=self.num_aborted + other.num_aborted,
            first_cause=self.first_cause or other.first_cause,
        )

    def check(self, limit: float) -> None:
        """Hold the losses to ``rollout.max_failed_search_share``.

        Raises:
            RetrievalError: there are more, and failed searches among them.
            EngineError: there are more, and the rollout engine has given up on all of them.
        """
        num_lost = self.num_failed + self.num_aborted
        if num_lost <= limit * self.num_ended:
            return
        share = f"{num_lost} of {self.num_ended} trajectories ({num_lost / self.num_ended:.0%})"
        more = f"more than rollout.max_failed_search_share = {limit:.0%}"
        if not self.num_failed:
            raise EngineError(f"the rollout engine gave up on {share}, {more}")
        aborted = f" or given up by the rollout engine ({self.num_aborted})" if self.num_aborted else ""
        raise RetrievalError(
            f"{share} were lost to failed searches{aborted}, {more}; first cause: {self.first_cause}",
            cause=self.first_cause,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """One process's part of a step.

    Attributes:
        groups: complete, in the order of their places.
        counts: what it took beside them.
        losses: trajectories that are in the groups, or were, and say nothing of the policy.
    """

    groups: tuple[RolloutGroup, ...]
    counts: CollectionCounts
    losses: RolloutLosses


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
        self._engine = engine
        self._retriever = retriever
        self._config = config
        self._episodes = EpisodeRunner(
            engine,
            retriever,
            renderer,
            get_profile(config.data.prompt_profile),
            config.rollout,
            top_k=config.retrieval.top_k,
            seed=config.seed,
        )
        self._runner = runner or asyncio.Runner()
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
            RetrievalDownError: the search engine answers nobody. A search that failed alone is counted instead.
            EngineError: the engine failed, or serves another policy version.
        """
        rollout = self._config.rollout
        collected = self._roll_out(supply, rollout.temperature, rollout.top_p)
        versions = {s.policy_version for g in collected.groups for t in g.trajectories for s in t.sampled_spans}
        if versions - {policy_version}:
            raise EngineError(f"sampled from policy versions {sorted(versions)} instead of {policy_version}")
        return collected

    def evaluate(self, questions: Sequence[Question], *, step: int) -> Collected:
        """One greedy trajectory of every question, as groups of one; raises as ``collect`` does."""
        return self._roll_out(exactly(questions, step=step, group_size=1), 0.0, 1.0)

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
        ended: Counter[TrajectoryStatus] = Counter()
        failed = FailedSearches()

        async def roll_out(question: Question, trajectory_id: TrajectoryId) -> Trajectory:
            trajectory = await self._episodes.run(
                question, trajectory_id, temperature=temperature, top_p=top_p, on_failed_search=failed.add
            )
            ended[trajectory.status] += 1
            return trajectory

        collection = GroupCollection(supply, roll_out, self._score)
        try:
            groups, counts = self._runner.run(collection.run())
        finally:
            failed.sum_up()
        losses = RolloutLosses(
            num_ended=ended.total(),
            num_failed=ended[TrajectoryStatus.RETRIEVAL_FAILED],
            num_aborted=ended[TrajectoryStatus.ABORTED],
            first_cause=failed.first_cause,
        )
        return Collected(groups=tuple(groups), counts=counts, losses=losses)

    def _score(self, trajectory: Trajectory, question: Question) -> Score:
        return score_trajectory(trajectory, question, self._config.objective.reward, self._config.hindsight.rho)
