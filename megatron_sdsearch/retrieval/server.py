"""HTTP server of Search-R1's ``/retrieve`` protocol, so that its trainer, AutoRefine's and ours can share one index.

The engine is any ``Retriever``; ``ThreadedRetriever`` lets an index in this process answer many queries at once, and
``/health`` meanwhile. Needs the ``retriever`` extra.

    POST /retrieve {"queries": ["..."], "topk": 3, "return_scores": true}
        200 {"result": [[{"document": {"id", "contents"}, "score"}, ...], ...]}; bare documents without return_scores
        422: the request is invalid; 503: the engine failed (never an empty result). Both {"detail": message}
    GET /health
        200 {"status": "ok", "fingerprint", "num_passages", "engine"}
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Annotated

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from megatron_sdsearch.errors import ConfigError, RetrievalError
from megatron_sdsearch.records import Passage
from megatron_sdsearch.retrieval.base import Retriever
from megatron_sdsearch.retrieval.http import to_items
from megatron_sdsearch.retrieval.tantivy_index import TantivyRetriever

_log = logging.getLogger(__name__)

_FIX = 'send {"queries": ["..."], "topk": 3, "return_scores": true}'


class RetrieveRequest(BaseModel):
    """The body of ``/retrieve``.

    Attributes:
        queries: each gets a list of passages.
        topk: passages per query; null for the server's default.
        return_scores: return items with a score instead of bare documents.
    """

    model_config = ConfigDict(extra="ignore", strict=True)  # other trainers may send more

    # Search-R1 sends all queries of a turn at once: 512 questions x 5.
    queries: Annotated[list[str], Field(max_length=16384)]
    topk: Annotated[int, Field(ge=1, le=1000)] | None = None
    return_scores: bool = False


class ThreadedRetriever:
    """A ``Retriever`` that searches a tantivy index in threads; tantivy releases the GIL.

    Args:
        index: owned by the retriever: ``close`` closes it.
        num_threads: one per core by default.
    """

    def __init__(self, index: TantivyRetriever, num_threads: int | None = None) -> None:
        self.fingerprint, self.num_passages = index.fingerprint, index.num_passages
        self._index = index
        self._threads = ThreadPoolExecutor(num_threads or os.cpu_count() or 1, thread_name_prefix="search")

    async def search(self, query: str, *, top_k: int) -> Sequence[Passage]:
        """Search in a thread; see ``TantivyRetriever.search``."""
        search = self._index.search_now
        return await asyncio.get_running_loop().run_in_executor(self._threads, search, query, top_k)

    async def close(self) -> None:
        """Wait for running searches, then close the index."""
        await asyncio.to_thread(self._threads.shutdown, cancel_futures=True)
        await self._index.close()


def create_app(
    retriever: Retriever, *, engine: str, num_passages: int | None = None, default_top_k: int = 3
) -> FastAPI:
    """Create the application, which closes the retriever when it shuts down.

    Args:
        retriever: answers the queries.
        engine: its name, for ``/health``.
        num_passages: size of its index, for ``/health``.
        default_top_k: for requests without ``topk``.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        yield
        await retriever.close()

    app = FastAPI(title="megatron_sdsearch /retrieve", lifespan=lifespan, docs_url=None, redoc_url=None)

    @app.get("/health")
    async def health() -> JSONResponse:
        served = {"engine": engine, "fingerprint": retriever.fingerprint, "num_passages": num_passages}
        return JSONResponse({"status": "ok", **served})

    @app.post("/retrieve")
    async def retrieve(body: RetrieveRequest) -> JSONResponse:
        top_k = body.topk or default_top_k
        # One task per query: a BatchedRetriever batches them itself.
        async with asyncio.TaskGroup() as tasks:
            searches = [tasks.create_task(retriever.search(query, top_k=top_k)) for query in body.queries]
        found = [to_items(search.result(), has_scores=body.return_scores) for search in searches]
        return JSONResponse({"result": found})

    app.add_exception_handler(RequestValidationError, _refuse)
    app.add_exception_handler(ExceptionGroup, _fail)
    return app


async def _refuse(request: Request, error: Exception) -> JSONResponse:
    """Answer 422 with the first problem and its fix."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"] if part != "body") or "body"
    reason = first.get("ctx", {}).get("error", "")
    problem = f"{field}: {first['msg']}" + (f" ({reason})" if first["type"] == "json_invalid" and reason else "")
    return JSONResponse({"detail": f"{problem}; {_FIX}"}, status_code=422)


async def _fail(request: Request, error: Exception) -> JSONResponse:
    """Answer 503 when the engine failed; anything else is a bug (500)."""
    assert isinstance(error, ExceptionGroup)
    first = error.exceptions[0]
    if not isinstance(first, RetrievalError):
        raise error
    _log.error("search failed: %s", first)
    return JSONResponse({"detail": f"the search engine failed: {first}"}, status_code=503)


def listen(host: str, port: int) -> socket.socket:
    """Open a listening socket; port 0 takes any free port.

    Raises:
        ConfigError: the address is invalid or taken.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    except socket.gaierror as error:
        problem = f"{host} is not an address of this machine ({error.strerror})"
        raise ConfigError("--host", problem, "give another") from error
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error.strerror
        fix = "give another --port or --host"
        raise ConfigError("--port", f"cannot listen at {host}:{port} ({reason})", fix) from error


def new_server(app: FastAPI) -> uvicorn.Server:
    """Create a server; ``serve(sockets=[listener])`` runs until SIGINT or SIGTERM, then finishes open requests."""
    config = uvicorn.Config(app, log_level="warning", access_log=False, ws="none", timeout_graceful_shutdown=30)
    return uvicorn.Server(config)
