"""Rollouts over all ranks: each of ``rollout_ranks`` samples a share, and all ranks get all groups (ADR 0003)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from megatron_sdsearch.config import RunConfig
from megatron_sdsearch.data.questions import QuestionSampler
from megatron_sdsearch.evaluation.metrics import require_sampled
from megatron_sdsearch.evaluation.query_probe import QueryHitComparison, TurnHits, compare_query_hits, summarize_hits
from megatron_sdsearch.parallel.cpu import without_cpu_layer
from megatron_sdsearch.parallel.groups import ParallelState
from megatron_sdsearch.records import HindsightBlock, Question, RolloutGroup, TrajectoryStatus
from megatron_sdsearch.rollout.collector import RolloutCollector
from megatron_sdsearch.rollout.lost import LostTrajectories
from megatron_sdsearch.rollout.requests import Slot, one_group_each, plan_step, rollout_ranks
from megatron_sdsearch.tokenization.renderer import Renderer
from megatron_sdsearch.training.engines import start_engine
from megatron_sdsearch.training.retrievers import open_retriever, take_counts

_log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRollouts:
    """Groups and counts of a step, over all ranks.

    Attributes:
        groups: in question order.
        num_refilled: groups without contrast that were replaced by another question's.
        engine_counts: of the rollout engine, the search engine and the replay store, by metric name.
    """

    groups: list[RolloutGroup]
    num_refilled: int
    engine_counts: dict[str, int]


class DistributedRollouts:
    """Rolls out on this rank if it is one of ``rollout_ranks``, and exchanges results with all ranks.

    All methods but ``close`` are collectives.

    Args:
        config: of the run.
        parallel: its ranks.
        renderer: of the policy's tokenizer.

    Attributes:
        source: this rank's engine, to which weights are published.
    """

    def __init__(self, config: RunConfig, parallel: ParallelState, renderer: Renderer) -> None:
        assert config.retrieval is not None  # RunConfig has checked it
        self._renderer = renderer
        self._config = config
        self._parallel = parallel
        self._ranks = rollout_ranks(config, parallel.world_size)
        self._collector: RolloutCollector | None = None
        self._has_warned_of_prompts = False
        runner = asyncio.Runner()
        if parallel.rank in self._ranks:
            retriever = runner.run(open_retriever(config.retrieval))  # before servers start: it fails faster
        self.source = start_engine(config, renderer, parallel)
        if parallel.rank in self._ranks:
            self._collector = RolloutCollector(self.source.engine, retriever, renderer, config, runner)

    def collect(self, questions: QuestionSampler, *, step: int) -> StepRollouts:
        """Roll out the groups of a step (0-based).

        Raises:
            RetrievalError, EngineError: on every rank: over all ranks, more than ``rollout.max_failed_search_share`` of
                the step's trajectories were lost.
            TrainingError: on every rank: no trajectory has a sampled token to learn from.
        """
        slots = plan_step(questions, self._config.rollout, step=step)
        groups, num_refilled = self._roll_out(slots, f"step {step + 1}", policy_version=step)
        own = self.source.take_counts()
        if self._collector is not None:
            own |= take_counts(self._collector.retriever)
        engine_counts: dict[str, int] = {}
        for counts in self._parallel.all_gather_object(own):
            engine_counts |= {name: engine_counts.get(name, 0) + value for name, value in counts.items()}
        return StepRollouts(groups=groups, num_refilled=num_refilled, engine_counts=engine_counts)

    def evaluate(self, questions: Sequence[Question], *, step: int) -> list[RolloutGroup]:
        """Roll out one greedy trajectory per question, in question order; raises as ``collect``.

        Args:
            questions: held-out ones.
            step: number of finished steps.
        """
        slots = one_group_each(questions, step=step, group_size=1)
        return self._roll_out(slots, f"evaluation after step {step}", policy_version=step, is_greedy=True)[0]

    def probe(self, groups: Sequence[tuple[RolloutGroup, list[HindsightBlock]]]) -> QueryHitComparison:
        """Compare how often the teacher's and the student's queries hit after the student's prefixes.

        Args:
            groups: of one step, each with its hindsight; the same on every rank.
        """
        turns: list[TurnHits | None] = []
        if self._collector is not None:
            engines = self.source.engine, self._collector.retriever
            work = compare_query_hits(self._share(groups), *engines, self._renderer, self._config)
            with without_cpu_layer():
                turns = self._collector.run(work)
        return summarize_hits([turn for part in self._parallel.all_gather_object(turns) for turn in part])

    def close(self) -> None:
        """Close engine, retriever and event loop, and end own servers."""
        try:
            if self._collector is not None:
                self._collector.close()
        finally:
            self.source.close()

    def _roll_out(
        self, slots: Sequence[Slot], what: str, *, policy_version: int, is_greedy: bool = False
    ) -> tuple[list[RolloutGroup], int]:
        """Return all ranks' groups in the order of ``slots``, and how many were replaced; ``what`` begins messages."""
        collected = None
        if self._collector is not None:
            with without_cpu_layer():
                share = self._share(slots)
                collected = self._collector.collect(share, policy_version=policy_version, is_greedy=is_greedy)
        gathered = [part for part in self._parallel.all_gather_object(collected) if part is not None]
        sum((part.lost for part in gathered), LostTrajectories()).check(self._config.rollout.max_failed_search_share)
        # The inverse of _share.
        groups = [gathered[i % len(gathered)].groups[i // len(gathered)] for i in range(len(slots))]
        require_sampled(groups, what)
        self._warn_of_long_prompts(groups, what)
        return groups, sum(part.num_refilled for part in gathered)

    def _share(self, items: Sequence[T]) -> Sequence[T]:
        """Return this rank's part: items are dealt in turn to the ranks that roll out."""
        return items[self._ranks.index(self._parallel.rank) :: len(self._ranks)]

    def _warn_of_long_prompts(self, groups: Sequence[RolloutGroup], what: str) -> None:
        """Warn once that prompts are too long."""
        statuses = [trajectory.status for group in groups for trajectory in group.trajectories]
        num_too_long = statuses.count(TrajectoryStatus.PROMPT_TOO_LONG)
        if num_too_long and self._parallel.is_main and not self._has_warned_of_prompts:
            self._has_warned_of_prompts = True
            _log.warning(
                "%s: %d of %d trajectories were not sampled, their prompts exceed rollout.max_prompt_tokens = %d; from "
                "now on only train/num_prompt_too_long and eval/num_prompt_too_long report them",
                what,
                num_too_long,
                len(statuses),
                self._config.rollout.max_prompt_tokens,
            )
