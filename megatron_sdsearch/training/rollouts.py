"""Rollouts over all ranks: each samples its share of the questions, and all see all groups (ADR 0003)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from megatron_sdsearch.config import RetrievalConfig, RunConfig
from megatron_sdsearch.data.prompts import get_profile
from megatron_sdsearch.data.questions import QuestionSampler
from megatron_sdsearch.hindsight.block import build_hindsight
from megatron_sdsearch.parallel.cpu import without_cpu_layer
from megatron_sdsearch.parallel.groups import ParallelState
from megatron_sdsearch.query_probe import ProbeParams, ProbeResult, merge, probe_queries
from megatron_sdsearch.records import CollectionCounts, HindsightBlock, Question, RolloutGroup
from megatron_sdsearch.retrieval.base import Retriever
from megatron_sdsearch.retrieval.replay import replay_counts, with_replay
from megatron_sdsearch.retrieval.tantivy_index import TantivyRetriever
from megatron_sdsearch.rollout.collector import RolloutCollector
from megatron_sdsearch.rollout.supply import supply_of
from megatron_sdsearch.tokenization.renderer import Renderer
from megatron_sdsearch.training.engines import start_engine
from megatron_sdsearch.training.policy import Network

T = TypeVar("T")
HindsightGroup = tuple[RolloutGroup, list[HindsightBlock]]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRollouts:
    """Groups with their hindsight, and what it took to get them: of one rank, or of all.

    Attributes:
        groups: in the order of their places.
        counts: of the collection.
        engine_counts: of the engine and the replay store, under names of metrics.
    """

    groups: list[HindsightGroup]
    counts: CollectionCounts
    engine_counts: dict[str, int]


def open_retriever(config: RetrievalConfig) -> Retriever:
    """The configured search engine, behind the store of ``retrieval.replay`` or replaced by it."""
    return with_replay(config.replay, lambda: _open_engine(config))


def _open_engine(config: RetrievalConfig) -> Retriever:
    """The index stands beside the corpus."""
    assert config.corpus is not None  # RetrievalConfig has checked it
    return TantivyRetriever.open_or_build(config.corpus, config.analyzer, config.corpus.parent / "index")


class DistributedRollouts:
    """This rank's engine and collector, and the exchange of what they produce."""

    def __init__(self, config: RunConfig, parallel: ParallelState) -> None:
        assert config.retrieval is not None  # RunConfig has checked it
        self._config = config
        self._parallel = parallel
        self.renderer = Renderer.from_folder(config.model.hf_dir)
        self._profile = get_profile(config.data.prompt_profile)
        self._retriever = open_retriever(config.retrieval)
        self._source = start_engine(config, self.renderer, parallel)
        self._collector = RolloutCollector(self._source.engine, self._retriever, self.renderer, config)

    def publish(self, policy: Network, *, version: int) -> None:
        """From here on rollouts come from exactly this policy."""
        self._source.publish(policy, version)

    def rest(self) -> None:
        """No rollouts until the next publish."""
        self._source.rest()

    def collect(self, questions: QuestionSampler, *, step: int) -> StepRollouts:
        """The step's groups with their hindsight, in the order of their places, on every rank."""
        rank, world_size = self._parallel.rank, self._parallel.world_size
        supply = supply_of(questions, self._config.rollout, step=step, rank=rank, world_size=world_size)
        with without_cpu_layer():
            collected = self._collector.collect(supply, policy_version=step)
        groups = [(group, self._hindsight(group)) for group in collected.groups]
        counts = self._source.take_counts() | replay_counts(self._retriever)
        own = StepRollouts(groups=groups, counts=collected.counts, engine_counts=counts)
        parts = self._parallel.all_gather_object(own)
        return StepRollouts(
            groups=_in_turn([part.groups for part in parts]),
            counts=sum((part.counts for part in parts), CollectionCounts()),
            engine_counts={name: sum(part.engine_counts[name] for part in parts) for name in own.engine_counts},
        )

    def evaluate(self, questions: Sequence[Question], *, step: int) -> list[RolloutGroup]:
        """One greedy trajectory per question, in question order, on every rank."""
        with without_cpu_layer():
            groups = self._collector.evaluate(self._share(questions), step=step)
        return _in_turn(self._parallel.all_gather_object(groups))

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
        return merge(self._parallel.all_gather_object(self._collector.run(work)))

    def close(self) -> None:
        """Close engine, retriever and event loop, and end servers."""
        try:
            self._collector.close()
        finally:
            self._source.close()

    def _hindsight(self, group: RolloutGroup) -> list[HindsightBlock]:
        return build_hindsight(group, self.renderer, self._profile, self._config.hindsight, seed=self._config.seed)

    def _share(self, items: Sequence[T]) -> Sequence[T]:
        return items[self._parallel.rank :: self._parallel.world_size]


def _in_turn(shares: Sequence[Sequence[T]]) -> list[T]:
    """What ``items[rank::world_size]`` took apart, together again."""
    total = sum(len(share) for share in shares)
    return [shares[index % len(shares)][index // len(shares)] for index in range(total)]
