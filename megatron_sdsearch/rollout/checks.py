"""Refuse before it starts what would fail or go wrong: prompts too long to ask, requests that would crash a model or a
server, and models that an engine would run wrongly.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from megatron_sdsearch.config import RunConfig
from megatron_sdsearch.data.prompts import PromptProfile
from megatron_sdsearch.errors import ConfigError, EngineError
from megatron_sdsearch.records import Question
from megatron_sdsearch.rollout.engine import GenerationRequest
from megatron_sdsearch.rollout.sglang_api import OLDEST_VERSION, TESTED_VERSION

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from megatron_sdsearch.tokenization.renderer import Renderer

_SAMPLE_SIZE = 200
CONTEXT_RESERVE = 6
"""Tokens of its context that an SGLang server keeps from a prompt and the token after it: ``max_req_input_len`` is the
context, or what fits its cache, less so many, and a prompt must be shorter still (tp_worker.py and utils.py, 0.5.23).
The last two tokens of the context are never sampled."""


def prompt_lengths(questions: Sequence[Question], renderer: Renderer, profile: PromptProfile) -> dict[str, int]:
    """Tokens of each question's prompt, by the question's id."""
    return {q.question_id: len(renderer.prompt_ids(profile.user_text(q.text))) for q in questions}


def prompt_problems(
    questions: Sequence[Question], field: str, renderer: Renderer, profile: PromptProfile, limit: int
) -> Iterator[ConfigError]:
    """List the one problem that no question can be asked; texts are looked at from the shortest on.

    Args:
        questions: of a data set; none at all are fine.
        field: the setting that names them.
        renderer: of the run's tokenizer.
        profile: instructions and tags.
        limit: ``rollout.max_prompt_tokens``.
    """
    by_length = sorted(questions, key=lambda question: len(question.text))
    shortest, longest = by_length[:_SAMPLE_SIZE], by_length[-_SAMPLE_SIZE:]
    if not questions or any(prompt_lengths([q], renderer, profile)[q.question_id] <= limit for q in shortest):
        return
    lengths = prompt_lengths([*shortest, *longest], renderer, profile).values()
    yield ConfigError(
        "rollout.max_prompt_tokens",
        f"{limit}, and the prompts of all {len(questions)} questions of {field} are longer, the shortest has "
        f"{min(lengths)} tokens: none of their trajectories would begin",
        f"set it to at least {max(lengths)}",
    )


def context_problems(config: RunConfig, where: str, max_req_input_len: int) -> Iterator[ConfigError]:
    """Whether an SGLang server takes the run's longest request.

    The last turn's prompt may be one token shorter than ``rollout.max_total_tokens``, and a server refuses a prompt of
    ``max_req_input_len`` tokens: the one must not exceed the other.

    Args:
        config: of the run.
        where: the server, for the message.
        max_req_input_len: as ``/server_info`` says it.
    """
    longest, settings = config.longest_rollout
    if longest > max_req_input_len:
        yield ConfigError(
            "rollout.max_total_tokens",
            f"{settings} makes requests of up to {longest} tokens, and {where} takes {max_req_input_len} "
            f"(max_req_input_len, {CONTEXT_RESERVE} less than its context or its cache)",
            f"lower it to {config.rollout.max_total_tokens - longest + max_req_input_len}, or start the server with "
            "more (--context-length, --mem-fraction-static)",
        )


def server_problems(config: RunConfig, url: str, info: Mapping[str, Any]) -> Iterator[ConfigError]:
    """List the settings that an SGLang server's /server_info contradicts."""
    sglang, field = config.rollout.sglang, "rollout.sglang.urls"
    tp_size, limit, version = info.get("tp_size"), info.get("max_req_input_len"), str(info.get("version"))
    if isinstance(tp_size, int) and tp_size != sglang.tp_size:
        problem = f"{sglang.tp_size}, and {url} runs with --tp-size {tp_size}"
        yield ConfigError("rollout.sglang.tp_size", problem, f"set it to {tp_size}")
    if isinstance(limit, int):
        yield from context_problems(config, url, limit)
    if sglang.colocated and info.get("enable_memory_saver") is False:
        problem = f"true, and {url} would keep its memory"
        yield ConfigError("rollout.sglang.colocated", problem, "start it with --enable-memory-saver")
    if info.get("skip_tokenizer_init"):
        yield ConfigError(field, f"{url} has no tokenizer, and stops are strings", "leave --skip-tokenizer-init out")
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:3])
    if numbers and numbers < tuple(int(number) for number in OLDEST_VERSION.split(".")):
        problem = f"{url} is SGLang {version}, older than {OLDEST_VERSION}"
        yield ConfigError(field, problem, f"use {TESTED_VERSION}")


def own_server_problems(config: RunConfig, hf_config: PretrainedConfig) -> Iterator[ConfigError]:
    """The same of servers that are not started yet, by their flags and the model's positions; none of attached ones."""
    sglang = config.rollout.sglang
    if not config.samples_from_sglang or sglang.urls:
        return
    positions = getattr(hf_config, "max_position_embeddings", None)
    context = _flag(sglang.arguments, "--context-length") or positions
    if context is not None:
        yield from context_problems(config, "a server that it starts", context - CONTEXT_RESERVE)


def _flag(arguments: Sequence[str], name: str) -> int | None:
    """The number given with a flag; None without one, or where it is no number."""
    words = [word for argument in arguments for word in argument.split("=", 1)]
    value = words[words.index(name) + 1 :][:1] if name in words else []
    return int(value[0]) if value and value[0].isdecimal() else None


def check_request(request: GenerationRequest, vocab_size: int, max_total_tokens: int) -> None:
    """Refuse what would crash a model or overrun its context.

    Raises:
        EngineError: an id outside ``[0, vocab_size)``, no prompt, nothing to sample, or more than ``max_total_tokens``.
    """
    ids, params = request.prompt_ids, request.params
    if not ids or params.max_new_tokens < 1:
        raise EngineError(
            f"{request.trajectory_id}: {len(ids)} prompt tokens and {params.max_new_tokens} to sample; "
            "both must be at least 1"
        )
    if min(ids) < 0 or max(ids) >= vocab_size:
        wrong = next(i for i in ids if not 0 <= i < vocab_size)
        raise EngineError(
            f"{request.trajectory_id}: token id {wrong} is outside the model's vocabulary of {vocab_size}; "
            "tokenizer and model do not belong together"
        )
    if len(ids) + params.max_new_tokens > max_total_tokens:
        raise EngineError(
            f"{request.trajectory_id}: {len(ids)} prompt tokens + {params.max_new_tokens} to sample exceed "
            f"{max_total_tokens}; raise rollout.max_total_tokens or ask for less"
        )
    if params.temperature < 0.0 or not 0.0 < params.top_p <= 1.0:
        raise EngineError(f"{request.trajectory_id}: temperature {params.temperature}, top_p {params.top_p}")


def check_model(model: PreTrainedModel, max_total_tokens: int) -> None:
    """Refuse a model that the embedded engine's masks and cache do not fit.

    Raises:
        EngineError: sliding-window or linear attention, another attention than sdpa, or too few positions.
    """
    config = model.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or getattr(config, "sliding_window", None) is not None:
        raise EngineError(
            f"{type(model).__name__} has other layers than full attention; take a model without"
            " sliding windows or linear attention"
        )
    if config._attn_implementation != "sdpa":
        raise EngineError(f"attention is {config._attn_implementation}; load the model with attn_implementation='sdpa'")
    if max_total_tokens > config.max_position_embeddings:
        raise EngineError(
            f"the model knows {config.max_position_embeddings} positions, fewer than rollout.max_total_tokens = "
            f"{max_total_tokens}; lower that"
        )
