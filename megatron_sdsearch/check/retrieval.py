"""The search engine: its settings, and with ``--online`` what it answers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_sdsearch.check.data import without_title
from megatron_sdsearch.check.findings import Attempt, Finding
from megatron_sdsearch.check.lengths import cut_observations
from megatron_sdsearch.check.subject import Subject
from megatron_sdsearch.config import ElasticsearchConfig, ReplayConfig, RetrievalConfig
from megatron_sdsearch.data.scoring import contains_answer
from megatron_sdsearch.records import Passage, Question
from megatron_sdsearch.retrieval.corpus import CorpusRow, sha256_of_corpus
from megatron_sdsearch.retrieval.encoder import read_encoder_settings
from megatron_sdsearch.retrieval.http import check_url
from megatron_sdsearch.retrieval.tantivy_index import Manifest, check_writable, find_built, index_root
from megatron_sdsearch.training.retrievers import client_is_missing, open_retriever

_NUM_QUERIES = 20
_HASHED_OFFLINE_BYTES = 1 << 30
"""Reading more takes longer than a check may."""


def check(subject: Subject) -> Iterator[Finding]:
    """Settings first; the engine is asked only where they hold."""
    config = subject.config.retrieval
    if config is None:
        return
    if config.replay.mode == "only":
        yield Finding.note("retrieval.replay", "only: the engine is never opened, unknown queries are errors")
        return
    offline = list(_settings(config, is_online=subject.is_online))
    yield from offline
    if any(finding.severity == "error" for finding in offline):
        return
    if not subject.is_online:
        if config.engine != "tantivy":
            yield Finding.note("retrieval.engine", f"{config.engine} was not asked; --online does")
    elif config.engine != "tantivy" or _has_index(config):
        yield from _ask(subject, config)


def _settings(config: RetrievalConfig, *, is_online: bool) -> Iterator[Finding]:
    if config.engine != "tantivy" and config.index is not None:
        problem = f"{config.index}, and only tantivy keeps an index there"
        yield Finding.warning("retrieval.index", problem, "drop it")
    if config.engine != "tantivy" and config.analyzer != RetrievalConfig.model_fields["analyzer"].default:
        told = f"{config.analyzer}, and {config.engine} has its own: only tantivy reads this key"
        yield Finding.warning("retrieval.analyzer", told, "drop it, and index with the analyzer that you want")
    if config.engine == "tantivy":
        yield from _tantivy(config, is_online=is_online)
    elif config.engine == "elasticsearch":
        yield from _elasticsearch(config.elasticsearch)
    else:
        attempt = Attempt.at(lambda: check_url(config.http.url))
        if attempt.error is not None:
            yield Finding.of(attempt.error, "retrieval.http.url")


def _tantivy(config: RetrievalConfig, *, is_online: bool) -> Iterator[Finding]:
    corpus = config.corpus
    if corpus is None or not corpus.exists():
        return
    root = index_root(corpus, config.index)
    if not is_online and corpus.stat().st_size > _HASHED_OFFLINE_BYTES:
        yield Finding.note("retrieval.corpus", f"too large to compare with the indices in {root}; --online does")
        return
    index = find_built(root, sha256_of_corpus(corpus), config.analyzer)
    manifest = None if index is None else Manifest.read(index)
    if manifest is not None:
        yield Finding.note("retrieval.corpus", f"{index} holds its {manifest.num_passages:,} passages")
        return
    attempt = Attempt.at(lambda: check_writable(root, corpus, "retrieval.index"))
    if attempt.error is not None:
        yield Finding.of(attempt.error, "retrieval.index")
        return
    yield Finding.note(
        "retrieval.corpus", f"no {config.analyzer} index in {root} yet: training builds it; tools/index_corpus.py would"
    )


def _has_index(config: RetrievalConfig) -> bool:
    """Training builds one by itself; a check leaves no files behind."""
    corpus = config.corpus
    if corpus is None or not corpus.exists():
        return False
    return find_built(index_root(corpus, config.index), sha256_of_corpus(corpus), config.analyzer) is not None


def _elasticsearch(config: ElasticsearchConfig) -> Iterator[Finding]:
    encoder, field = config.encoder, "retrieval.elasticsearch.encoder"
    # Without a model in it the configuration's section has said so.
    if encoder is not None and config.mode != "bm25" and (encoder / "config.json").is_file():
        settings = Attempt.at(lambda: read_encoder_settings(encoder, field))
        yield Finding.of(settings.error, field) if settings.error else Finding.note(field, str(settings.value))
    try:
        from megatron_sdsearch.retrieval.elasticsearch_client import ElasticsearchClient, read_credentials
    except ModuleNotFoundError as error:
        yield Finding.of(client_is_missing(error), "retrieval.engine")
        return

    async def connect_and_close() -> None:
        await ElasticsearchClient(config, read_credentials(config)).api.close()  # opens no connection

    attempt = Attempt.at(lambda: asyncio.run(connect_and_close()))
    if attempt.error is not None:
        yield Finding.of(attempt.error, "retrieval.elasticsearch")


@dataclass(frozen=True, slots=True)
class _Answers:
    """What an engine said of itself, and to some questions."""

    num_passages: int | None
    version_warning: str
    passages: Sequence[Sequence[Passage]]


def _ask(subject: Subject, config: RetrievalConfig) -> Iterator[Finding]:
    field = f"retrieval.{config.engine}" if config.engine != "tantivy" else "retrieval.corpus"
    questions = (subject.train_questions.value or subject.heldout_questions.value or ())[:_NUM_QUERIES]
    attempt = Attempt.at(lambda: asyncio.run(_search(config, questions)))
    if attempt.error is not None:
        yield Finding.of(attempt.error, field)
    if attempt.value is None:
        return
    answers = attempt.value
    if answers.version_warning:
        yield Finding.warning(
            "retrieval.elasticsearch.urls", answers.version_warning, "install the client of the cluster's major"
        )
    if answers.num_passages is not None:
        yield Finding.note(field, f"{answers.num_passages:,} passages behind {config.engine}")
    yield from _hits(subject, config, questions, answers.passages)


async def _search(config: RetrievalConfig, questions: Sequence[Question]) -> _Answers:
    """The questions themselves as queries, all at once."""
    retriever = await open_retriever(config.model_copy(update={"replay": ReplayConfig()}))  # the store stays as it is
    try:
        found = await asyncio.gather(*(retriever.search(q.text, top_k=config.top_k) for q in questions))
        return _Answers(getattr(retriever, "num_passages", None), getattr(retriever, "version_warning", ""), found)
    finally:
        await retriever.close()


def _hits(
    subject: Subject, config: RetrievalConfig, questions: Sequence[Question], found: Sequence[Sequence[Passage]]
) -> Iterator[Finding]:
    field = f"retrieval.{config.engine}" if config.engine != "tantivy" else "retrieval.corpus"
    if not questions:
        return
    answered = [passages for passages in found if passages]
    if len(answered) * 2 < len(questions):
        yield Finding.warning(
            field,
            f"{len(questions) - len(answered)} of {len(questions)} questions, asked as they are, match nothing",
            "check that index, fields and analyzer are those of the questions' language and corpus",
        )
    if not answered:
        return
    pairs = zip(questions, found, strict=True)
    num_right = sum(contains_answer(" ".join(p.contents for p in hits), q.gold_answers) for q, hits in pairs)
    yield Finding.note(
        field,
        f"{len(answered)} of {len(questions)} questions, asked as they are, have hits; in {num_right} a gold answer "
        f"stands in the first {config.top_k}",
    )
    if (most := max(map(len, answered))) < config.top_k:
        yield Finding.warning(
            "retrieval.top_k", f"{config.top_k}, and no query returned more than {most} passages", f"set it to {most}"
        )
    rows = [CorpusRow(id=p.passage_id, contents=p.contents) for hits in answered for p in hits if p.contents]
    yield from without_title(field, rows)
    if subject.is_rl and config.engine != "tantivy" and subject.renderer.value is not None:
        yield from cut_observations(subject, subject.renderer.value, [list(hits) for hits in answered])
