"""Finds problems of a run's files, model and machine before it starts: `train` raises them, `check` shows them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from transformers import PretrainedConfig

from megatron_sdsearch.allocation import Allocation, allocation_problems
from megatron_sdsearch.batching.samples import demonstration_sample
from megatron_sdsearch.config import ElasticsearchConfig, RetrievalConfig, RunConfig, file_problems
from megatron_sdsearch.data.demonstrations import Demonstration, check_profile, read_demonstrations
from megatron_sdsearch.data.prompts import get_profile
from megatron_sdsearch.data.questions import QuestionSampler, read_questions
from megatron_sdsearch.errors import ConfigError, SDSearchError, as_config_error, raise_problems
from megatron_sdsearch.model.checkpoint_folder import run_date_of
from megatron_sdsearch.model.hf_config import hf_config_problems, length_problems, read_hf_config
from megatron_sdsearch.model.hf_weights import SafetensorsFolder, check_weights
from megatron_sdsearch.model.shape import ModelShape, layout_problems
from megatron_sdsearch.model.weight_table import EMBEDDING
from megatron_sdsearch.records import Question
from megatron_sdsearch.retrieval.encoder import read_encoder_settings
from megatron_sdsearch.retrieval.engines import client_is_missing
from megatron_sdsearch.retrieval.http import check_url
from megatron_sdsearch.rollout.checks import prompt_problems
from megatron_sdsearch.rollout.episode import ObservationWriter
from megatron_sdsearch.sglang.rules import own_server_problems
from megatron_sdsearch.tokenization.renderer import Renderer
from megatron_sdsearch.tokenization.spans import parse_action

T = TypeVar("T")
_NUM_DEMONSTRATIONS = 200
_QUERY = "capital of France 1998"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFiles:
    """Contents of a run's files.

    Attributes:
        hf_config: config.json of ``model.hf_dir``; None if it cannot be read.
        renderer: of its tokenizer; None if that cannot be used.
        train: questions; empty, like the next two, if none are configured or the file cannot be read.
        heldout: held-out questions.
        demonstrations: of a warm start.
        problems: of the contents, and of settings that depend on them.
    """

    hf_config: PretrainedConfig | None
    renderer: Renderer | None
    train: Sequence[Question]
    heldout: Sequence[Question]
    demonstrations: Sequence[Demonstration]
    problems: Sequence[ConfigError]


def attempt(work: Callable[[], T], field: str, problems: list[ConfigError]) -> T | None:
    """Return the result of ``work``; on failure append a problem of ``field`` to ``problems`` and return None."""
    try:
        return work()
    except SDSearchError as error:
        problems.append(as_config_error(error, field))
        return None


def refuse_start(config: RunConfig) -> None:
    """Raise the ``start_problems`` of this rank.

    Raises:
        ConfigError: the run does not fit this machine or the ranks that torchrun has started.
    """
    problems = start_problems(config, Allocation.from_environment(torch.cuda.device_count()))
    if problems and os.environ.get("RANK", "0") == "0":
        problems += [problem for problem in read_files(config).problems if str(problem) not in map(str, problems)]
    raise_problems(problems)


def start_problems(config: RunConfig, allocation: Allocation) -> list[ConfigError]:
    """List problems that every rank can find: missing files, settings that do not fit model, nodes or GPUs."""
    problems = [*file_problems(config), *allocation_problems(config, allocation)]
    hf_config = _read_hf_config(config.model.hf_dir, problems)
    if hf_config is None:
        return problems
    if refused := hf_config_problems(hf_config):
        return problems + refused
    problems += layout_problems(ModelShape.from_hf_config(hf_config), config.parallel)
    problems += length_problems(hf_config, config)
    return [*problems, *own_server_problems(config, hf_config)]


def read_files(config: RunConfig) -> RunFiles:
    """Read the files of a run and find problems in them; imports megatron only for ``model.megatron_dir``.

    ``start_problems`` reports missing files.
    """
    problems: list[ConfigError] = []

    def read(field: str, path: Path | None, reader: Callable[[Path], Sequence[T]]) -> Sequence[T]:
        return attempt(lambda: reader(path), field, problems) or () if path is not None and path.is_file() else ()

    is_rl = config.is_rl
    hf_config, renderer = _read_hf_config(config.model.hf_dir, problems), None
    if (config.model.hf_dir / "config.json").is_file():
        renderer = attempt(lambda: _read_renderer(config), "model.hf_dir", problems)
    train = read("data.train", config.data.train if is_rl else None, read_questions)
    heldout = read("data.heldout", config.data.heldout, read_questions)
    demonstrations = read("train.demonstrations", None if is_rl else config.train.demonstrations, read_demonstrations)
    if hf_config is not None and not hf_config_problems(hf_config):
        problems += _weight_problems(config, hf_config)
    if hf_config is not None and renderer is not None:
        problems += _tokenizer_problems(renderer, hf_config)
    if renderer is not None and is_rl:
        problems += _rollout_problems(config, renderer, train, heldout)
    if renderer is not None and demonstrations:
        problems += _demonstration_problems(config, renderer, demonstrations)
    if is_rl and config.retrieval is not None and config.retrieval.replay.mode != "only":
        problems += _retrieval_problems(config.retrieval)
    return RunFiles(
        hf_config=hf_config,
        renderer=renderer,
        train=train,
        heldout=heldout,
        demonstrations=demonstrations,
        problems=problems,
    )


def _read_hf_config(hf_dir: Path, problems: list[ConfigError]) -> PretrainedConfig | None:
    if not (hf_dir / "config.json").is_file():
        return None
    return attempt(lambda: read_hf_config(hf_dir), "model.hf_dir", problems)


def _read_renderer(config: RunConfig) -> Renderer:
    return Renderer.from_folder(
        config.model.hf_dir,
        profile=get_profile(config.data.prompt_profile),
        arguments=config.data.chat_template_arguments,
        run_date=run_date_of(config.run_dir),
    )


def _weight_problems(config: RunConfig, hf_config: PretrainedConfig) -> list[ConfigError]:
    """Check names and sizes; loading the model finds numbers that are not finite."""
    problems: list[ConfigError] = []
    hf_dir, megatron_dir = config.model.hf_dir, config.model.megatron_dir

    def check_folder() -> None:
        tensors = SafetensorsFolder(hf_dir)
        check_weights(tensors, hf_config, hf_dir)
        num_rows = tensors.shape(EMBEDDING)[0]
        if num_rows != hf_config.vocab_size:
            problem = f"the embedding has {num_rows} rows, but config.json says vocab_size = {hf_config.vocab_size}"
            raise ConfigError("model.hf_dir", problem, "use config.json and weights of the same model")

    def check_megatron(folder: Path) -> None:
        from megatron_sdsearch.model.megatron_folder import MegatronFolder  # takes a second

        check_weights(MegatronFolder(folder, hf_config), hf_config, folder)

    if megatron_dir is None:
        attempt(check_folder, "model.hf_dir", problems)
    elif (megatron_dir / ".metadata").exists():
        attempt(lambda: check_megatron(megatron_dir), "model.megatron_dir", problems)
    return problems


def _tokenizer_problems(renderer: Renderer, hf_config: PretrainedConfig) -> list[ConfigError]:
    problems = []
    action = parse_action(
        renderer.token_bytes.lookup(renderer.encode_own(f"<think> who? </think>\n<search> {_QUERY} </search>"))
    )
    if action.argument != _QUERY:
        problem = f"the tokenizer loses text: it turns a search for {_QUERY!r} into one for {action.argument!r}"
        problems.append(ConfigError("model.hf_dir", problem, "use a byte-level tokenizer that keeps every character"))
    if renderer.vocab_size > hf_config.vocab_size:
        problem = (
            f"the tokenizer has {renderer.vocab_size} ids, but the model's embedding has {hf_config.vocab_size} rows"
        )
        fix = "use the tokenizer that the model was trained with, or enlarge the embedding"
        problems.append(ConfigError("model.hf_dir", problem, fix))
    return problems


def _rollout_problems(
    config: RunConfig, renderer: Renderer, train: Sequence[Question], heldout: Sequence[Question]
) -> list[ConfigError]:
    """Check that there are enough questions for a step, prompts that fit, and room for observations."""
    problems: list[ConfigError] = []
    profile, rollout = get_profile(config.data.prompt_profile), config.rollout
    per_step, field = config.data.questions_per_step, "data.questions_per_step"
    if train:
        attempt(lambda: QuestionSampler(train, config.seed, per_step), field, problems)
    files = {"data.train": train}
    if config.evaluation.every:
        files["data.heldout"] = heldout[: config.evaluation.num_questions]
    for name, questions in files.items():
        problems += prompt_problems(questions, name, renderer, profile, rollout.max_prompt_tokens)
    max_tokens, field = rollout.max_observation_tokens, "rollout.max_observation_tokens"
    attempt(lambda: ObservationWriter(renderer, profile, max_tokens), field, problems)
    return problems


def _demonstration_problems(
    config: RunConfig, renderer: Renderer, demonstrations: Sequence[Demonstration]
) -> list[ConfigError]:
    """Check that demonstrations follow the prompt profile and that the longest fit a microbatch."""
    problems: list[ConfigError] = []
    budget, profile = config.train.max_tokens_per_microbatch, get_profile(config.data.prompt_profile)

    def num_characters(row: Demonstration) -> int:
        return len(row.prompt) + sum(len(span.text) for span in row.spans)

    def encode_longest() -> None:
        for row in sorted(demonstrations, key=num_characters, reverse=True)[:_NUM_DEMONSTRATIONS]:
            demonstration_sample(row, renderer, budget)

    attempt(lambda: check_profile(demonstrations, profile), "train.demonstrations", problems)
    attempt(encode_longest, "train.max_tokens_per_microbatch", problems)
    return problems


def _retrieval_problems(retrieval: RetrievalConfig) -> list[ConfigError]:
    """Check the settings of a remote search engine without a request; tantivy checks its index when it opens."""
    problems: list[ConfigError] = []
    elastic, field = retrieval.elasticsearch, "retrieval.elasticsearch.encoder"
    if retrieval.engine == "http":
        attempt(lambda: check_url(retrieval.http.url), "retrieval.http.url", problems)
    elif retrieval.engine == "elasticsearch":
        encoder = elastic.encoder
        if encoder is not None and elastic.mode != "bm25" and (encoder / "config.json").is_file():
            attempt(lambda: read_encoder_settings(encoder, field), field, problems)
        attempt(lambda: asyncio.run(_make_client(elastic)), "retrieval.elasticsearch", problems)
    return problems


async def _make_client(elastic: ElasticsearchConfig) -> None:
    try:
        from megatron_sdsearch.retrieval.elasticsearch_client import ElasticsearchClient, read_credentials
    except ModuleNotFoundError as error:
        raise client_is_missing(error) from error
    await ElasticsearchClient(elastic, read_credentials(elastic)).api.close()  # opens no connection
