"""Check search engine and SGLang servers: the index, free ports, and with ``--online`` the servers' answers."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_sdsearch.check.contents import cut_observations, titles
from megatron_sdsearch.check.findings import Finding, errors, note, warning
from megatron_sdsearch.check.run_under_test import RunUnderTest
from megatron_sdsearch.config import ReplayConfig, RetrievalConfig
from megatron_sdsearch.data.scoring import contains_answer
from megatron_sdsearch.errors import ConfigError, EngineError
from megatron_sdsearch.model.hf_config import read_hf_config
from megatron_sdsearch.records import Passage, Question
from megatron_sdsearch.retrieval.corpus import CorpusRow, sha256_of_corpus
from megatron_sdsearch.retrieval.engines import open_retriever
from megatron_sdsearch.retrieval.tantivy_index import Manifest, check_writable, find_built, index_root
from megatron_sdsearch.sglang.api import SGLangServer
from megatron_sdsearch.sglang.rules import server_problems
from megatron_sdsearch.sglang.servers import find_obstacle, free_ports
from megatron_sdsearch.training.preflight import attempt

_NUM_QUERIES = 20
_HASHED_OFFLINE_BYTES = 1 << 30
"""Larger files take too long to read for an offline check."""
_ANSWER_S = 10.0


def check_servers(run: RunUnderTest) -> Iterator[Finding]:
    """Check the engines that the run searches with and samples from."""
    retrieval = run.config.retrieval
    if retrieval is not None and retrieval.replay.mode != "only":
        is_wrong = any(problem.field.startswith("retrieval.") for problem in run.files.problems)
        if retrieval.engine == "tantivy":
            yield from _index(run, retrieval)
        elif not run.is_online:
            yield note("retrieval.engine", f"{retrieval.engine} was not contacted; use --online")
        elif not is_wrong:
            yield from _ask(run, retrieval, f"retrieval.{retrieval.engine}")
    if not run.config.samples_from_sglang:
        return
    sglang, problems = run.config.rollout.sglang, list[ConfigError]()
    if sglang.urls and not run.is_online:
        yield note("rollout.sglang.urls", f"{len(sglang.urls)} servers were not contacted; use --online")
    elif sglang.urls:
        for url in sglang.urls:
            yield from _attached(run, url)
    elif not run.cluster.num_sglang_nodes:
        attempt(lambda: free_ports(sglang.num_servers, "127.0.0.1"), "rollout.sglang.num_servers", problems)
        yield from errors(problems)


def _index(run: RunUnderTest, retrieval: RetrievalConfig) -> Iterator[Finding]:
    """Look for the index; training builds a missing one, but a check writes no files."""
    corpus, field, problems = retrieval.corpus, "retrieval.corpus", list[ConfigError]()
    if corpus is None or not corpus.is_file():
        return
    root = index_root(corpus, retrieval.index)
    if not run.is_online and corpus.stat().st_size > _HASHED_OFFLINE_BYTES:
        yield note(field, f"too large to compare offline with the indices in {root}; use --online")
        return
    index = find_built(root, sha256_of_corpus(corpus), retrieval.analyzer)
    manifest = None if index is None else Manifest.read(index)
    if manifest is not None:
        yield note(field, f"{index} holds its {manifest.num_passages:,} passages")
        if run.is_online:
            yield from _ask(run, retrieval, field)
        return
    attempt(lambda: check_writable(root, corpus, "retrieval.index"), "retrieval.index", problems)
    yield from errors(problems)
    if not problems:
        problem = f"no {retrieval.analyzer} index in {root} yet: training builds it, or tools/index_corpus.py"
        yield note(field, problem)


def _ask(run: RunUnderTest, retrieval: RetrievalConfig, field: str) -> Iterator[Finding]:
    """Check the engine's version and size, and search for questions."""
    questions, problems = (run.files.train or run.files.heldout)[:_NUM_QUERIES], list[ConfigError]()
    answers = attempt(lambda: asyncio.run(_search(retrieval, questions)), field, problems)
    yield from errors(problems)
    if answers is None:
        return
    num_passages, version_warning, found = answers
    if version_warning:
        fix = "install the client of the cluster's major"
        yield warning("retrieval.elasticsearch.urls", version_warning, fix)
    if num_passages is not None:
        yield note(field, f"{num_passages:,} passages behind {retrieval.engine}")
    answered = [passages for passages in found if passages]
    if len(answered) * 2 < len(questions):
        yield warning(
            field,
            f"{len(questions) - len(answered)} of {len(questions)} questions, asked as they are, match nothing",
            "check that index, fields and analyzer are those of the questions' language and corpus",
        )
    if not answered:
        return
    pairs = zip(questions, found, strict=True)
    num_right = sum(contains_answer(" ".join(p.contents for p in hits), q.gold_answers) for q, hits in pairs)
    yield note(
        field,
        f"{len(answered)} of {len(questions)} questions, asked as they are, have hits; in {num_right} a gold answer "
        f"stands in the first {retrieval.top_k}",
    )
    if (most := max(map(len, answered))) < retrieval.top_k:
        problem = f"{retrieval.top_k}, and no query returned more than {most} passages"
        yield warning("retrieval.top_k", problem, f"set it to {most}")
    if retrieval.engine != "tantivy":  # the corpus's own rows have been looked at
        rows = [CorpusRow(id=p.passage_id, contents=p.contents) for hits in answered for p in hits if p.contents]
        yield from titles(field, rows)
        yield from cut_observations(run, answered)


async def _search(
    retrieval: RetrievalConfig, questions: Sequence[Question]
) -> tuple[int | None, str, list[Sequence[Passage]]]:
    """Return the number of passages, a warning about the version, and the passages found for each question."""
    without_store = retrieval.model_copy(update={"replay": ReplayConfig()})  # which a check does not change
    retriever = await open_retriever(without_store)
    try:
        found = await asyncio.gather(*(retriever.search(q.text, top_k=retrieval.top_k) for q in questions))
        return getattr(retriever, "num_passages", None), getattr(retriever, "version_warning", ""), found
    finally:
        await retriever.close()


def _attached(run: RunUnderTest, url: str) -> Iterator[Finding]:
    """Check model and settings of an attached SGLang server."""
    field, problems = "rollout.sglang.urls", list[ConfigError]()
    obstacle = attempt(lambda: find_obstacle(url, _ANSWER_S), field, problems)
    if obstacle:
        problem = f"{url}/model_info does not answer: {obstacle}"
        problems.append(ConfigError(field, problem, "start it, or correct the address"))
    if problems:
        yield from errors(problems)
        return
    server = SGLangServer(url, timeout_s=_ANSWER_S)
    served = attempt(lambda: asyncio.run(server.call("/model_info")), field, [])
    yield from errors(_model_problems(run, url, served or {}))
    fix = "attach to SGLang itself, without a router in between"
    try:
        info = asyncio.run(server.call("/server_info"))
    except EngineError as error:
        yield warning(field, str(error), fix)
        return
    yield note(field, f"{url} is SGLang {info.get('version')}")
    yield from errors(server_problems(run.config, url, info))
    if not isinstance(info.get("max_req_input_len"), int):
        yield warning(field, f"{url} does not report its longest request (max_req_input_len)", fix)


def _model_problems(run: RunUnderTest, url: str, info: Mapping[str, Any]) -> Iterator[ConfigError]:
    """Check that the served model has the policy's shapes, since it receives the policy's weights."""
    field, fix, hf_config = "rollout.sglang.urls", "start it with model.hf_dir", run.files.hf_config
    if info.get("is_generation") is False:
        yield ConfigError(field, f"{url} serves an embedding model", "start it with the policy's model")
    served = info.get("model_type")
    if hf_config is not None and served and served != hf_config.model_type:
        yield ConfigError(field, f"{url} serves a {served}, the policy is a {hf_config.model_type}", fix)
    path, hf_dir = Path(str(info.get("model_path"))), run.config.model.hf_dir
    if hf_config is None or not path.is_dir() or not hf_dir.is_dir() or os.path.samefile(path, hf_dir):
        return
    served_config = attempt(lambda: read_hf_config(path), field, [])
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings"):
        own, other = getattr(hf_config, name, None), getattr(served_config, name, None)
        if served_config is not None and own != other:
            yield ConfigError(field, f"{url} serves {path} with {name} = {other}, the policy has {own}", fix)
