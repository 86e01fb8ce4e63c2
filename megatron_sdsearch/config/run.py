"""The settings of a whole run, and values that follow from several of them."""

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
    """Longest possible sequence in tokens, and the settings that add up to it."""

    num_tokens: int
    settings: str


class RunConfig(Section):
    """The whole run."""

    run_dir: HomePath
    """Folder for everything that the run writes; a run that is started again continues from its checkpoints."""
    seed: Seed = 1
    """Seed of all random streams."""
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
    def is_rl(self) -> bool:
        """True when the run samples trajectories, False for a warm start."""
        return self.train.mode == "rl"

    @property
    def samples_from_sglang(self) -> bool:
        """True when trajectories come from SGLang servers."""
        return self.is_rl and self.rollout.engine == "sglang"

    @property
    def trajectories_per_step(self) -> int:
        """Trajectories of a step; the demonstrations of a warm start."""
        per_step = self.data.questions_per_step * self.rollout.group_size
        return per_step if self.is_rl else self.train.demonstrations_per_step

    @property
    def updates_per_step(self) -> int:
        """Optimizer updates per step."""
        per_update = self.train.trajectories_per_minibatch
        return math.ceil(self.trajectories_per_step / per_update) if self.is_rl and per_update else 1

    @property
    def num_updates(self) -> int:
        """Optimizer updates of the whole run, for the learning-rate schedule."""
        return self.train.num_steps * self.updates_per_step

    @property
    def is_distilling(self) -> bool:
        """True when some step has a distillation loss; a run that ends within the warm-up of alpha is GRPO alone."""
        first = self.objective.first_distilling_step
        return self.is_rl and first is not None and first < self.train.num_steps

    @property
    def longest_sequence(self) -> SequenceLimit:
        """Longest sequence that the trainer reads: a trajectory, after its hindsight block if the run distils."""
        trajectory, block = self.rollout.max_total_tokens, self.hindsight.max_block_tokens
        if not self.is_distilling:
            return SequenceLimit(trajectory, "rollout.max_total_tokens")
        return SequenceLimit(trajectory + block, "rollout.max_total_tokens + hindsight.max_block_tokens")

    @property
    def longest_rollout(self) -> SequenceLimit:
        """Longest sequence that the rollout engine reads: only the query probe shows it a block."""
        if self.telemetry.query_probe:
            return self.longest_sequence
        return SequenceLimit(self.rollout.max_total_tokens, "rollout.max_total_tokens")
