"""Our /retrieve server as other people's trainers use it, and our client of it and of other people's servers."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
from aiohttp import web

from megatron_sdsearch.config import RetrieveServerConfig
from megatron_sdsearch.errors import ConfigError, RetrievalDownError, RetrievalError
from megatron_sdsearch.records import Passage
from megatron_sdsearch.retrieval.base import Retriever
from megatron_sdsearch.retrieval.batched import BatchedRetriever
from megatron_sdsearch.retrieval.http import RetrieveServerBackend
from megatron_sdsearch.retrieval.server import ThreadedRetriever, create_app, listen, new_server
from megatron_sdsearch.retrieval.tantivy_index import TantivyRetriever

Json = dict[str, Any]
ROOT = Path(__file__).parents[2]
PASSAGES = {
    "p0": '"Panama Canal"\nA canal between two oceans.',
    "p1": '"Suez Canal"\nA canal without locks.',
    "p2": '"Copper mine"\nA mine in the hills.',
}


@pytest.fixture(scope="module")
def index_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"id": i, "contents": c}) + "\n" for i, c in PASSAGES.items()))
    TantivyRetriever.build(corpus, folder / "index", "standard")
    return folder / "index"


@contextmanager
def serving(retriever: Retriever, num_passages: int | None = None) -> Iterator[str]:
    """The URL of our server, which runs in a thread; closes the retriever."""
    server = new_server(create_app(retriever, engine="test", num_passages=num_passages))
    with listen("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/retrieve"
        finally:
            server.should_exit = True
            thread.join(timeout=30)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def url(index_dir: Path) -> Iterator[str]:
    with serving(ThreadedRetriever(TantivyRetriever.open(index_dir)), num_passages=3) as url:
        yield url


def config_of(url: str, **settings: Any) -> RetrieveServerConfig:
    return RetrieveServerConfig(**{"url": url, "timeout_s": 5.0, "batch_window_ms": 20.0, **settings})


class Scripted:
    """A Retriever with given answers and failures."""

    fingerprint = "scripted"

    def __init__(self, answer: Callable[[str], Awaitable[Sequence[Passage]]]) -> None:
        self._answer = answer
        self.is_closed = False

    async def search(self, query: str, *, top_k: int) -> Sequence[Passage]:
        return await self._answer(query)

    async def close(self) -> None:
        self.is_closed = True


# Search-R1's trainer, search_r1/llm_agent/generation.py: _batch_search and _passages2string, as they are but for self.


def batch_search(search_url: str, topk: int, queries: list[str]) -> Any:
    payload = {"queries": queries, "topk": topk, "return_scores": True}
    return requests.post(search_url, json=payload).json()


def passages2string(retrieval_result: Any) -> str:
    format_reference = ""
    for idx, doc_item in enumerate(retrieval_result):
        content = doc_item["document"]["contents"]
        title = content.split("\n")[0]
        text = "\n".join(content.split("\n")[1:])
        format_reference += f"Doc {idx+1}(Title: {title}) {text}\n"  # fmt: skip
    return format_reference


def test_search_r1s_own_client(url: str) -> None:
    results = batch_search(url, 2, ["canal without locks", "mine", "volcano"])["result"]
    assert [passages2string(result) for result in results] == [
        'Doc 1(Title: "Suez Canal") A canal without locks.\nDoc 2(Title: "Panama Canal") A canal between two oceans.\n',
        'Doc 1(Title: "Copper mine") A mine in the hills.\n',
        "",
    ]
    first = results[0][0]
    assert first.keys() == {"document", "score"}
    assert first["document"] == {"id": "p1", "contents": PASSAGES["p1"]}
    assert first["score"] > results[0][1]["score"] > 0


def test_without_scores_items_are_bare_documents_and_topk_is_three(url: str) -> None:
    answer = requests.post(url, json={"queries": ["a canal in the hills"]}).json()
    assert {item["id"] for item in answer["result"][0]} == PASSAGES.keys()
    assert all(item.keys() == {"id", "contents"} for item in answer["result"][0])
    same = requests.post(url, json={"queries": ["a canal in the hills"], "topk": None, "return_scores": False}).json()
    assert same == answer
    assert len(requests.post(url, json={"queries": ["a canal"], "topk": 1}).json()["result"][0]) == 1


def test_no_queries_and_no_hits_are_answers(url: str) -> None:
    assert requests.post(url, json={"queries": []}).json() == {"result": []}
    assert requests.post(url, json={"queries": ["", "volcano"]}).json() == {"result": [[], []]}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "queries: Field required"),
        ({"queries": "canal"}, "queries: Input should be a valid list"),
        ({"queries": ["canal", 7]}, "queries.1: Input should be a valid string"),
        ({"queries": ["canal"], "topk": 0}, "topk: Input should be greater than or equal to 1"),
        ({"queries": ["canal"], "topk": "3"}, "topk: Input should be a valid integer"),
        ({"queries": ["canal"], "topk": 100000}, "topk: Input should be less than or equal to 1000"),
        ({"queries": ["canal"], "return_scores": "maybe"}, "return_scores: Input should be a valid boolean"),
        ([1], "body: "),
    ],
)
def test_wrong_requests_are_answered_with_what_is_wrong(url: str, body: object, words: str) -> None:
    response = requests.post(url, json=body)
    assert response.status_code == 422
    assert response.json()["detail"].startswith(words)
    assert response.json()["detail"].endswith('; send {"queries": ["..."], "topk": 3, "return_scores": true}')


def test_a_body_that_is_not_json_is_a_wrong_request(url: str) -> None:
    response = requests.post(url, data=b"{nonsense", headers={"Content-Type": "application/json"})
    assert response.status_code == 422
    assert "JSON decode error" in response.json()["detail"]
    assert requests.get(url).status_code == 405


def test_health_tells_what_is_served(url: str, index_dir: Path) -> None:
    health = requests.get(url.replace("/retrieve", "/health")).json()
    fingerprint = TantivyRetriever.open(index_dir).fingerprint
    assert health == {"status": "ok", "engine": "test", "fingerprint": fingerprint, "num_passages": 3}


def test_a_failing_engine_is_503_and_not_an_empty_result() -> None:
    async def fail(query: str) -> Sequence[Passage]:
        if query == "bad":
            raise RetrievalError("shard lost")
        await asyncio.sleep(60)  # its neighbours are not waited for
        return ()

    retriever = Scripted(fail)
    with serving(retriever) as url:
        response = requests.post(url, json={"queries": ["good", "bad"]}, timeout=30)
    assert response.status_code == 503
    assert response.json() == {"detail": "the search engine failed: shard lost"}
    assert retriever.is_closed


# Our client


def searched(config: RetrieveServerConfig, queries: Sequence[str], top_k: int = 3) -> list[Any]:
    """Passages, or the error, of each query, all asked at the same time."""

    async def run() -> list[Any]:
        retriever = BatchedRetriever(await RetrieveServerBackend.open(config), config)
        try:
            searches = (retriever.search(query, top_k=top_k) for query in queries)
            return list(await asyncio.gather(*searches, return_exceptions=True))
        finally:
            await retriever.close()

    return asyncio.run(run())


def test_client_and_server_give_what_the_index_gives(url: str, index_dir: Path) -> None:
    queries = ["canal", "mine hills", "volcano", "  ", "half a pair \ud800 canal"]
    index = TantivyRetriever.open(index_dir)
    assert searched(config_of(url), queries, 2) == [list(index.search_now(query, 2)) for query in queries[:3]] + [
        (),
        list(index.search_now("half a pair canal", 2)),
    ]


def test_fingerprint_names_url_and_index(url: str, index_dir: Path) -> None:
    async def run() -> None:
        config = config_of(url)
        retriever = BatchedRetriever(await RetrieveServerBackend.open(config), config)
        assert retriever.fingerprint == f"http/{url}/{TantivyRetriever.open(index_dir).fingerprint}"
        assert retriever.num_passages == 3
        await retriever.close()
        with pytest.raises(RetrievalError, match="closed"):
            await retriever.search("canal", top_k=1)
        with pytest.raises(ValueError, match="top_k is 0"):
            await retriever.search("canal", top_k=0)

    asyncio.run(run())


Reply = Callable[[Json], Awaitable[web.StreamResponse]]


class Foreign:
    """Somebody else's server, without /health. Replies are taken from the left; the last one stays."""

    def __init__(self, *replies: Reply) -> None:
        self._replies = list(replies)
        self.requests: list[Json] = []

    @contextmanager
    def running(self) -> Iterator[str]:
        """Its URL."""
        started, ended = threading.Event(), asyncio.Event()
        loop = asyncio.new_event_loop()
        listener = socket.create_server(("127.0.0.1", 0))

        async def serve() -> None:
            app = web.Application()
            app.router.add_post("/search/retrieve", self._retrieve)
            runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.01, access_log=None)
            await runner.setup()
            await web.SockSite(runner, listener).start()
            started.set()
            await ended.wait()
            await runner.cleanup()

        thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
        thread.start()
        try:
            assert started.wait(10)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/search/retrieve"
        finally:
            loop.call_soon_threadsafe(ended.set)
            thread.join(10)
            loop.close()

    async def _retrieve(self, http: web.Request) -> web.StreamResponse:
        body = await http.json()
        self.requests.append(body)
        reply = self._replies.pop(0) if len(self._replies) > 1 else self._replies[0]
        if reply is dropped:
            assert http.transport is not None
            http.transport.close()
        return await reply(body)


def document(query: str) -> Json:
    return {"id": 7, "contents": f'"{query}"\ntext', "url": "unused"}


async def bare(body: Json) -> web.Response:
    return web.json_response({"result": [[document(query)] for query in body["queries"]]})


async def scored(body: Json) -> web.Response:
    return web.json_response({"result": [[{"document": document(q), "score": 2}] * 9 for q in body["queries"]]})


async def dropped(body: Json) -> web.Response:
    return web.Response()


async def hanging(body: Json) -> web.Response:
    await asyncio.sleep(60)
    return web.Response()


def status(code: int, words: str = "Internal Server Error") -> Reply:
    async def reply(body: Json) -> web.Response:
        return web.Response(status=code, text=words)

    return reply


def json_reply(answer: object) -> Reply:
    async def reply(body: Json) -> web.Response:
        return web.json_response(answer)

    return reply


def test_bare_documents_have_no_score() -> None:
    with Foreign(bare).running() as url:
        assert searched(config_of(url), ["a"]) == [[Passage(passage_id="7", contents='"a"\ntext', score=0.0)]]


def test_queries_share_a_request_and_surplus_passages_are_cut() -> None:
    foreign = Foreign(scored)
    with foreign.running() as url:
        answers = searched(config_of(url), ["a", "b", "c"])
    assert answers == [[Passage(passage_id="7", contents=f'"{q}"\ntext', score=2.0)] * 3 for q in "abc"]
    assert foreign.requests == [{"queries": ["a", "b", "c"], "topk": 3, "return_scores": True}]


def test_a_document_without_id_is_named_after_its_contents() -> None:
    items = [{"document": {"contents": text}} for text in ("x", "y", "x")]
    with Foreign(json_reply({"result": [items]})).running() as url:
        (passages,) = searched(config_of(url), ["a"])
    first, second, third = (passage.passage_id for passage in passages)
    assert first == third != second
    assert first.startswith("sha256:")


@pytest.mark.parametrize("reply", [status(500), status(503, "overloaded"), status(429), dropped, hanging])
def test_what_passes_is_tried_again(reply: Reply) -> None:
    foreign = Foreign(reply, bare)
    with foreign.running() as url:
        (passages,) = searched(config_of(url, timeout_s=0.5 if reply is hanging else 5.0), ["a"])
    assert [passage.passage_id for passage in passages] == ["7"]
    assert len(foreign.requests) == 2


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (status(500, "CUDA error"), "after 2 attempts: HTTP 500: CUDA error"),
        (dropped, "after 2 attempts: no connection: Server disconnected"),
        (hanging, "after 2 attempts: no answer within 0.5 s"),
        (status(404, "no such route"), "after 1 attempt: HTTP 404: no such route"),
        (status(422, "w" * 500 + " topk?"), "w topk?"),  # the reason of a long answer may come last
        (status(422, "topk?"), "after 1 attempt: HTTP 422: topk?"),
        (status(200, "<html>"), "after 1 attempt: malformed answer: not JSON: <html>"),
        (json_reply([]), 'malformed answer: no list "result"'),
        (json_reply({"result": []}), 'malformed answer: "result" has 0 lists for 1 queries'),
        (json_reply({"result": [[], []]}), 'malformed answer: "result" has 2 lists for 1 queries'),
        (json_reply({"result": [None]}), 'malformed answer: an entry of "result" is not a list: None'),
        (json_reply({"result": [["text"]]}), "malformed answer: an item is not a document: 'text'"),
        (json_reply({"result": [[{"id": "1", "text": ""}]]}), "no string \"contents\"; its fields are ['id', 'text']"),
        (json_reply({"result": [[{"id": None, "contents": ""}]]}), '"id" is neither a string nor an integer: None'),
        (json_reply({"result": [[{"document": {"contents": ""}, "score": "1"}]]}), "is not a finite number"),
    ],
)
def test_failures_are_errors_with_a_reason(reply: Reply, words: str) -> None:
    with Foreign(reply).running() as url:
        (error,) = searched(config_of(url, timeout_s=0.5 if reply is hanging else 5.0, max_attempts=2), ["who?"])
    assert type(error) is RetrievalError
    assert str(error).startswith(f"{url}: search for 'who?' failed after ")
    assert words in str(error)


def test_a_malformed_entry_affects_only_its_query() -> None:
    with Foreign(json_reply({"result": [[{"id": "1", "contents": "x"}], [5]]})).running() as url:
        good, bad = searched(config_of(url), ["a", "b"])
    assert [passage.passage_id for passage in good] == ["1"]
    assert "an item is not a document: 5" in str(bad)


def test_a_server_that_answers_no_query_ends_the_run() -> None:
    with Foreign(status(502, "bad gateway")).running() as url:
        (error,) = searched(config_of(url, max_attempts=50, down_timeout_s=0.5), ["a"])
    assert type(error) is RetrievalDownError
    assert "HTTP 502: bad gateway" in str(error)


def test_opening_finds_out_that_no_server_is_there() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}/retrieve"
    with pytest.raises(RetrievalError, match=rf"{url}: no server answers .*start the server \(tools/serve_retriever"):
        searched(config_of(url), ["a"])


def test_a_hanging_server_is_reported_with_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_sdsearch.retrieval.http._HEALTH_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = f"http://127.0.0.1:{mute.getsockname()[1]}"
        with pytest.raises(RetrievalError, match=rf"^{url}/health: no answer in 0\.2 s; check the server"):
            searched(config_of(f"{url}/retrieve"), ["a"])


async def echoing(request: web.Request) -> web.Response:
    return web.Response(status=403, text=f"refused: {request.headers.get('Authorization')} of me:hunter2-secret")


def test_credentials_are_sent_and_never_shown() -> None:
    async def run() -> str:
        app = web.Application()
        app.router.add_route("*", "/{tail:.*}", echoing)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}/retrieve"
        config = config_of(url, username="me", password="hunter2-secret")
        backend = await RetrieveServerBackend.open(config)
        retriever = BatchedRetriever(backend, config)
        try:
            with pytest.raises(RetrievalError) as caught:
                await retriever.search("a", top_k=1)
        finally:
            await retriever.close()
            await runner.cleanup()
        return "".join(traceback.format_exception(caught.value)) + repr(vars(retriever)) + repr(backend._credentials)

    shown = asyncio.run(run())
    assert "HTTP 403: refused: Basic *** of me:***" in shown
    assert "hunter2" not in shown


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000/retrieve", "http:///retrieve", "http://127.0.0.1:8000", "http://a:b/c"]
)
def test_half_a_url_is_a_config_error(url: str) -> None:
    with pytest.raises(ConfigError, match=r"retrieval\.http\.url: .* is not a full URL; give all of it"):
        searched(config_of(url), ["a"])


# The tool


def serve_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "tools.serve_retriever", *arguments]


def test_the_tool_serves_until_a_signal(index_dir: Path) -> None:
    command = serve_command("--engine", "tantivy", "--index", str(index_dir), "--port", "0")
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        served = json.loads(process.stdout.readline())
        assert served["num_passages"] == 3
        assert served["url"].startswith("http://127.0.0.1:")
        assert [p.passage_id for p in searched(config_of(served["url"]), ["mine"])[0]] == ["p2"]
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, stderr) == (0, "")


def test_the_tool_names_what_is_wrong(index_dir: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = serve_command("--engine", "tantivy", "--index", str(index_dir), "--port", port)
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"ConfigError: --port: cannot listen at 127.0.0.1:{port} (Address already in use); ")
    command = serve_command("--engine", "tantivy", "--index", str(tmp_path), "--port", "0")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"ConfigError: --index: {tmp_path} holds no index; ")
    for flags, message in (
        (("--port", "99999"), "--port: 99999 is not a port"),
        (("--host", "nohost.invalid"), "--host: nohost.invalid is not an address of this machine"),
    ):
        command = serve_command("--engine", "tantivy", "--index", str(index_dir), *flags)
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 2
        assert message in done.stderr.splitlines()[-1]


def test_searches_run_beside_each_other(index_dir: Path) -> None:
    """A slow search in a thread does not keep others, or /health, from answering."""
    index = TantivyRetriever.open(index_dir)
    is_released = threading.Event()
    search_now = index.search_now

    def slow(query: str, top_k: int) -> Sequence[Passage]:
        if query == "slow":
            assert is_released.wait(30)
        return search_now(query, top_k)

    index.search_now = slow  # type: ignore[method-assign]
    with serving(ThreadedRetriever(index, num_threads=2)) as url:
        thread = threading.Thread(target=requests.post, args=(url,), kwargs={"json": {"queries": ["slow"]}})
        thread.start()
        time.sleep(0.05)
        assert len(requests.post(url, json={"queries": ["canal"]}, timeout=20).json()["result"][0]) == 2
        assert requests.get(url.replace("/retrieve", "/health"), timeout=20).status_code == 200
        is_released.set()
        thread.join(30)
