"""Any of our engines behind Search-R1's ``/retrieve``, so that its trainer, AutoRefine's and ours can share one index.

The engine is any ``Retriever``; ``InThreads`` lets one that computes in process answer many queries at once, and
``/health`` meanwhile. Needs the ``retriever`` extra.

    POST /retrieve {"queries": ["..."], "topk": 3, "return_scores": true}
        200 {"result": [[{"document": {"id", "contents"}, "score"}, ...], ...]}; bare documents without return_scores
        422 the request is wrong; 503 the engine failed: never an empty result. Both {"detail": message}
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

DEFAULT_TOP_K = 3
MAX_TOP_K = 1000
MAX_QUERIES = 16384
"""The most in one request; Search-R1 sends all queries of a turn at once: 512 questions x 5."""

_FIX = 'send {"queries": ["..."], "topk": 3, "return_scores": true}'


class RetrieveRequest(BaseModel):
    """The body of ``/retrieve``.

    Attributes:
        queries: each gets a list of passages.
        topk: of each; null is the default.
        return_scores: items with a score, or bare documents.
    """

    model_config = ConfigDict(extra="ignore", strict=True)  # other trainers may send more

    queries: Annotated[list[str], Field(max_length=MAX_QUERIES)]
    topk: Annotated[int, Field(ge=1, le=MAX_TOP_K)] | None = None
    return_scores: bool = False


class InThreads:
    """A ``Retriever`` that searches a tantivy index in threads: tantivy lets go of the interpreter meanwhile.

    Args:
        index: belongs to this from now on.
        num_threads: one per core by default.
    """

    def __init__(self, index: TantivyRetriever, num_threads: int | None = None) -> None:
        self.fingerprint, self.num_passages = index.fingerprint, index.num_passages
        self._index = index
        self._threads = ThreadPoolExecutor(num_threads or os.cpu_count() or 1, thread_name_prefix="search")

    async def search(self, query: str, *, top_k: int) -> Sequence[Passage]:
        """Search in a thread; see ``TantivyRetriever.search``."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._index.search_now, query, top_k)

    async def close(self) -> None:
        """Wait for the searches under way, then close the index."""
        await asyncio.to_thread(self._threads.shutdown, cancel_futures=True)
        await self._index.close()


def create_app(
    retriever: Retriever, *, engine: str, num_passages: int | None = None, default_top_k: int = DEFAULT_TOP_K
) -> FastAPI:
    """The application; closes the retriever at its end.

    Args:
        retriever: answers.
        engine: its name, for ``/health``.
        num_passages: behind it, for ``/health``.
        default_top_k: for requests that name none.
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
        # One task for each: a retriever with batches of its own puts them together again.
        async with asyncio.TaskGroup() as tasks:
            searches = [tasks.create_task(retriever.search(query, top_k=top_k)) for query in body.queries]
        found = [to_items(search.result(), has_scores=body.return_scores) for search in searches]
        return JSONResponse({"result": found})

    app.add_exception_handler(RequestValidationError, _refuse)
    app.add_exception_handler(ExceptionGroup, _fail)
    return app


async def _refuse(request: Request, error: Exception) -> JSONResponse:
    """Answer 422 with the first thing that is wrong, and the fix."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"] if part != "body") or "body"
    reason = first.get("ctx", {}).get("error", "")
    problem = f"{field}: {first['msg']}" + (f" ({reason})" if first["type"] == "json_invalid" and reason else "")
    return JSONResponse({"detail": f"{problem}; {_FIX}"}, status_code=422)


async def _fail(request: Request, error: Exception) -> JSONResponse:
    """Answer 503 when the engine failed; anything else is a bug, and a 500."""
    assert isinstance(error, ExceptionGroup)
    first = error.exceptions[0]
    if not isinstance(first, RetrievalError):
        raise error
    _log.error("search failed: %s", first)
    return JSONResponse({"detail": f"the search engine failed: {first}"}, status_code=503)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes any that is free.

    Raises:
        ConfigError: the address cannot be had.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    except socket.gaierror as error:
        raise ConfigError("--host", f"{host} is no address here ({error.strerror})", "give another") from error
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error.strerror
        fix = "give another --port or --host"
        raise ConfigError("--port", f"cannot listen at {host}:{port} ({reason})", fix) from error


def new_server(app: FastAPI) -> uvicorn.Server:
    """A server whose ``serve(sockets=[listener])`` answers until SIGINT or SIGTERM, and then ends what is under way."""
    config = uvicorn.Config(app, log_level="warning", access_log=False, ws="none", timeout_graceful_shutdown=30)
    return uvicorn.Server(config)
