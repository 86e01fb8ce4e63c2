"""Rollouts over all ranks: each samples its share of the questions, and all see all groups (ADR 0003)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from megatron_sdsearch.config import RunConfig
from megatron_sdsearch.data.prompts import get_profile
from megatron_sdsearch.data.questions import QuestionSampler, read_questions
from megatron_sdsearch.evaluation import require_sampled
from megatron_sdsearch.hindsight.block import build_hindsight
from megatron_sdsearch.hindsight.labels import outcomes_of, shown_labels
from megatron_sdsearch.parallel.cpu import without_cpu_layer
from megatron_sdsearch.parallel.groups import ParallelState
from megatron_sdsearch.query_probe import ProbeParams, ProbeResult, merge, probe_queries
from megatron_sdsearch.records import CollectionCounts, HindsightBlock, Question, RolloutGroup, TrajectoryStatus
from megatron_sdsearch.rollout.checks import check_prompts
from megatron_sdsearch.rollout.collector import Collected, RolloutCollector, RolloutLosses
from megatron_sdsearch.rollout.supply import supply_of
from megatron_sdsearch.tokenization.renderer import Renderer
from megatron_sdsearch.training.engines import start_engine
from megatron_sdsearch.training.policy import Network
from megatron_sdsearch.training.retrievers import open_retriever, take_counts

_log = logging.getLogger(__name__)
T = TypeVar("T")
HindsightGroup = tuple[RolloutGroup, list[HindsightBlock]]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRollouts:
    """Groups with their hindsight, and what it took to get them: of one rank, or of all.

    Attributes:
        groups: in the order of their places.
        counts: of the collection.
        engine_counts: of the rollout engine, the search engine and the replay store, under names of metrics.
    """

    groups: list[HindsightGroup]
    counts: CollectionCounts
    engine_counts: dict[str, int]

    @property
    def num_emptied(self) -> int:
        """Trainable trajectories with a teacher prompt that ``hindsight.max_block_tokens`` left nothing of."""
        return sum(
            block.is_emptied and trajectory.is_trainable
            for group, blocks in self.groups
            for trajectory, block in zip(group.trajectories, blocks, strict=True)
        )


def check_questions(config: RunConfig) -> None:
    """Of the questions that a run trains on and is judged by, at least one each fits ``rollout.max_prompt_tokens``.

    Raises:
        ConfigError: of one of the two files none does.
        DataError: a file or the tokenizer is malformed.
    """
    if config.train.mode != "rl":
        return
    profile = get_profile(config.data.prompt_profile)
    renderer = Renderer.from_folder(config.model.hf_dir, profile=profile, arguments=config.data.chat_template_arguments)
    files = {"data.train": config.data.train, "data.heldout": config.data.heldout if config.evaluation.every else None}
    for field, path in files.items():
        if path is not None:
            number = config.evaluation.num_questions if field == "data.heldout" else None
            check_prompts(read_questions(path)[:number], field, renderer, profile, config.rollout.max_prompt_tokens)


class DistributedRollouts:
    """This rank's engine and collector, and the exchange of what they produce.

    Args:
        config: of the run.
        parallel: its ranks.
        renderer: of the policy's tokenizer.
    """

    def __init__(self, config: RunConfig, parallel: ParallelState, renderer: Renderer) -> None:
        assert config.retrieval is not None  # RunConfig has checked it
        self._config = config
        self._parallel = parallel
        self.renderer = renderer
        self._profile = get_profile(config.data.prompt_profile)
        runner = asyncio.Runner()
        self._retriever = runner.run(open_retriever(config.retrieval))
        self._source = start_engine(config, self.renderer, parallel)
        self._collector = RolloutCollector(self._source.engine, self._retriever, self.renderer, config, runner)
        self._has_warned_of_prompts = False
        self._has_warned_of_blocks = False

    def publish(self, policy: Network, *, version: int) -> None:
        """From here on rollouts come from exactly this policy."""
        self._source.publish(policy, version)

    def rest(self) -> None:
        """No rollouts until the next publish."""
        self._source.release_memory()

    def collect(self, questions: QuestionSampler, *, step: int) -> StepRollouts:
        """The step's groups with their hindsight, in the order of their places, on every rank.

        Raises:
            RetrievalError, EngineError: on every rank: more of the step's trajectories than
                ``rollout.max_failed_search_share`` were lost, of all ranks together.
            TrainingError: on every rank: no trajectory has a sampled token to learn from.
        """
        rank, world_size = self._parallel.rank, self._parallel.world_size
        supply = supply_of(questions, self._config.rollout, step=step, rank=rank, world_size=world_size)
        with self._sampling():
            collected = self._collector.collect(supply, policy_version=step)
        groups = self._with_hindsight(collected)
        counts = self._source.take_counts() | take_counts(self._retriever)
        own = StepRollouts(groups=groups, counts=collected.counts, engine_counts=counts)
        parts = self._parallel.all_gather_object(own)
        whole = StepRollouts(
            groups=_in_turn([part.groups for part in parts]),
            counts=sum((part.counts for part in parts), CollectionCounts()),
            engine_counts={name: sum(part.engine_counts[name] for part in parts) for name in own.engine_counts},
        )
        self._look_at([group for group, _ in whole.groups], f"step {step + 1}")
        self._warn_of_emptied(whole, step)
        return whole

    def evaluate(self, questions: Sequence[Question], *, step: int) -> list[RolloutGroup]:
        """One greedy trajectory per question, in question order, on every rank; raises as ``collect`` does."""
        with self._sampling():
            collected = self._collector.evaluate(self._share(questions), step=step)
        gathered = self._parallel.all_gather_object((collected.groups, collected.losses))
        self._check([losses for _, losses in gathered])
        groups = _in_turn([groups for groups, _ in gathered])
        self._look_at(groups, f"evaluation after step {step}")
        return groups

    def probe(self, groups: Sequence[HindsightGroup]) -> ProbeResult:
        """How often queries of teacher and student hit, at the student's prefixes; over all ranks."""
        share = self._share(groups)
        rollout, retrieval = self._config.rollout, self._config.retrieval
        assert retrieval is not None  # RunConfig has checked it
        params = ProbeParams(
            seed=self._config.seed,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            max_query_tokens=rollout.max_response_tokens,
            top_k=retrieval.top_k,
            rho=self._config.hindsight.rho,
        )
        members = [group for group, _ in share], [blocks for _, blocks in share]
        work = probe_queries(*members, self._source.engine, self._retriever, self.renderer, params)
        with self._sampling():
            result = self._collector.run(work)
        return merge(self._parallel.all_gather_object(result))

    def close(self) -> None:
        """Close engine, retriever and event loop, and end servers."""
        try:
            self._collector.close()
        finally:
            self._source.close()

    @contextmanager
    def _sampling(self) -> Iterator[None]:
        with without_cpu_layer():
            yield

    def _check(self, losses: Sequence[RolloutLosses]) -> None:
        sum(losses, RolloutLosses()).check(self._config.rollout.max_failed_search_share)

    def _look_at(self, groups: Sequence[RolloutGroup], what: str) -> None:
        """Refuse what has no sampled token; the first time that prompts are too long, say so."""
        require_sampled(groups, what)
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

    def _with_hindsight(self, collected: Collected) -> list[HindsightGroup]:
        """This rank's groups; labels may be drawn from the outcomes of all ranks."""
        config = self._config.hindsight
        own = outcomes_of(collected.groups, config.rho)
        gathered = self._parallel.all_gather_object((own, collected.losses))
        self._check([losses for _, losses in gathered])
        labels = shown_labels([o for outcomes, _ in gathered for o in outcomes], config, seed=self._config.seed)
        return [
            (group, build_hindsight(group, self.renderer, self._profile, config, labels)) for group in collected.groups
        ]

    def _warn_of_emptied(self, rollouts: StepRollouts, step: int) -> None:
        """Once: ``hindsight/num_emptied`` counts it in every step."""
        if self._has_warned_of_blocks or not self._config.is_distilling or not rollouts.num_emptied:
            return
        self._has_warned_of_blocks = True
        if self._parallel.is_main:
            _log.warning(
                "step %d: hindsight.max_block_tokens = %d left nothing of the hindsight of %d trajectories: they are "
                "not distilled; raise it (hindsight/num_emptied counts them in every step)",
                step + 1,  # as metrics.jsonl counts
                self._config.hindsight.max_block_tokens,
                rollouts.num_emptied,
            )

    def _share(self, items: Sequence[T]) -> Sequence[T]:
        return items[self._parallel.rank :: self._parallel.world_size]


def _in_turn(shares: Sequence[Sequence[T]]) -> list[T]:
    """What ``items[rank::world_size]`` took apart, together again."""
    total = sum(len(share) for share in shares)
    return [shares[index % len(shares)][index // len(shares)] for index in range(total)]
