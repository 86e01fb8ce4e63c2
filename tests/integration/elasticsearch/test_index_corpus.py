"""tools/index_corpus.py and what is under it, against a server that speaks Elasticsearch (noida-db).

Failures come from a proxy before it, interruptions from SIGKILL in the middle of a load.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import random
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
import requests
from aiohttp import web

from megatron_sdsearch.config import ElasticsearchConfig
from megatron_sdsearch.errors import ConfigError, RetrievalError
from megatron_sdsearch.retrieval.batched import BatchedRetriever
from megatron_sdsearch.retrieval.credentials import Credentials
from megatron_sdsearch.retrieval.elasticsearch import ElasticsearchBackend
from megatron_sdsearch.retrieval.elasticsearch_client import ElasticsearchClient
from megatron_sdsearch.retrieval.elasticsearch_index import IndexSettings
from megatron_sdsearch.retrieval.elasticsearch_load import (
    CorpusLoader,
    LoadReport,
    LoadSettings,
    RejectFile,
    scan_corpus,
)
from megatron_sdsearch.retrieval.encoder import Similarity, Vectors
from megatron_sdsearch.retrieval.tantivy_index import TantivyRetriever
from tests.integration.elasticsearch.conftest import serve

Json = dict[str, Any]
ROOT = Path(__file__).parents[3]
NUM_PASSAGES = 60
SETTINGS = LoadSettings(num_workers=3, chunk_passages=5, marker_interval_s=0.01, retry_limit_s=20.0)


def call(url: str, method: str = "GET", body: Json | None = None) -> Any:
    """The JSON answer; None for a 404."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 404:
                return None
            raise AssertionError(error.read()) from error


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a node for this module; each test deletes its indices."""
    with serve(tmp_path_factory.mktemp("noida")) as url:
        yield url


@pytest.fixture
def node(server: str) -> str:
    """The same, without any index."""
    for name in call(f"{server}/_alias"):
        call(f"{server}/{name}", "DELETE")
    return server


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    rows = [{"id": f"p{i}", "contents": f'"Title {i}"\nA canal number {i} of "all".'} for i in range(NUM_PASSAGES)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def contents_of(corpus: Path) -> dict[str, str]:
    rows = map(json.loads, corpus.read_text(encoding="utf-8").splitlines())
    return {row["id"]: row["contents"] for row in rows}


def load(
    url: str,
    corpus: Path,
    settings: LoadSettings = SETTINGS,
    *,
    encoder: Any = None,
    on_progress: Callable[[int], None] = lambda num_done: None,
    **index: Any,
) -> LoadReport:
    async def run() -> LoadReport:
        client = ElasticsearchClient(ElasticsearchConfig(urls=(url,), timeout_s=10.0), Credentials())
        if encoder is not None:
            index.update(encoder=encoder.fingerprint, num_dims=encoder.num_dims)
        async with client.api:
            return await CorpusLoader(
                corpus=corpus,
                scan=scan_corpus(corpus),
                client=client,
                index_settings=IndexSettings(name="wiki", **index),
                settings=settings,
                rejects=RejectFile(corpus.with_name("rejects.jsonl")),
                encoder=encoder,
                on_progress=on_progress,
            ).run()

    return asyncio.run(run())


def assert_loaded(node: str, corpus: Path, *, without: frozenset[str] = frozenset()) -> None:
    """Nothing twice, nothing missing, nothing written over, all behind the alias."""
    hits = call(f"{node}/wiki/_search?size=1000&version=true")["hits"]["hits"]
    assert len(hits) == NUM_PASSAGES - len(without)
    expected = {i: c for i, c in contents_of(corpus).items() if i not in without}
    assert {hit["_id"]: hit["_source"]["contents"] for hit in hits} == expected
    ids = [f"p{i}" for i in range(NUM_PASSAGES) if f"p{i}" not in without]
    docs = call(f"{node}/wiki/_mget", "POST", {"ids": ids})["docs"]
    assert {doc["_version"] for doc in docs} == {1}


def only_index(node: str) -> str:
    (name,) = call(f"{node}/_alias")
    return str(name)


def test_load_restores_settings_and_is_found_by_the_retriever(node: str, corpus: Path, tmp_path: Path) -> None:
    steps: list[int] = []
    report = load(node, corpus, on_progress=steps.append, num_replicas=2)
    assert (report.num_passages, report.num_created, report.num_found, report.num_skipped) == (NUM_PASSAGES, 60, 0, 0)
    assert_loaded(node, corpus)
    assert steps == sorted(steps)
    assert (steps[0], steps[-1]) == (0, NUM_PASSAGES)
    index = call(f"{node}/{report.index}")[report.index]
    assert index["aliases"].keys() == {"wiki"}
    assert "refresh_interval" not in index["settings"]["index"]
    assert index["settings"]["index"]["number_of_replicas"] == "2"
    assert index["settings"]["index"]["similarity"] == {"default": {"type": "BM25", "k1": "1.2", "b": "0.75"}}
    assert index["mappings"]["_meta"]["megatron_sdsearch"]["is_complete"] is True

    async def search() -> list[tuple[str, float]]:
        config = ElasticsearchConfig(urls=(node,), index="wiki")
        retriever = BatchedRetriever(await ElasticsearchBackend.open(config), config)
        try:
            return [(hit.passage_id, hit.score) for hit in await retriever.search("canal number 17", top_k=1)]
        finally:
            await retriever.close()

    own = TantivyRetriever.open_or_build(corpus, "standard", tmp_path / "index").search_now("canal number 17", 1)
    ((passage_id, score),) = asyncio.run(search())
    assert passage_id == own[0].passage_id == "p17"
    assert score == pytest.approx(own[0].score, rel=1e-5)


def test_second_load_does_nothing_and_another_corpus_takes_the_alias(node: str, corpus: Path) -> None:
    first = load(node, corpus)
    again = load(node, corpus)
    assert (again.index, again.num_created, again.num_skipped, again.old_indices) == (first.index, 0, NUM_PASSAGES, ())
    with pytest.raises(ConfigError, match=r"--restart: .* is complete"):
        load(node, corpus, replace(SETTINGS, is_restart=True))
    other = load(node, corpus, analyzer="english")
    assert other.old_indices == (first.index,)
    assert call(f"{node}/_alias") == {first.index: {"aliases": {}}, other.index: {"aliases": {"wiki": {}}}}
    back = load(node, corpus, replace(SETTINGS, deletes_old=True))
    assert (back.index, back.old_indices, back.num_created) == (first.index, (other.index,), 0)
    assert only_index(node) == first.index


def test_a_name_that_is_an_index_is_refused_before_anything_is_loaded(node: str, corpus: Path) -> None:
    call(f"{node}/wiki", "PUT", {})
    with pytest.raises(ConfigError, match="--index: 'wiki' is an index, and is to become an alias"):
        load(node, corpus)
    assert only_index(node) == "wiki"


def test_an_index_of_another_tool_is_left_alone(node: str, corpus: Path) -> None:
    name = load(node, corpus).index
    call(f"{node}/{name}", "DELETE")
    call(f"{node}/{name}", "PUT", {})
    for settings in (SETTINGS, replace(SETTINGS, is_restart=True)):
        with pytest.raises(ConfigError, match="was not made by this tool"):
            load(node, corpus, settings)
    assert only_index(node) == name


# Interruptions

_KILLED = """
import os, signal, sys
from dataclasses import replace
from pathlib import Path
from tests.integration.elasticsearch.test_index_corpus import SETTINGS, load
def at(num_done):
    if num_done >= int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
# Small chunks: what is done may jump ahead by what other workers have sent meanwhile.
load(sys.argv[1], Path(sys.argv[2]), replace(SETTINGS, chunk_passages=1), on_progress=at)
"""


def kill_load_at(node: str, corpus: Path, num_done: int) -> None:
    command = [sys.executable, "-c", _KILLED, node, str(corpus), str(num_done)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == -9, done.stderr


def test_killed_and_run_again_nothing_is_twice_and_nothing_missing(node: str, corpus: Path) -> None:
    for num_done in (15, 40):
        kill_load_at(node, corpus, num_done)
        name = only_index(node)
        assert call(f"{node}/_alias") == {name: {"aliases": {}}}  # looks like nothing that is ready
        call(f"{node}/{name}/_refresh", "POST")
        assert num_done <= call(f"{node}/{name}/_count")["count"] < NUM_PASSAGES
    report = load(node, corpus)
    assert report.index == name
    assert report.num_created + report.num_found + report.num_skipped == NUM_PASSAGES
    assert report.num_created <= NUM_PASSAGES - 40
    assert_loaded(node, corpus)


def test_interrupted_load_notes_how_far_it_came(node: str, corpus: Path) -> None:
    def interrupt(num_done: int) -> None:
        if num_done >= 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load(node, corpus, replace(SETTINGS, marker_interval_s=1000.0), on_progress=interrupt)
    report = load(node, corpus)
    assert report.num_skipped >= 30
    assert_loaded(node, corpus)


def test_restart_begins_anew(node: str, corpus: Path) -> None:
    kill_load_at(node, corpus, 30)
    report = load(node, corpus, replace(SETTINGS, is_restart=True))
    assert (report.num_created, report.num_skipped) == (NUM_PASSAGES, 0)
    assert_loaded(node, corpus)


def test_what_is_lost_or_altered_behind_our_back_is_found(node: str, corpus: Path) -> None:
    name = load(node, corpus).index
    call(f"{node}/{name}/_doc/p3?refresh=true", "DELETE")
    with pytest.raises(RetrievalError, match=f"{name}: holds 59 passages instead of 60; load it again with --restart"):
        load(node, corpus)
    call(f"{node}/{name}/_doc/stranger?refresh=true", "PUT", {"contents": "x"})
    with pytest.raises(RetrievalError, match=f"{name}: passage 'p3' is missing"):
        load(node, corpus)
    call(f"{node}/{name}/_doc/stranger?refresh=true", "DELETE")
    call(f"{node}/{name}/_doc/p3?refresh=true", "PUT", {"contents": "x"})
    with pytest.raises(RetrievalError, match=f"{name}: passage 'p3' differs from the corpus"):
        load(node, corpus)


# Failures


class Proxy:
    """Passes requests on, and breaks bulk requests on demand.

    Attributes:
        faults: taken from the left, one per bulk request; None breaks nothing. ``always`` is for all of them.
        refused: ids of documents that are refused as malformed.
        max_items: a larger request is a 413.
        num_bulks: so far.
        max_open: most bulk requests that were open at one time.
    """

    def __init__(self, node: str) -> None:
        self._node = node
        self.faults: deque[str | None] = deque()
        self.always: str | None = None
        self.refused: frozenset[str] = frozenset()
        self.max_items = 1000
        self.num_bulks = self.max_open = self._num_open = 0

    @asynccontextmanager
    async def running(self) -> Any:
        app = web.Application(client_max_size=2**26)
        app.router.add_route("*", "/{path:.*}", self._handle)
        runner = web.AppRunner(app, shutdown_timeout=0.01, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        async with aiohttp.ClientSession() as self._session:
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        await runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        if not request.path.endswith("/_bulk"):
            return await self._pass_on(request, body)
        self.num_bulks += 1
        self._num_open += 1
        self.max_open = max(self.max_open, self._num_open)
        try:
            return await self._bulk(request, body.splitlines())
        finally:
            self._num_open -= 1

    async def _bulk(self, request: web.Request, lines: list[bytes]) -> web.StreamResponse:
        fault = self.always or (self.faults.popleft() if self.faults else None)
        if len(lines) > 2 * self.max_items:
            return self._json({"error": "too large", "status": 413}, 413)
        if fault == "drop":
            assert request.transport is not None
            request.transport.close()
            return web.Response()
        if fault is not None and fault.isdigit():
            kind = {"429": "es_rejected_execution_exception", "401": "security_exception"}.get(fault, "unavailable")
            return self._json({"error": {"type": kind, "reason": "injected"}, "status": int(fault)}, int(fault))
        pairs = list(zip(lines[::2], lines[1::2], strict=True))
        busy = {i for i in range(len(pairs)) if fault == "busy items" and i % 2}
        bad = {i for i, (action, _) in enumerate(pairs) if json.loads(action)["create"]["_id"] in self.refused}
        sent = [i for i in range(len(pairs)) if i not in busy | bad]
        items: dict[int, Json] = {}
        if sent:
            answer = await self._pass_on(request, b"".join(line + b"\n" for i in sent for line in pairs[i]))
            assert isinstance(answer.body, bytes)
            items = dict(zip(sent, json.loads(answer.body)["items"], strict=True))
        if fault == "drop after":
            assert request.transport is not None
            request.transport.close()
            return web.Response()
        items |= {i: self._item(429, "es_rejected_execution_exception") for i in busy - bad}
        items |= {i: self._item(400, "document_parsing_exception") for i in bad}
        return self._json({"took": 1, "errors": True, "items": [items[i] for i in range(len(pairs))]}, 200)

    async def _pass_on(self, request: web.Request, body: bytes) -> web.Response:
        headers = {k: v for k, v in request.headers.items() if k.lower() in ("content-type", "accept")}
        url = f"{self._node}{request.path_qs}"
        async with self._session.request(request.method, url, data=body, headers=headers) as answer:
            kept = {k: v for k, v in answer.headers.items() if k.lower() in ("content-type", "x-elastic-product")}
            return web.Response(status=answer.status, body=await answer.read(), headers=kept)

    def _item(self, status: int, kind: str) -> Json:
        return {"create": {"status": status, "error": {"type": kind, "reason": "injected"}}}

    def _json(self, body: Json, status: int) -> web.Response:
        return web.json_response(body, status=status, headers={"X-Elastic-Product": "Elasticsearch"})


@pytest.fixture
def proxy(node: str) -> Iterator[tuple[Proxy, str]]:
    """A proxy in a thread, and its address."""
    proxy, is_up, url = Proxy(node), threading.Event(), []
    loop = asyncio.new_event_loop()
    is_over = asyncio.Event()

    async def run() -> None:
        async with proxy.running() as address:
            url.append(address)
            is_up.set()
            await is_over.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(run(),))
    thread.start()
    assert is_up.wait(10)
    yield proxy, url[0]
    loop.call_soon_threadsafe(is_over.set)
    thread.join(10)
    loop.close()


def test_passing_failures_cost_nothing(proxy: tuple[Proxy, str], node: str, corpus: Path) -> None:
    between, url = proxy
    faults = ["429", "503", "drop", "drop after", "busy items", "502"]
    between.faults.extend(faults)
    report = load(url, corpus)
    assert report.num_created + report.num_found == NUM_PASSAGES
    assert report.num_found == 5  # of the chunk with the lost response
    assert between.num_bulks == 12 + len(faults)
    assert between.max_open <= SETTINGS.num_workers
    assert_loaded(node, corpus)


def test_requests_that_are_too_large_say_how_to_make_them_smaller(
    proxy: tuple[Proxy, str], node: str, corpus: Path
) -> None:
    between, url = proxy
    between.max_items = 7
    with pytest.raises(RetrievalError, match=r"bulk request: HTTP 413: too large; send less .*--chunk of index_corpus"):
        load(url, corpus, replace(SETTINGS, chunk_passages=30))
    load(url, corpus, replace(SETTINGS, chunk_passages=30, chunk_bytes=400))
    assert_loaded(node, corpus)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("401", r"the cluster refuses no credentials \(HTTP 401: security_exception: injected\)"),
        ("429", "failing for"),
    ],
)
def test_lasting_failures_end_it_and_it_can_go_on(
    proxy: tuple[Proxy, str], node: str, corpus: Path, fault: str, words: str
) -> None:
    between, url = proxy
    load_before = [None, None, None]
    between.faults.extend([*load_before, *[fault] * 1000])
    with pytest.raises(RetrievalError, match=rf"bulk request: {words}"):
        load(url, corpus, replace(SETTINGS, retry_limit_s=0.5))
    assert call(f"{node}/wiki/_count") is None
    between.faults.clear()
    report = load(url, corpus)
    assert report.num_skipped >= 5
    assert_loaded(node, corpus)


def test_refused_passages_are_listed_and_nothing_is_published(
    proxy: tuple[Proxy, str], node: str, corpus: Path
) -> None:
    between, url = proxy
    between.refused = frozenset({"p0", "p44"})
    with pytest.raises(RetrievalError, match=r"2 of 60 passages were rejected, see .*rejects\.jsonl; nothing was pub"):
        load(url, corpus)
    assert call(f"{node}/wiki/_count") is None
    lines = corpus.with_name("rejects.jsonl").read_text(encoding="utf-8").splitlines()
    reason = "HTTP 400: document_parsing_exception: injected"
    assert sorted(map(json.loads, lines), key=lambda line: line["row"]) == [
        {"row": 0, "id": "p0", "reason": reason},
        {"row": 44, "id": "p44", "reason": reason},
    ]
    report = load(url, corpus, replace(SETTINGS, are_rejects_allowed=True))
    assert (report.num_skipped, report.num_rejected, report.num_passages) == (NUM_PASSAGES, 2, 58)
    assert_loaded(node, corpus, without=between.refused)


class Encoder:
    """Random directions, each text its own."""

    num_dims, fingerprint = 8, "test"
    similarity: Similarity = "cosine"
    has_own_settings = False

    def encode_queries(self, texts: Sequence[str]) -> Vectors:
        return self.encode_passages(texts)

    def encode_passages(self, texts: Sequence[str]) -> Vectors:
        rows = [np.random.default_rng(zlib.crc32(text.encode())).normal(size=8) for text in texts]
        return np.array([row / np.linalg.norm(row) for row in rows], dtype=np.float32)


def test_vectors_are_found_by_the_encoders_queries(node: str, corpus: Path) -> None:
    report = load(node, corpus, encoder=Encoder())
    assert report.num_created == NUM_PASSAGES
    vector = call(f"{node}/wiki")[report.index]["mappings"]["properties"]["vector"]
    assert (vector["type"], vector["dims"]) == ("dense_vector", 8)
    assert call(f"{node}/{report.index}")[report.index]["mappings"]["_meta"]["megatron_sdsearch"]["encoder"] == "test"

    async def search() -> list[tuple[str, float]]:
        config = ElasticsearchConfig(urls=(node,), index="wiki", mode="dense")
        retriever = BatchedRetriever(await ElasticsearchBackend.open(config, Encoder()), config)
        try:
            queries = (contents_of(corpus)[passage_id] for passage_id in ("p0", "p33", "p59"))
            hits = [(await retriever.search(query, top_k=2))[0] for query in queries]
            return [(hit.passage_id, hit.score) for hit in hits]
        finally:
            await retriever.close()

    found = asyncio.run(search())
    assert [passage_id for passage_id, _ in found] == ["p0", "p33", "p59"]
    assert [score for _, score in found] == pytest.approx([1.0] * 3, abs=5e-3)  # stored in a byte each


# The tool


def run_tool(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tools.index_corpus import main; main()"
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


def test_the_tool_loads_a_compressed_shuffled_corpus(node: str, corpus: Path, tmp_path: Path) -> None:
    lines = corpus.read_bytes().splitlines(keepends=True)
    random.Random(1).shuffle(lines)
    packed = tmp_path / "corpus.jsonl.gz"
    too_long = json.dumps({"id": "é" * 257, "contents": "an id of 514 bytes"}).encode() + b"\n"
    packed.write_bytes(gzip.compress(b"".join([*lines[:9], too_long, *lines[9:], b"nonsense\n"])))
    common = (str(packed), "--to", "elasticsearch", "--url", node, "--index", "wiki", "--chunk", "7")
    done = run_tool(*common, cwd=tmp_path)
    assert done.returncode == 2
    assert f"DataError: {packed}:10: id: " in done.stderr
    assert "has 514 bytes, and the engine's limit is 512" in done.stderr
    assert call(f"{node}/_alias") == {}
    done = run_tool(*common, "--allow-rejects", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["alias"], report["num_passages"], report["num_rejected"]) == ("wiki", NUM_PASSAGES, 2)
    assert "loaded 60 of 60" in done.stderr
    rejects = [json.loads(line) for line in (tmp_path / report["rejects"]).read_text(encoding="utf-8").splitlines()]
    assert [reject["place"] for reject in rejects] == [f"{packed}:10", f"{packed}:62"]
    assert "row: Invalid JSON" in rejects[1]["reason"]
    assert_loaded(node, corpus)


def test_the_tool_says_that_no_cluster_answers(corpus: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    common = (str(corpus), "--to", "elasticsearch", "--url", url)
    done = run_tool(*common, "--index", "wiki", cwd=tmp_path)
    assert done.returncode == 1
    assert f"RetrievalError: {url}: first contact: no connection" in done.stderr
    done = run_tool(*common, "--index", "Wiki", cwd=tmp_path)
    assert done.returncode == 2
    assert "ConfigError: --index: 'Wiki' is not an index name" in done.stderr


def test_the_server_serves_the_index(node: str, corpus: Path) -> None:
    load(node, corpus)
    command = [sys.executable, "-m", "tools.serve_retriever", "--engine", "elasticsearch", "--url", node]
    command += ["--index", "wiki", "--port", "0"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        served = json.loads(process.stdout.readline())
        answer = requests.post(served["url"], json={"queries": ["number 17", "volcano"], "topk": 1}, timeout=30).json()
        process.terminate()
        process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert served["num_passages"] == NUM_PASSAGES
    assert answer["result"] == [[{"id": "p17", "contents": contents_of(corpus)["p17"]}], []]
    assert process.returncode == 0
