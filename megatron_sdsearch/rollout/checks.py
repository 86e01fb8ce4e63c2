"""Checks of prompts, requests and models: too long, crashing a model or a server, or computed wrongly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from megatron_sdsearch.data.prompts import PromptProfile
from megatron_sdsearch.errors import ConfigError, EngineError
from megatron_sdsearch.records import Question
from megatron_sdsearch.rollout.engine import GenerationRequest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from megatron_sdsearch.tokenization.renderer import Renderer

_SAMPLE_SIZE = 200


def prompt_lengths(questions: Sequence[Question], renderer: Renderer, profile: PromptProfile) -> dict[str, int]:
    """Return the number of tokens of each question's prompt, by question id."""
    return {q.question_id: len(renderer.prompt_ids(profile.user_text(q.text))) for q in questions}


def prompt_problems(
    questions: Sequence[Question], field: str, renderer: Renderer, profile: PromptProfile, limit: int
) -> Iterator[ConfigError]:
    """Report that the prompts of all questions are too long; nothing if one fits or there is no question.

    Args:
        questions: of a data set.
        field: the setting with their file.
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
        f"{limit}, but the prompts of all {len(questions)} questions of {field} are longer (the shortest has "
        f"{min(lengths)} tokens), so no trajectory would be sampled",
        f"set it to at least {max(lengths)}",
    )


def check_request(request: GenerationRequest, vocab_size: int, max_total_tokens: int) -> None:
    """Check that a request neither crashes a model nor exceeds its context.

    Raises:
        EngineError: an id outside ``[0, vocab_size)``, no prompt, nothing to sample, or more than ``max_total_tokens``.
    """
    ids, params = request.prompt_ids, request.params
    if not ids or params.max_new_tokens < 1:
        raise EngineError(
            f"{request.trajectory_id}: {len(ids)} prompt tokens and {params.max_new_tokens} tokens to sample; "
            "both must be at least 1"
        )
    if min(ids) < 0 or max(ids) >= vocab_size:
        wrong = next(i for i in ids if not 0 <= i < vocab_size)
        raise EngineError(
            f"{request.trajectory_id}: token id {wrong} is outside the model's vocabulary of {vocab_size}; "
            "tokenizer and model do not match"
        )
    if len(ids) + params.max_new_tokens > max_total_tokens:
        raise EngineError(
            f"{request.trajectory_id}: {len(ids)} prompt tokens + {params.max_new_tokens} tokens to sample exceed "
            f"{max_total_tokens}; raise rollout.max_total_tokens or sample less"
        )
    if params.temperature < 0.0 or not 0.0 < params.top_p <= 1.0:
        raise EngineError(f"{request.trajectory_id}: invalid temperature {params.temperature} or top_p {params.top_p}")


def check_model(model: PreTrainedModel, max_total_tokens: int) -> None:
    """Check that a model works with the embedded engine's masks and cache.

    Raises:
        EngineError: sliding-window or linear attention, another attention than sdpa, or too few positions.
    """
    config = model.config
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    if layer_types != {"full_attention"} or getattr(config, "sliding_window", None) is not None:
        raise EngineError(
            f"{type(model).__name__} has layers without full attention; use a model without"
            " sliding windows or linear attention"
        )
    if config._attn_implementation != "sdpa":
        raise EngineError(f"attention is {config._attn_implementation}; load the model with attn_implementation='sdpa'")
    if max_total_tokens > config.max_position_embeddings:
        raise EngineError(
            f"the model has {config.max_position_embeddings} positions, fewer than rollout.max_total_tokens = "
            f"{max_total_tokens}; lower that"
        )
