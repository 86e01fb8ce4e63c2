"""Rollouts over all ranks: those of ``rollout_ranks`` sample a share each, and all see all groups (ADR 0003)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from megatron_sdsearch.config import RunConfig
from megatron_sdsearch.data.questions import QuestionSampler
from megatron_sdsearch.evaluation.metrics import require_sampled
from megatron_sdsearch.evaluation.query_probe import QueryHitComparison, TurnHits, compare_query_hits, summarize_hits
from megatron_sdsearch.parallel.cpu import without_cpu_layer
from megatron_sdsearch.parallel.groups import ParallelState
from megatron_sdsearch.records import HindsightBlock, Question, RolloutGroup, TrajectoryStatus
from megatron_sdsearch.retrieval.base import Retriever
from megatron_sdsearch.rollout.collector import RolloutCollector
from megatron_sdsearch.rollout.lost import LostTrajectories
from megatron_sdsearch.rollout.requests import Slot, one_group_each, plan_step, rollout_ranks
from megatron_sdsearch.tokenization.renderer import Renderer
from megatron_sdsearch.training.engines import start_engine
from megatron_sdsearch.training.policy import Network
from megatron_sdsearch.training.retrievers import open_retriever, take_counts

_log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRollouts:
    """The groups of a step, and what it took to get them, over all ranks.

    Attributes:
        groups: in question order.
        num_refilled: groups without contrast that were discarded and replaced by another question's.
        engine_counts: of the rollout engine, the search engine and the replay store, under names of metrics.
    """

    groups: list[RolloutGroup]
    num_refilled: int
    engine_counts: dict[str, int]


class DistributedRollouts:
    """This rank's engine, its collector if it rolls out, and the exchange of what all ranks produce.

    Every method but ``close`` is called on all ranks together.

    Args:
        config: of the run.
        parallel: its ranks.
        renderer: of the policy's tokenizer.
    """

    def __init__(self, config: RunConfig, parallel: ParallelState, renderer: Renderer) -> None:
        assert config.retrieval is not None  # RunConfig has checked it
        self.renderer = renderer
        self._config = config
        self._parallel = parallel
        self._ranks = rollout_ranks(config, parallel.world_size)
        self._retriever: Retriever | None = None
        self._collector: RolloutCollector | None = None
        self._has_warned_of_prompts = False
        runner = asyncio.Runner()
        if parallel.rank in self._ranks:
            self._retriever = runner.run(open_retriever(config.retrieval))  # first: it fails faster than servers start
        self._source = start_engine(config, renderer, parallel)
        if self._retriever is not None:
            self._collector = RolloutCollector(self._source.engine, self._retriever, renderer, config, runner)

    def publish(self, policy: Network, *, version: int) -> None:
        """Hand the policy's weights to the engine: from here on rollouts come from exactly these, as ``version``."""
        self._source.publish(policy, version)

    def release_memory(self) -> None:
        """Let colocated servers release their memory: no rollouts until the next publish."""
        self._source.release_memory()

    def collect(self, questions: QuestionSampler, *, step: int) -> StepRollouts:
        """Roll out the groups of a step (0-based).

        Raises:
            RetrievalError, EngineError: on every rank: more of the step's trajectories than
                ``rollout.max_failed_search_share`` were lost, of all ranks together.
            TrainingError: on every rank: no trajectory has a sampled token to learn from.
        """
        slots = plan_step(questions, self._config.rollout, step=step)
        groups, num_refilled = self._roll_out(slots, f"step {step + 1}", policy_version=step)
        own = self._source.take_counts()
        if self._retriever is not None:
            own |= take_counts(self._retriever)
        engine_counts: dict[str, int] = {}
        for counts in self._parallel.all_gather_object(own):
            engine_counts |= {name: engine_counts.get(name, 0) + value for name, value in counts.items()}
        return StepRollouts(groups=groups, num_refilled=num_refilled, engine_counts=engine_counts)

    def evaluate(self, questions: Sequence[Question], *, step: int) -> list[RolloutGroup]:
        """One greedy trajectory per question, in question order; raises as ``collect`` does.

        Args:
            questions: held out.
            step: number of finished steps.
        """
        slots = one_group_each(questions, step=step, group_size=1)
        return self._roll_out(slots, f"evaluation after step {step}", policy_version=step, is_greedy=True)[0]

    def probe(self, groups: Sequence[tuple[RolloutGroup, list[HindsightBlock]]]) -> QueryHitComparison:
        """Compare how often queries of teacher and student hit, at the student's prefixes.

        Args:
            groups: of one step, each with its hindsight; the same ones on every rank.
        """
        turns: list[TurnHits | None] = []
        if self._collector is not None and self._retriever is not None:
            servers = self._source.engine, self._retriever
            work = compare_query_hits(self._share(groups), *servers, self.renderer, self._config)
            with self._sampling():
                turns = self._collector.run(work)
        return summarize_hits([turn for part in self._parallel.all_gather_object(turns) for turn in part])

    def close(self) -> None:
        """Close engine, retriever and event loop, and end servers."""
        try:
            if self._collector is not None:
                self._collector.close()
        finally:
            self._source.close()

    def _roll_out(
        self, slots: Sequence[Slot], what: str, *, policy_version: int, is_greedy: bool = False
    ) -> tuple[list[RolloutGroup], int]:
        """The groups of all ranks in the order of ``slots``, and how many gave way; ``what`` begins messages."""
        collected = None
        if self._collector is not None:
            with self._sampling():
                share = self._share(slots)
                collected = self._collector.collect(share, policy_version=policy_version, is_greedy=is_greedy)
        gathered = [part for part in self._parallel.all_gather_object(collected) if part is not None]
        sum((part.lost for part in gathered), LostTrajectories()).check(self._config.rollout.max_failed_search_share)
        # Puts together again what _share took apart.
        groups = [gathered[i % len(gathered)].groups[i // len(gathered)] for i in range(len(slots))]
        require_sampled(groups, what)
        self._warn_of_long_prompts(groups, what)
        return groups, sum(part.num_refilled for part in gathered)

    def _share(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's part of what the ranks that roll out deal out among themselves in turn."""
        return items[self._ranks.index(self._parallel.rank) :: len(self._ranks)]

    @contextmanager
    def _sampling(self) -> Iterator[None]:
        with without_cpu_layer():
            yield

    def _warn_of_long_prompts(self, groups: Sequence[RolloutGroup], what: str) -> None:
        """Warn the first time that prompts are too long."""
        statuses = [trajectory.status for group in groups for trajectory in group.trajectories]
        num_too_long = statuses.count(TrajectoryStatus.PROMPT_TOO_LONG)
        if num_too_long and self._parallel.is_main and not self._has_warned_of_prompts:
            self._has_warned_of_prompts = True
            _log.warning(
                "%s: %d of %d trajectories never began, their prompts exceed rollout.max_prompt_tokens = %d; from now "
                "on they are counted in train/num_prompt_too_long and eval/num_prompt_too_long alone",
                what,
                num_too_long,
                len(statuses),
                self._config.rollout.max_prompt_tokens,
            )
