"""What is being checked: the configuration, the world it is meant for, and the files that several checks look at."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from transformers import PretrainedConfig

from megatron_sdsearch.check.findings import Attempt
from megatron_sdsearch.check.world import World
from megatron_sdsearch.config import RunConfig
from megatron_sdsearch.data.prompts import PromptProfile, get_profile
from megatron_sdsearch.data.questions import read_questions
from megatron_sdsearch.model.checkpoint_folder import run_date_of
from megatron_sdsearch.model.hf_config import hf_config_problems, read_hf_config
from megatron_sdsearch.model.shape import ModelShape
from megatron_sdsearch.records import Question
from megatron_sdsearch.tokenization.renderer import Renderer

_MAX_SAMPLE = 400


class Subject:
    """One run, looked at. Each file is read once; whose check it is reports why it could not be.

    Attributes:
        config: of the run.
        world: that it is meant for.
        is_online: servers may be asked.
    """

    def __init__(self, config: RunConfig, world: World, *, is_online: bool = False) -> None:
        self.config = config
        self.world = world
        self.is_online = is_online

    @property
    def is_rl(self) -> bool:
        """Rollouts are sampled and searched for."""
        return self.config.train.mode == "rl"

    @property
    def num_ranks_dp(self) -> int:
        """Data-parallel ranks; at least 1, whatever the world."""
        parallel = self.config.parallel
        return max(1, self.world.size // (parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size))

    @property
    def profile(self) -> PromptProfile:
        """How questions are asked."""
        return get_profile(self.config.data.prompt_profile)

    @cached_property
    def hf_config(self) -> Attempt[PretrainedConfig]:
        """Of ``model.hf_dir``."""
        return Attempt.at(lambda: read_hf_config(self.config.model.hf_dir))

    @cached_property
    def renderer(self) -> Attempt[Renderer]:
        """Of ``model.hf_dir``, with a chat template that works, or none."""
        return Attempt.at(self._renderer)

    @cached_property
    def train_questions(self) -> Attempt[Sequence[Question]]:
        """Empty where none are asked for, or the file is not there."""
        return Attempt.at(lambda: _questions(self.config.data.train if self.is_rl else None))

    @cached_property
    def heldout_questions(self) -> Attempt[Sequence[Question]]:
        """Empty where none are asked for, or the file is not there."""
        return Attempt.at(lambda: _questions(self.config.data.heldout))

    @cached_property
    def num_parameters(self) -> int:
        """Of the model by its shape; 0 where config.json cannot be read or is refused."""
        hf_config = self.hf_config.value
        if hf_config is None or hf_config_problems(hf_config):
            return 0
        return ModelShape.from_hf_config(hf_config).num_params

    def _renderer(self) -> Renderer:
        return Renderer.from_folder(
            self.config.model.hf_dir,
            profile=self.profile,
            arguments=self.config.data.chat_template_arguments,
            run_date=run_date_of(self.config.run_dir),
        )


def some_of(questions: Sequence[Question]) -> list[Question]:
    """The longest ones, and others from all over the file."""
    longest = sorted(questions, key=lambda question: -len(question.text))[: _MAX_SAMPLE // 2]
    every = max(1, len(questions) // (_MAX_SAMPLE // 2))
    chosen = {question.question_id: question for question in (*longest, *questions[::every])}
    return list(chosen.values())


def _questions(path: Path | None) -> Sequence[Question]:
    return read_questions(path) if path is not None and path.exists() else ()
