"""Evaluates a Hugging Face folder with stock transformers in one process, independent of the training code."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from megatron_sdsearch.config import RunConfig, no_model, path_problems
from megatron_sdsearch.data.prompts import get_profile
from megatron_sdsearch.data.questions import read_questions
from megatron_sdsearch.errors import ConfigError, DataError, raise_problems
from megatron_sdsearch.evaluation.metrics import require_sampled, summarize_datasets
from megatron_sdsearch.model.checkpoint_folder import run_date_of
from megatron_sdsearch.model.hf_weights import SafetensorsFolder
from megatron_sdsearch.retrieval.engines import open_retriever
from megatron_sdsearch.rollout.checks import prompt_problems
from megatron_sdsearch.rollout.collector import RolloutCollector
from megatron_sdsearch.rollout.plain import PlainEngine
from megatron_sdsearch.rollout.requests import one_group_each
from megatron_sdsearch.tokenization.renderer import Renderer


def evaluate_folder(config: RunConfig, model_dir: Path) -> dict[str, Any]:
    """Roll out ``data.heldout`` greedily with the model in ``model_dir``.

    A chat template that shows the date gets the date of the run in ``run_dir``, as in training; without a checkpoint
    there, today's.

    Returns:
        The model's path, and averages overall and by data set.

    Raises:
        ConfigError: held-out set, search engine or model are missing; the chat template cannot be used; or no prompt is
            short enough.
        DataError: a question, the tokenizer or a file of weights is damaged.
        RetrievalError: too many searches failed.
        TrainingError: there is no question, or all trajectories are lost.
    """
    if config.data.heldout is None or config.retrieval is None:
        raise ConfigError("data.heldout", "missing, but evaluation needs it", "set data.heldout and retrieval")
    if not (model_dir / "config.json").is_file():
        raise no_model("--model", model_dir)
    raise_problems(path_problems({"data.heldout": config.data.heldout, **config.retrieval.files()}))
    questions = read_questions(config.data.heldout)[: config.evaluation.num_questions]
    rollout, profile = config.rollout, get_profile(config.data.prompt_profile)
    renderer = Renderer.from_folder(
        model_dir,
        profile=profile,
        arguments=config.data.chat_template_arguments,
        run_date=run_date_of(config.run_dir),
        field="--model",
    )
    raise_problems(prompt_problems(questions, "data.heldout", renderer, profile, rollout.max_prompt_tokens))
    weights = SafetensorsFolder(model_dir)
    for name in weights.names():
        weights.shape(name)  # raises for a missing or truncated file
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    if broken := [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]:
        raise DataError(f"{model_dir}: {broken[0]} holds numbers that are NaN or infinite; export or download it again")
    model.to(device)
    engine = PlainEngine(model, renderer.token_bytes, renderer.eos_ids, rollout.max_total_tokens)
    runner = asyncio.Runner()
    collector = RolloutCollector(engine, runner.run(open_retriever(config.retrieval)), renderer, config, runner)
    try:
        slots = one_group_each(questions, step=0, group_size=1)
        collected = collector.collect(slots, policy_version=0, is_greedy=True)
        collected.lost.check(rollout.max_failed_search_share)
        require_sampled(collected.groups, "evaluation")
        return {"model": str(model_dir), **summarize_datasets(collected.groups)}
    finally:
        collector.close()
