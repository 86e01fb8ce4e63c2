"""Check the contents of a run's files: useless questions, real lengths of prompts and observations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from statistics import median

from megatron_sdsearch.check.findings import Finding, errors, note, warning
from megatron_sdsearch.check.run_under_test import RunUnderTest
from megatron_sdsearch.config import RunConfig
from megatron_sdsearch.data.prompts import get_profile
from megatron_sdsearch.data.scoring import normalize_answer
from megatron_sdsearch.errors import ConfigError
from megatron_sdsearch.records import Passage, Question
from megatron_sdsearch.retrieval.corpus import CorpusRow, read_corpus
from megatron_sdsearch.rollout.checks import prompt_lengths, prompt_problems
from megatron_sdsearch.tokenization.renderer import Renderer
from megatron_sdsearch.tokenization.spans import parse_action
from megatron_sdsearch.training.preflight import attempt

_MAX_SAMPLE = 400
_NUM_CORPUS_ROWS = 1000
_NUM_PASSAGES = 200


def check_contents(run: RunUnderTest) -> Iterator[Finding]:
    """Check questions, demonstrations, the corpus's first rows, model and tokenizer; unreadable ones are skipped."""
    config, files = run.config, run.files
    per_step = config.data.questions_per_step if config.is_rl else config.train.demonstrations_per_step
    for field, rows in {"data.train": files.train, "train.demonstrations": files.demonstrations}.items():
        if rows:
            passes = config.train.num_steps * per_step / len(rows)
            yield note(field, f"{len(rows):,} rows; the run reads each {passes:.4g} times")
    for field, questions in {"data.train": files.train, "data.heldout": files.heldout}.items():
        yield from _answers(field, questions)
    yield from _overlap(files.train, files.heldout)
    yield from _model(run)
    if files.renderer is not None and config.is_rl:
        yield from _prompts(config, files.renderer, "data.train", files.train)
        if config.evaluation.every:
            heldout = files.heldout[: config.evaluation.num_questions]
            yield from _prompts(config, files.renderer, "data.heldout", heldout)
    yield from _corpus(run)


def _answers(field: str, questions: Sequence[Question]) -> Iterator[Finding]:
    # SQuAD's normalisation leaves nothing of an answer such as "The", so it is compared verbatim.
    bare = [q for q in questions if not any(normalize_answer(gold) for gold in q.gold_answers)]
    if bare:
        yield warning(
            field,
            f"{len(bare)} questions have gold answers of only articles and punctuation, which must be matched "
            f"character for character, such as {bare[0].question_id} ({bare[0].gold_answers[0]!r})",
            "remove them, or add an answer in words",
        )


def _overlap(train: Sequence[Question], heldout: Sequence[Question]) -> Iterator[Finding]:
    ids = {question.question_id for question in train}
    texts = {normalize_answer(question.text) for question in train}
    shared = [q for q in heldout if q.question_id in ids or normalize_answer(q.text) in texts]
    if shared:
        yield warning(
            "data.heldout",
            f"{len(shared)} of {len(heldout)} held-out questions are training questions, such as "
            f"{shared[0].question_id}: {shared[0].text!r:.80}",
            "remove them from one of the two files: evaluation would measure memory",
        )


def _model(run: RunUnderTest) -> Iterator[Finding]:
    hf_config, renderer, field = run.files.hf_config, run.files.renderer, "model.hf_dir"
    if hf_config is None or renderer is None:
        return
    how = "one user message of its chat template" if renderer.has_template else "raw text: it has no chat template"
    yield note(field, f"{hf_config.model_type}; prompts ({run.config.data.prompt_profile}) are {how}")
    action = parse_action(renderer.token_bytes.lookup(renderer.encode_own("<search> capital of France 1998 </search>")))
    if not action.query_positions:
        problem = "every token of a search's query shares characters with a tag: nothing can be distilled"
        yield warning(field, problem, "add the tags to the tokenizer as ordinary (not special) tokens")
    configured = getattr(hf_config, "eos_token_id", None)
    eos_ids: set[int] = set(configured if isinstance(configured, list) else () if configured is None else (configured,))
    if not renderer.eos_ids:
        problem = "there is no end-of-sequence token: only tags and budgets end a generation"
        yield warning(field, problem, "set eos_token")
    elif lost := eos_ids - renderer.eos_ids:
        yield warning(
            field,
            f"config.json ends sequences with {sorted(lost)}, the tokenizer with {sorted(renderer.eos_ids)}: the "
            "former would not end a generation",
            "list all of them as eos_token_id in generation_config.json",
        )


def _prompts(config: RunConfig, renderer: Renderer, field: str, questions: Sequence[Question]) -> Iterator[Finding]:
    """Measure the prompts of the longest questions, and of others from the whole file."""
    profile, limit = get_profile(config.data.prompt_profile), config.rollout.max_prompt_tokens
    if not questions or any(prompt_problems(questions, field, renderer, profile, limit)):
        return
    longest_questions = sorted(questions, key=lambda question: -len(question.text))[: _MAX_SAMPLE // 2]
    spread = questions[:: max(1, len(questions) // (_MAX_SAMPLE // 2))]
    lengths = prompt_lengths([*longest_questions, *spread], renderer, profile)
    longest, typical = max(lengths, key=lambda name: lengths[name]), int(median(lengths.values()))
    yield note(
        "rollout.max_prompt_tokens",
        f"prompts of {field} have {typical} tokens at the median of {len(lengths)} questions, {lengths[longest]} at "
        f"the most ({longest})",
    )
    if num_over := sum(length > limit for length in lengths.values()):
        effect = "left out of training" if field == "data.train" else "counted as wrong answers"
        yield warning(
            "rollout.max_prompt_tokens",
            f"{limit}, but {num_over} of {len(lengths)} sampled questions of {field} have longer prompts, such as "
            f"{longest} with {lengths[longest]} tokens: they would be {effect}",
            f"set it to at least {lengths[longest]}, or remove them",
        )
    if field == "data.train":
        yield from _turns(config, min(typical, limit))


def _turns(config: RunConfig, num_prompt_tokens: int) -> Iterator[Finding]:
    """Count the searches that fit when every budget is used up, including the last generation."""
    rollout = config.rollout
    turn = rollout.max_response_tokens + rollout.max_observation_tokens
    fixed = num_prompt_tokens + rollout.max_response_tokens
    num_turns = max(0, (rollout.max_total_tokens - fixed) // turn)
    if num_turns < rollout.max_turns:
        yield warning(
            "rollout.max_total_tokens",
            f"{rollout.max_total_tokens} holds {num_turns} searches of full length after a prompt of "
            f"{num_prompt_tokens} tokens, but rollout.max_turns is {rollout.max_turns}: long trajectories are cut",
            f"set it to {fixed + rollout.max_turns * turn}, or lower max_turns, max_response_tokens or "
            "max_observation_tokens",
        )


def _corpus(run: RunUnderTest) -> Iterator[Finding]:
    retrieval = run.config.retrieval
    if retrieval is None or retrieval.engine != "tantivy" or retrieval.corpus is None or not retrieval.corpus.is_file():
        return
    corpus, top_k = retrieval.corpus, retrieval.top_k
    problems: list[ConfigError] = []
    rows = attempt(lambda: list(islice(read_corpus(corpus), _NUM_CORPUS_ROWS)), "retrieval.corpus", problems) or []
    yield from errors(problems)
    yield from titles("retrieval.corpus", rows)
    passages = [Passage(passage_id=row.id, contents=row.contents, score=0.0) for row in rows[:_NUM_PASSAGES]]
    groups = [passages[start : start + top_k] for start in range(0, len(passages) - top_k + 1, top_k)]
    yield from cut_observations(run, groups)


def titles(field: str, rows: Sequence[CorpusRow]) -> Iterator[Finding]:
    """Find passages without a title: prompts show ``Doc 1(Title: <first line>) <text>``."""
    bare = [row for row in rows if not row.title_and_text()[0]]
    if len(bare) * 2 > len(rows):
        yield warning(
            field,
            f"{len(bare)} of {len(rows)} sampled passages have no title line, such as {bare[0].id}: all of their "
            "text would be shown as a title",
            'write contents as "Title"\\ntext',
        )


def cut_observations(run: RunUnderTest, groups: Sequence[Sequence[Passage]]) -> Iterator[Finding]:
    """Find out if most observations would be cut; each group is what one search might return."""
    renderer, profile = run.files.renderer, get_profile(run.config.data.prompt_profile)
    limit = run.config.rollout.max_observation_tokens
    if renderer is None or not run.config.is_rl:
        return
    lengths = [len(renderer.encode(profile.observation(profile.format_passages(group)))) for group in groups]
    if lengths and (typical := int(median(lengths))) > limit:
        yield warning(
            "rollout.max_observation_tokens",
            f"{limit}, but {max(map(len, groups))} passages take {typical} tokens at the median of {len(lengths)} "
            "samples: most observations are cut, and the last passages never seen",
            f"set it to about {max(lengths)}, or lower retrieval.top_k",
        )
