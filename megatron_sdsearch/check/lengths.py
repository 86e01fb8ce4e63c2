"""Token budgets against each other, against the model, and against what the data really take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from statistics import median

from megatron_sdsearch.check.findings import Attempt, Finding, Severity
from megatron_sdsearch.check.subject import Subject, some_of
from megatron_sdsearch.model.hf_config import length_problems
from megatron_sdsearch.records import Passage, Question
from megatron_sdsearch.retrieval.corpus import read_corpus
from megatron_sdsearch.rollout.checks import check_prompts, prompt_lengths
from megatron_sdsearch.rollout.episode import ObservationWriter
from megatron_sdsearch.tokenization.renderer import Renderer

_NUM_PASSAGES = 200


def check(subject: Subject) -> Iterator[Finding]:
    """Of rollouts; the demonstrations of a warm start are measured with the data."""
    if not subject.is_rl:
        return
    hf_config, renderer = subject.hf_config.value, subject.renderer.value
    if hf_config is not None and hasattr(hf_config, "max_position_embeddings"):
        for problem in length_problems(hf_config, subject.config):
            yield Finding.of(problem, problem.field)
    if renderer is not None:
        found = list(_prompts(subject, renderer, "data.train", subject.train_questions.value or ()))
        yield from found
        if subject.config.evaluation.every and not any(finding.severity is Severity.ERROR for finding in found):
            number = subject.config.evaluation.num_questions
            yield from _prompts(subject, renderer, "data.heldout", (subject.heldout_questions.value or ())[:number])
        yield from _observations(subject, renderer)


def _prompts(subject: Subject, renderer: Renderer, field: str, questions: Sequence[Question]) -> Iterator[Finding]:
    if not questions:
        return
    profile, limit = subject.profile, subject.config.rollout.max_prompt_tokens
    lengths = prompt_lengths(some_of(questions), renderer, profile)
    longest = max(lengths, key=lambda name: lengths[name])
    typical = int(median(lengths.values()))
    yield Finding.note(
        "rollout.max_prompt_tokens",
        f"prompts of {field} have {typical} tokens at the median of {len(lengths)} questions, {lengths[longest]} at "
        f"the most ({longest})",
    )
    num_over = sum(length > limit for length in lengths.values())
    attempt = Attempt.at(lambda: check_prompts(questions, field, renderer, profile, limit))
    if attempt.error is not None:
        yield Finding.of(attempt.error, "rollout.max_prompt_tokens")
    elif num_over:
        effect = "left out of training" if field == "data.train" else "counted as wrong answers"
        yield Finding.warning(
            "rollout.max_prompt_tokens",
            f"{limit}, and {num_over} of {len(lengths)} questions of {field} looked at have longer prompts, such as "
            f"{longest} with {lengths[longest]} tokens: they would be {effect}",
            f"set it to at least {lengths[longest]}, or remove them",
        )
    if field == "data.train":
        yield from _turns(subject, min(typical, limit))


def _turns(subject: Subject, num_prompt_tokens: int) -> Iterator[Finding]:
    """How many searches fit when every budget is used up; the last generation has its place as well."""
    rollout = subject.config.rollout
    turn = rollout.max_response_tokens + rollout.max_observation_tokens
    room = rollout.max_total_tokens - num_prompt_tokens - rollout.max_response_tokens
    num_turns = max(0, room // turn)
    if num_turns < rollout.max_turns:
        needed = num_prompt_tokens + rollout.max_turns * turn + rollout.max_response_tokens
        yield Finding.warning(
            "rollout.max_total_tokens",
            f"{rollout.max_total_tokens} holds {num_turns} searches of full length behind a prompt of "
            f"{num_prompt_tokens} tokens, and rollout.max_turns is {rollout.max_turns}: long trajectories are cut",
            f"set it to {needed}, or lower max_turns, max_response_tokens or max_observation_tokens",
        )


def _observations(subject: Subject, renderer: Renderer) -> Iterator[Finding]:
    config, retrieval = subject.config, subject.config.retrieval
    limit = config.rollout.max_observation_tokens
    attempt = Attempt.at(lambda: ObservationWriter(renderer, subject.profile, limit))
    if attempt.error is not None:
        yield Finding.of(attempt.error, "rollout.max_observation_tokens")
        return
    if retrieval is None or retrieval.engine != "tantivy" or retrieval.corpus is None or not retrieval.corpus.exists():
        return
    path, top_k = retrieval.corpus, retrieval.top_k
    rows = Attempt.at(lambda: list(islice(read_corpus(path), _NUM_PASSAGES))).value or []
    passages = [Passage(passage_id=row.id, contents=row.contents, score=0.0) for row in rows]
    groups = [passages[start : start + top_k] for start in range(0, len(passages) - top_k + 1, top_k)]
    yield from cut_observations(subject, renderer, groups)


def cut_observations(subject: Subject, renderer: Renderer, groups: list[list[Passage]]) -> Iterator[Finding]:
    """Whether most observations would be cut; each group is what one search might return."""
    limit, profile = subject.config.rollout.max_observation_tokens, subject.profile
    lengths = [len(renderer.encode(profile.observation(profile.format_passages(group)))) for group in groups]
    if lengths and (typical := int(median(lengths))) > limit:
        top_k = max(map(len, groups))
        yield Finding.warning(
            "rollout.max_observation_tokens",
            f"{limit}, and {top_k} passages take {typical} tokens at the median of {len(lengths)} samples: most "
            "observations are cut, and the last passages never seen",
            f"set it to about {max(lengths)}, or lower retrieval.top_k",
        )
