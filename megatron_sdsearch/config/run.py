"""The settings of a whole run, and what follows from several of them."""

from __future__ import annotations

import math
from typing import NamedTuple

from megatron_sdsearch.config.retrieval import RetrievalConfig
from megatron_sdsearch.config.rollout import RolloutConfig
from megatron_sdsearch.config.sections import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    HindsightConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    TelemetryConfig,
    TrainConfig,
)
from megatron_sdsearch.config.types import HomePath, Section, Seed


class SequenceLimit(NamedTuple):
    """How long a sequence of the run may become, in tokens, and the settings whose sum that is."""

    num_tokens: int
    settings: str


class RunConfig(Section):
    """The whole run."""

    run_dir: HomePath
    seed: Seed = 1
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    retrieval: RetrievalConfig | None = None
    hindsight: HindsightConfig = HindsightConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    telemetry: TelemetryConfig = TelemetryConfig()

    @property
    def samples_from_sglang(self) -> bool:
        """``rollout.sglang`` is read at all."""
        return self.train.mode == "rl" and self.rollout.engine == "sglang"

    @property
    def updates_per_step(self) -> int:
        """Optimizer updates that every step takes, and that the learning-rate schedule counts for it."""
        if self.train.mode == "warm_start":
            return 1
        trajectories = self.data.questions_per_step * self.rollout.group_size
        return math.ceil(trajectories / (self.train.trajectories_per_minibatch or trajectories))

    @property
    def num_updates(self) -> int:
        """Optimizer updates of the whole run, for the learning-rate schedule."""
        return self.train.num_steps * self.updates_per_step

    @property
    def is_distilling(self) -> bool:
        """Some step has a distillation loss; a run that ends within the warm-up of alpha is GRPO alone."""
        first = self.objective.first_distilling_step
        return self.train.mode == "rl" and first is not None and first < self.train.num_steps

    @property
    def longest_sequence(self) -> SequenceLimit:
        """The longest sequence that the trainer reads: a trajectory, and where the run distils the block before it."""
        trajectory, block = self.rollout.max_total_tokens, self.hindsight.max_block_tokens
        if not self.is_distilling:
            return SequenceLimit(trajectory, "rollout.max_total_tokens")
        return SequenceLimit(trajectory + block, "rollout.max_total_tokens + hindsight.max_block_tokens")

    @property
    def longest_rollout(self) -> SequenceLimit:
        """The longest sequence that the rollout engine reads: only the query probe shows it a block."""
        if self.telemetry.query_probe:
            return self.longest_sequence
        return SequenceLimit(self.rollout.max_total_tokens, "rollout.max_total_tokens")
