"""The whole run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Self

from pydantic import (
    ValidationInfo,
    model_validator,
)

from megatron_sdsearch.config.retrieval import RetrievalConfig
from megatron_sdsearch.config.rollout import RolloutConfig
from megatron_sdsearch.config.rules import (
    block_problems,
    command_problems,
    megatron_problems,
    missing_problems,
    no_model,
    optimizer_problems,
    rollout_problems,
)
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
from megatron_sdsearch.config.types import HomePath, Section, Seed, report_problems
from megatron_sdsearch.errors import ConfigError, raise_first


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

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> Self:
        report_problems(self._problems(), info)
        return self

    def _problems(self) -> Iterator[ConfigError]:
        if self.train.mode == "warm_start":
            yield from missing_problems(
                "train.demonstrations", self.train.demonstrations, "warm_start learns from them"
            )
            if self.evaluation.every:
                yield ConfigError("evaluation.every", "set, and a warm start does not evaluate", "set it to 0")
        else:
            yield from missing_problems("data.train", self.data.train, "train.mode=rl samples from it")
            yield from missing_problems("retrieval", self.retrieval, "train.mode=rl searches")
            yield from rollout_problems(self)
            yield from block_problems(self)
        if self.evaluation.every:
            yield from missing_problems("data.heldout", self.data.heldout, "evaluation.every is set")
            if self.train.mode == "warm_start":
                yield from missing_problems("retrieval", self.retrieval, "evaluation searches")
        yield from optimizer_problems(self)

    def check_files(self) -> None:
        """Every path that will be read, and every program that will be started, exists.

        Raises:
            ConfigError: naming the first field whose path does not.
        """
        raise_first(self.file_problems())

    def file_problems(self) -> Iterator[ConfigError]:
        """What ``check_files`` raises the first of."""
        for field, folder in self._model_folders().items():
            if not (folder / "config.json").is_file():
                yield no_model(field, folder)
        paths: dict[str, Path | None] = {}
        if self.train.mode == "warm_start":
            paths["train.demonstrations"] = self.train.demonstrations
        else:
            paths["data.train"] = self.data.train
        paths["data.heldout"] = self.data.heldout
        if self.retrieval is not None:
            paths |= self.retrieval.files()
        if self.model.megatron_dir is not None:
            yield from megatron_problems(self.model.megatron_dir)
        for field, path in paths.items():
            if path is not None and not path.exists():
                yield ConfigError(field, f"{path} does not exist", "give a path that exists")
        if self.samples_from_sglang and not self.rollout.sglang.urls:
            yield from command_problems(self.rollout.sglang)

    def _model_folders(self) -> dict[str, Path]:
        folders = {"model.hf_dir": self.model.hf_dir}
        if self.retrieval is not None and self.retrieval.engine == "elasticsearch":
            elastic = self.retrieval.elasticsearch
            if elastic.encoder is not None and elastic.mode != "bm25":
                folders["retrieval.elasticsearch.encoder"] = elastic.encoder
        return folders

    def saving_problem(self) -> ConfigError | None:
        """What `check` and `train` warn of: a run that dies would leave no checkpoint, however far it came."""
        checkpoint, num_steps = self.checkpoint, self.train.num_steps
        if checkpoint.every_minutes > 0 or 0 < checkpoint.every < num_steps:
            return None
        return ConfigError(
            "checkpoint.every_minutes",
            f"0, and checkpoint.every is {checkpoint.every}: nothing is saved before the end of {num_steps} steps, "
            "unless a signal asks",
            f"set checkpoint.every_minutes={CheckpointConfig().every_minutes:g}: a run that dies begins anew",
        )

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
        """Of those that the trainer reads: a trajectory, and where the run distils the block in front of it."""
        trajectory, block = self.rollout.max_total_tokens, self.hindsight.max_block_tokens
        if not self.is_distilling:
            return SequenceLimit(trajectory, "rollout.max_total_tokens")
        return SequenceLimit(trajectory + block, "rollout.max_total_tokens + hindsight.max_block_tokens")

    @property
    def longest_rollout(self) -> SequenceLimit:
        """Of those that the rollout engine reads: only the query probe shows it a block."""
        if self.telemetry.query_probe:
            return self.longest_sequence
        return SequenceLimit(self.rollout.max_total_tokens, "rollout.max_total_tokens")
