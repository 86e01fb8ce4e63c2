"""Questions, demonstrations and the corpus's first rows: readable, well formed, and apart from each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from megatron_sdsearch.batching.samples import demonstration_sample
from megatron_sdsearch.check.findings import Attempt, Finding
from megatron_sdsearch.check.subject import Subject
from megatron_sdsearch.data.demonstrations import Demonstration, check_profile, read_demonstrations
from megatron_sdsearch.data.prompts import get_profile
from megatron_sdsearch.data.scoring import normalize_answer
from megatron_sdsearch.records import Question
from megatron_sdsearch.retrieval.corpus import CorpusRow, read_corpus

_NUM_CORPUS_ROWS = 1000
_NUM_DEMONSTRATIONS = 200


def check(subject: Subject) -> Iterator[Finding]:
    """Files that the run reads; that one is missing at all is said of the configuration."""
    yield from _question_files(subject)
    yield from _overlap(subject)
    if subject.config.train.mode == "warm_start" and subject.config.train.demonstrations is not None:
        yield from _demonstrations(subject, subject.config.train.demonstrations)
    retrieval = subject.config.retrieval
    if retrieval is not None and retrieval.engine == "tantivy" and retrieval.corpus is not None:
        yield from _corpus(retrieval.corpus)


def _question_files(subject: Subject) -> Iterator[Finding]:
    for field, attempt in (("data.train", subject.train_questions), ("data.heldout", subject.heldout_questions)):
        if attempt.error is not None:
            yield Finding.of(attempt.error, field)
        if not attempt.value:
            continue
        datasets = sorted({question.dataset for question in attempt.value if question.dataset})
        of = f" of {', '.join(datasets[:8])}" if datasets else ""
        yield Finding.note(field, f"{len(attempt.value):,} questions{of}")
        yield from _compared_as_written(field, attempt.value)


def _compared_as_written(field: str, questions: Sequence[Question]) -> Iterator[Finding]:
    """SQuAD's normalisation leaves nothing of an answer such as "The", which is then compared as it is written."""
    bare = [q for q in questions if not any(normalize_answer(gold) for gold in q.gold_answers)]
    if bare:
        yield Finding.warning(
            field,
            f"{len(bare)} questions whose gold answers are articles and punctuation alone are answered right only "
            f"character for character, such as {bare[0].question_id} ({bare[0].gold_answers[0]!r})",
            "remove them, or add an answer in words",
        )


def _overlap(subject: Subject) -> Iterator[Finding]:
    train, heldout = subject.train_questions.value or (), subject.heldout_questions.value or ()
    ids = {question.question_id for question in train}
    texts = {normalize_answer(question.text) for question in train}
    shared = [q for q in heldout if q.question_id in ids or normalize_answer(q.text) in texts]
    if shared:
        yield Finding.warning(
            "data.heldout",
            f"{len(shared)} of {len(heldout)} held-out questions are training questions, such as "
            f"{shared[0].question_id}: {shared[0].text!r:.80}",
            "take them out of one of the two files: evaluation would measure memory",
        )
    wanted = subject.config.evaluation.num_questions
    if wanted is not None and heldout and wanted > len(heldout):
        yield Finding.warning(
            "evaluation.num_questions", f"{wanted} of {len(heldout)} held-out questions", "give null for all of them"
        )


def _demonstrations(subject: Subject, path: Path) -> Iterator[Finding]:
    if not path.exists():
        return
    attempt = Attempt.at(lambda: read_demonstrations(path))
    if attempt.error is not None:
        yield Finding.of(attempt.error, "train.demonstrations")
    if attempt.value is None:
        return
    train = subject.config.train
    passes = train.num_steps * train.demonstrations_per_step / len(attempt.value)
    yield Finding.note(
        "train.demonstrations", f"{len(attempt.value):,} demonstrations; the run reads each {passes:.3g} times"
    )
    shown = Attempt.at(lambda: check_profile(attempt.value or (), get_profile(subject.config.data.prompt_profile)))
    if shown.error is not None:
        yield Finding.of(shown.error, "train.demonstrations")
    yield from _longest(subject, attempt.value)


def _longest(subject: Subject, rows: Sequence[Demonstration]) -> Iterator[Finding]:
    renderer = subject.renderer.value
    if renderer is None:
        return
    budget = subject.config.train.max_tokens_per_microbatch

    def num_characters(row: Demonstration) -> int:
        return len(row.prompt) + sum(len(span.text) for span in row.spans)

    for row in sorted(rows, key=num_characters, reverse=True)[:_NUM_DEMONSTRATIONS]:
        attempt = Attempt.at(lambda row=row: demonstration_sample(row, renderer, budget))  # type: ignore[misc]
        if attempt.error is not None:
            yield Finding.error(
                "train.max_tokens_per_microbatch", str(attempt.error).rpartition(": ")[0], "shorten it or raise it"
            )
            return


def _corpus(path: Path) -> Iterator[Finding]:
    if not path.exists():
        return
    field = "retrieval.corpus"
    attempt = Attempt.at(lambda: list(islice(read_corpus(path), _NUM_CORPUS_ROWS)))
    if attempt.error is not None:
        yield Finding.of(attempt.error, field)
    if attempt.value is None:
        return
    yield Finding.note(
        field, f"{path.stat().st_size / 1e6:,.1f} MB; the first {len(attempt.value):,} rows are well formed"
    )
    yield from without_title(field, attempt.value)


def without_title(field: str, rows: Sequence[CorpusRow]) -> Iterator[Finding]:
    """Prompts show a passage as ``Doc 1(Title: <first line>) <rest>``."""
    bare = [row for row in rows if not row.title_and_text()[0]]
    if len(bare) * 2 > len(rows):
        yield Finding.warning(
            field,
            f"{len(bare)} of {len(rows)} passages looked at have no title line, such as {bare[0].id}: all of their "
            "text would be shown as a title",
            'write contents as "Title"\\ntext',
        )
