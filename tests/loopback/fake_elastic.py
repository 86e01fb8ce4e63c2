"""A node on 127.0.0.1 that speaks as much Elasticsearch as the retriever asks, with switches for everything that can
go wrong in a cluster. What the real protocol looks like is checked in ``tests/integration/elasticsearch``.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Self

from aiohttp import web

Json = dict[str, Any]
Fault = Literal[
    "429", "502", "503", "504", "400", "401", "hang", "drop", "garbage", "half", "timed_out", "shard", "all"
]

PASSAGES = {f"p{i}": f'"Title {i}"\nbody of passage word{i} common' for i in range(6)}
INDEX, ALIAS = "wiki-1", "wiki"
UUID = "indexuuid"
REJECTED = {"type": "es_rejected_execution_exception", "reason": "rejected execution of search thread pool"}


def error_body(status: int, kind: str, reason: str) -> Json:
    error = {"type": kind, "reason": reason, "root_cause": [{"type": kind, "reason": reason}]}
    return {"error": error, "status": status}


class FakeElastic:
    """``async with FakeElastic() as fake: ... fake.url``.

    Attributes:
        passages: id -> contents.
        sources: id -> what a document holds instead of its contents alone.
        faults: taken from the left, one per _msearch; ``always`` is for all of them, ``fault_of`` decides by number.
        version: that it claims; a client of another major than ``accepted_majors`` is refused as a cluster does it.
        authorization: the header that it wants, if any.
        aliases: name -> indices.
        meta: of its mapping.
        bodies: of all _msearch requests, in order, as lists of lines.
        refuses: queries that it cannot parse.
        is_dead: answers no request.
    """

    def __init__(self, passages: Mapping[str, str] = PASSAGES, *, tls: ssl.SSLContext | None = None) -> None:
        self.passages = dict(passages)
        self.sources: dict[str, Any] = {}
        self.faults: deque[Fault] = deque()
        self.always: Fault | None = None
        self.refuses: Callable[[str], bool] = lambda query: "unparseable" in query
        self.fault_of: Callable[[int], Fault | None] = lambda number: None
        self.version = "9.1.0"
        self.accepted_majors: Sequence[int] | None = None
        self.authorization: str | None = None
        self.product = "Elasticsearch"
        self.aliases: dict[str, list[str]] = {INDEX: [INDEX], ALIAS: [INDEX]}
        self.properties: Json = {"contents": {"type": "text"}, "vector": {"type": "dense_vector", "dims": 2}}
        self.meta: Json = {}
        self.bodies: list[list[Json]] = []
        self.delay_s = 0.0
        self.is_dead = False
        self.num_open = self.most_open = 0
        self._tls = tls
        self._port = 0
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self._port}"

    @property
    def queries(self) -> list[str]:
        """Texts of all match searches."""
        matches = [line["query"]["match"]["contents"]["query"] for body in self.bodies for line in body[1::2]]
        return matches

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """On the port of the first start, ever after."""
        app = web.Application(middlewares=[self._guard], client_max_size=1 << 26)
        app.add_routes(
            [
                web.get("/", self._info),
                web.get("/{index}", self._index),
                web.get("/{index}/_stats", self._stats),
                web.post("/{index}/_search", self._search),
                web.post("/{index}/_msearch", self._msearch),
            ]
        )
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port, ssl_context=self._tls, reuse_address=True)
        await site.start()
        self._port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    @web.middleware
    async def _guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if self.is_dead:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        accept = request.headers.get("accept", "")
        if self.accepted_majors is not None and "compatible-with=" in accept:
            major = int(accept.rsplit("=", 1)[1])
            if major not in self.accepted_majors:
                reason = f"Accept version must be either version {self.accepted_majors}, but found {major}"
                return self._json(error_body(400, "media_type_header_exception", reason))
        given = request.headers.get("authorization")
        if self.authorization is not None and given != self.authorization:
            # Elasticsearch does not echo the header; a proxy that does must not bring it into a log.
            return self._json(error_body(401, "security_exception", f"unable to authenticate with {given}"))
        response: web.StreamResponse = await handler(request)
        return response

    def _json(self, body: Json, status: int | None = None, headers: Mapping[str, str] | None = None) -> web.Response:
        status = status if status is not None else int(body.get("status", 200))
        return web.json_response(body, status=status, headers={"X-Elastic-Product": self.product, **(headers or {})})

    async def _info(self, request: web.Request) -> web.Response:
        version = {"number": self.version, "build_flavor": "default"}
        return self._json({"cluster_uuid": "clusteruuid", "version": version, "tagline": "You Know, for Search"})

    async def _index(self, request: web.Request) -> web.Response:
        name = request.match_info["index"]
        if name not in self.aliases:
            return self._json(error_body(404, "index_not_found_exception", f"no such index [{name}]"))
        settings = {"index": {"uuid": UUID, "number_of_shards": "1"}}
        index = {"aliases": {}, "mappings": {"properties": self.properties, "_meta": self.meta}, "settings": settings}
        return self._json(dict.fromkeys(self.aliases[name], index))

    async def _stats(self, request: web.Request) -> web.Response:
        stats = {"primaries": {"docs": {"count": len(self.passages)}}, "shards": {}}
        return self._json({"indices": {request.match_info["index"]: stats}})

    async def _search(self, request: web.Request) -> web.Response:
        body = await request.json() if request.can_read_body else {}
        return self._json(self._answer(Counter(self.passages), body.get("size", 10)))

    async def _msearch(self, request: web.Request) -> web.StreamResponse:
        lines = [json.loads(line) for line in (await request.text()).splitlines()]
        self.bodies.append(lines)
        fault = self.always or (self.faults.popleft() if self.faults else self.fault_of(len(self.bodies)))
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        try:
            if fault is not None:
                broken = await self._break(request, fault)
                if broken is not None:
                    return broken
            await asyncio.sleep(self.delay_s)
        finally:
            self.num_open -= 1
        responses = [self._one(line) for line in lines[1::2]]
        if fault in ("half", "all"):
            for number in range(0, len(responses), 2 if fault == "half" else 1):
                responses[number] = {"error": REJECTED, "status": 429}
        elif fault == "timed_out":
            responses = [self._answer(Counter(), 0) | {"timed_out": True} for _ in responses]
        elif fault == "shard":
            failed = {"total": 3, "successful": 2, "failed": 1, "failures": [{"shard": 2, "reason": REJECTED}]}
            responses = [self._answer(Counter(), 0) | {"_shards": failed} for _ in responses]
        return self._json({"took": 1, "responses": responses})

    async def _break(self, request: web.Request, fault: Fault) -> web.StreamResponse | None:
        if fault == "hang":
            await asyncio.sleep(3600)
        if fault == "garbage":
            return web.Response(text="<html>", headers={"X-Elastic-Product": "Elasticsearch"}, content_type="text/html")
        if fault == "drop":
            response = web.StreamResponse(headers={"Content-Length": "1000", "X-Elastic-Product": "Elasticsearch"})
            await response.prepare(request)
            await response.write(b'{"responses": [')
            assert request.transport is not None
            request.transport.abort()
            return response
        if fault.isdigit():
            headers = {"Retry-After": "0.05"} if fault == "429" else {}
            return self._json(error_body(int(fault), "fake_exception", f"injected {fault}"), headers=headers)
        return None

    def _one(self, body: Json) -> Json:
        size = body["size"]
        if "knn" in body:  # the highest number is nearest to everything
            return self._answer(Counter({p: i + 1 for i, p in enumerate(self.passages)}), size)
        text = body["query"]["match"]["contents"]["query"]
        if self.refuses(text):
            return error_body(400, "parsing_exception", "cannot parse")
        words = Counter(text.lower().split())
        scores = {p: sum(words[w] for w in c.lower().split()) for p, c in self.passages.items()}
        return self._answer(Counter({p: s for p, s in scores.items() if s}), size)

    def _answer(self, scores: Mapping[str, Any], size: int) -> Json:
        best = sorted(scores, key=lambda p: -scores[p] if isinstance(scores[p], int) else 0)[:size]
        hits = [
            {"_index": INDEX, "_id": p, "_score": float(scores[p]) if isinstance(scores[p], int) else None}
            | {"_source": self.sources.get(p, {"contents": self.passages[p]})}
            for p in best
        ]
        shards = {"total": 1, "successful": 1, "skipped": 0, "failed": 0}
        return {"timed_out": False, "_shards": shards, "hits": {"hits": hits}, "status": 200}


@contextmanager
def running_in_thread(fake: FakeElastic) -> Iterator[FakeElastic]:
    """For clients of other processes, or with a loop of their own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    asyncio.run_coroutine_threadsafe(fake.start(), loop).result(10)
    try:
        yield fake
    finally:
        asyncio.run_coroutine_threadsafe(fake.stop(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
