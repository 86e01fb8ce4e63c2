"""A server on 127.0.0.1 that speaks SGLang's JSON, with a toy model and switches for everything that can go wrong.

``tests/contract/sglang_contract.py`` says what of it must be as in the real server.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import threading
import zlib
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self

from aiohttp import web

from tests.loopback.fake_weights import FakeWeights

Json = dict[str, Any]
Model = Callable[[int, Sequence[int]], tuple[int, float]]
"""(number of the weights, all ids so far) -> (next id, its log-probability)."""
Handler = Callable[[Json], Awaitable[Json | None] | Json | str | None]
Fault = Literal["500", "400", "hang", "drop", "garbage", "abort", "swap", "die", "mismatch"]

VOCAB_SIZE = 200
EOS_ID = 3
_MEMORY = ("kv_cache", "weights", "cuda_graph")
_PROBS = (0.5, 0.3, 0.15, 0.05)
_SAMPLING_FIELDS = {
    "temperature", "top_p", "top_k", "min_p", "max_new_tokens", "stop", "stop_token_ids", "skip_special_tokens",
    "no_stop_trim", "n", "ignore_eos", "sampling_seed", "repetition_penalty", "frequency_penalty", "presence_penalty",
}  # fmt: skip
_FIRST_LETTER = 100


def token_text(token_id: int) -> str:
    """Ids from 100 on are two letters, the ones below a character: no text is a part of two different ids."""
    if token_id >= _FIRST_LETTER:
        return chr(ord("a") + token_id % 10) + chr(ord("k") + token_id // 10 % 10)
    return chr(ord("A") + token_id % 26) if token_id != EOS_ID else "<eos>"


def toy_model(weights: int, ids: Sequence[int]) -> tuple[int, float]:
    """One of four candidates, chosen by a hash; never the end-of-sequence id."""
    digest = hashlib.blake2b(repr((weights, tuple(ids))).encode(), digest_size=8).digest()
    rank = digest[0] % len(_PROBS)
    return _FIRST_LETTER + digest[1] % (VOCAB_SIZE - _FIRST_LETTER), math.log(_PROBS[rank])


def toy_tokens(weights: int, prompt: Sequence[int], count: int, model: Model = toy_model) -> list[int]:
    """What the toy model says after ``prompt``."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(model(weights, ids)[0])
    return ids[len(prompt) :]


class _Running:
    """A request under way."""

    def __init__(self) -> None:
        self.is_aborted = False


class FakeSGLang:
    """``async with FakeSGLang() as fake: ... fake.url``.

    Attributes:
        weights: number of the weights, which the toy model depends on.
        version: what it calls them.
        faults: taken from the left, one per /generate; ``always`` is for all of them.
        token_delay_s: per token.
        num_late_tokens: sampled after what ends a generation, as speculative decoding may.
        requests: bodies of all /generate calls, in order; ``client_ports``: where each came from.
        calls: (route, body) of all other calls, in order.
        max_running: most requests that ever ran at once.
        num_aborted: requests ended by /abort_request; ``num_gone``: by a client that closed the connection.
        model_weights: really receives tensors, when given; else an update changes the number of the weights alone.
        context_length: of prompt and new tokens; the last of them are kept back as in the real server.
        refuses_once: routes; the next call of one is refused.
        loads_and_refuses: how many more folders it loads and then refuses: new weights under the old version.
        dies_at: routes; the next call of one is not answered, and kills it.
        offloaded: memory that it has given up; taking back what it has not given up kills it.
    """

    def __init__(
        self,
        *,
        version: str = "0",
        weights: int = 0,
        model: Model = toy_model,
        is_old: bool = False,
        context_length: int = 1000,
        token_delay_s: float = 0.0,
        model_weights: FakeWeights | None = None,
    ) -> None:
        self.model_weights = model_weights
        self.refuses_once: set[str] = set()
        self.loads_and_refuses = 0
        self.dies_at: set[str] = set()
        self.offloaded: set[str] = set()
        self.weights, self.version, self.model = weights, version, model
        self.is_old = is_old
        self.context_length = context_length
        self.token_delay_s = token_delay_s
        self.num_late_tokens = 0
        self.faults: deque[Fault] = deque()
        self.always: Fault | None = None
        self.replies: dict[str, Json] = {}  # sent with status 200 by a control route that would answer otherwise
        self.model_info: Json = {}  # further fields of /model_info
        self.server_info: Json = {"version": "0.5.23", "tp_size": 1, "context_length": None}
        self.is_without_info = False  # no /server_info, as behind a router
        self.is_sick = False  # /health_generate fails
        self.requests: list[Json] = []
        self.client_ports: list[int] = []
        self.calls: list[tuple[str, Json]] = []
        self.max_running = self.num_aborted = self.num_gone = 0
        self.port = 0
        self._first_state = weights, version
        self._running: dict[str, _Running] = {}
        self._pause_mode = ""
        self._has_session = False
        self._groups: set[str] = set()
        self._seen: list[tuple[int, ...]] = []
        self._runner: web.AppRunner | None = None
        self.tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def max_req_input_len(self) -> int:
        """Prompts must be shorter; 5 tokens fewer than the longest request, which is one shorter than the context."""
        return self.context_length - 1 - 5

    @property
    def num_running(self) -> int:
        return len(self._running)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.die()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    async def start(self) -> None:
        """Listen, at the port of before if there was one."""
        app = web.Application(client_max_size=2**30)
        app.router.add_get("/model_info", self._model_info)
        app.router.add_get("/server_info", self._server_info)
        app.router.add_get("/health_generate", self._health_generate)
        app.router.add_post("/generate", self._generate)
        for route, handler in self._controls().items():
            app.router.add_post(route, self._control(route, handler))
        # As SGLang does, a request ends when its client is gone.
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.01, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def die(self) -> None:
        """All at once: open connections are reset, new ones are refused."""
        runner, self._runner = self._runner, None
        if runner is None:
            return
        for site in list(runner.sites):
            await site.stop()
        assert runner.server is not None
        for connection in list(runner.server.connections):
            if connection.transport is not None:
                connection.transport.abort()
        await runner.cleanup()
        self._running.clear()

    async def come_back(self, version: str | None = None) -> None:
        """A new start: with the weights of its first one, or with those that make it ``version``."""
        self.weights, self.version = self._first_state
        if version is not None:
            self.version = version
        self._seen, self._has_session, self._pause_mode, self.offloaded = [], False, "", set()
        await self.start()

    def hold(self, weights: int, version: str) -> None:
        """New weights by magic."""
        self.weights, self.version = weights, version
        self._seen.clear()

    # Generation

    async def _generate(self, http: web.Request) -> web.StreamResponse:
        body = await http.json()
        self.requests.append(body)
        assert http.transport is not None
        self.client_ports.append(http.transport.get_extra_info("peername")[1])
        fault = self.faults.popleft() if self.faults else self.always
        if fault == "500":
            return web.json_response({"error": {"message": "CUDA error: an illegal memory access"}}, status=500)
        if fault == "garbage":
            return web.Response(text="<html>bad gateway</html>")
        problem = "injected refusal" if fault == "400" else self._problem(body)
        if problem:
            return _error(problem)
        if max(body["input_ids"]) >= VOCAB_SIZE or fault == "die":
            self._later(self.die())  # as the real one does, of an index outside the embedding
            fault = "hang"
        if fault == "drop":
            response = web.StreamResponse(headers={"Content-Length": "1000"})
            await response.prepare(http)
            await response.write(b'{"text": "half of')
            http.transport.abort()
            return response
        rid = body.get("rid") or f"fake-{len(self.requests)}"
        self._running[rid] = run = _Running()
        self.max_running = max(self.max_running, len(self._running))
        try:
            answer = await self._sample(rid, body, fault, run)
        except asyncio.CancelledError:
            self.num_gone += 1
            raise
        finally:
            self._running.pop(rid, None)
        return web.json_response(answer)

    def _problem(self, body: Json) -> str:
        ids, params = body.get("input_ids"), body.get("sampling_params", {})
        if not ids:
            return "input_ids cannot be empty"
        if set(params) - _SAMPLING_FIELDS:
            return f"unexpected keyword argument {sorted(set(params) - _SAMPLING_FIELDS)[0]!r}"
        if params.get("temperature", 1.0) < 0:
            return "temperature must be non-negative"
        if body.get("rid") in self._running:
            return f"Duplicate request ID detected: {body['rid']}"
        if len(ids) + params.get("max_new_tokens", 128) > self.context_length:
            return f"Requested token count exceeds the model's maximum context length of {self.context_length} tokens."
        if len(ids) >= self.max_req_input_len:
            return f"Input length ({len(ids)} tokens) exceeds the maximum allowed length ({self.max_req_input_len})."
        return ""

    async def _sample(self, rid: str, body: Json, fault: Fault | None, run: _Running) -> Json:
        params = body["sampling_params"]
        ids, new = list(body["input_ids"]), list[int]()
        logprobs, versions = list[float](), list[str]()
        cached = max((_common(seen, ids) for seen in self._seen), default=0)
        # Cut in silence: the last two tokens of the context are never sampled.
        limit = min(params["max_new_tokens"], self.context_length - 2 - len(ids))
        finish: Json = {"type": "length", "length": limit}
        while len(new) < limit:
            await asyncio.sleep(self.token_delay_s)
            while (fault == "hang" or self._pause_mode) and not run.is_aborted:
                await asyncio.sleep(0.002)
            if run.is_aborted or (fault == "abort" and len(new) == 2):
                finish = {"type": "abort", "message": "Abort", "status_code": None, "err_type": None}
                break
            if fault == "swap" and len(new) == 2:
                self.hold(self.weights + 1, str(int(self.version) + 1))
            token_id, logprob = self.model(self.weights, ids)
            ids.append(token_id)
            new.append(token_id)
            logprobs.append(logprob)
            versions.append(self.version)
            matched = _matched(params, new[: len(new) - self.num_late_tokens])
            if matched is not None:
                finish = {"type": "stop", "matched": matched}
                break
        self._seen.append(tuple(ids))
        if fault == "mismatch":
            new = [*new[:-1], new[-1] + 1]
        text = "".join(map(token_text, new))
        if isinstance(finish.get("matched"), str) and not params.get("no_stop_trim"):
            text = text[: text.index(finish["matched"])]
        meta = {
            "id": rid,
            "finish_reason": finish,
            "prompt_tokens": len(body["input_ids"]),
            "completion_tokens": len(new),
            "cached_tokens": min(cached, len(body["input_ids"]) - 1),
            "weight_version": self.version,
            "num_retractions": 0,
        }
        if not self.is_old:
            meta["weight_versions"] = _spans(versions)
        if body.get("return_logprob"):
            meta["output_token_logprobs"] = [[lp, i, None] for lp, i in zip(logprobs, ids[-len(new) :], strict=False)]
        return {"text": text, "output_ids": new, "meta_info": meta}

    # Health and control

    async def _model_info(self, http: web.Request) -> web.Response:
        self.calls.append(("/model_info", {}))
        info = {"model_path": "toy", "is_generation": True, "weight_version": self.version}
        return web.json_response(info | self.model_info)

    async def _server_info(self, http: web.Request) -> web.Response:
        self.calls.append(("/server_info", {}))
        if self.is_without_info:
            return web.Response(status=404)
        return web.json_response({"max_req_input_len": self.max_req_input_len, **self.server_info})

    async def _health_generate(self, http: web.Request) -> web.Response:
        self.calls.append(("/health_generate", {}))
        return web.Response(status=503 if self.is_sick else 200)

    async def _crash(self) -> None:
        self._later(self.die())
        await asyncio.sleep(60)

    def _control(self, route: str, handler: Handler) -> Any:
        async def respond(http: web.Request) -> web.Response:
            content = await http.read()
            body = json.loads(content) if content else {}
            self.calls.append((route, body))
            if route in self.dies_at:
                self.dies_at.remove(route)
                await self._crash()
            if route in self.refuses_once:
                self.refuses_once.remove(route)
                return web.json_response(_failure("not this time"), status=400)
            if route in self.replies:
                return web.json_response(self.replies[route])
            answer = handler(body)
            if isinstance(answer, Awaitable):
                answer = await answer
            if answer is None:
                return web.Response()
            if isinstance(answer, str):
                return web.Response(text=answer, status=400)
            return web.json_response(answer, status=400 if answer.get("success") is False else 200)

        return respond

    def _controls(self) -> dict[str, Handler]:
        """Handlers: None is an empty 200, a text a bare 400, a JSON object carries its success."""
        controls: dict[str, Handler] = {
            "/abort_request": self._abort,
            "/pause_generation": self._pause,
            "/continue_generation": self._continue,
            "/flush_cache": self._flush,
            "/update_weights_from_disk": self._from_disk,
            "/update_weights_from_tensor": self._from_tensor,
            "/init_weights_update_group": self._init_group,
            "/update_weights_from_distributed": self._from_distributed,
            "/destroy_weights_update_group": self._destroy_group,
            "/weights_checker": self._checksum,
            "/release_memory_occupation": self._release,
            "/resume_memory_occupation": self._resume,
        }
        if not self.is_old:
            controls["/begin_weight_update"] = self._begin
            controls["/end_weight_update"] = self._end
        return controls

    def _abort(self, body: Json) -> None:
        for rid, run in self._running.items():
            if (body.get("abort_all") or rid == body.get("rid")) and not run.is_aborted:
                run.is_aborted = True
                self.num_aborted += 1

    def _pause(self, body: Json) -> Json:
        self._pause_mode = body.get("mode", "abort")
        if self._pause_mode == "abort":
            self._abort({"abort_all": True})
        return {"message": "Generation paused successfully.", "status": "ok"}

    def _continue(self, body: Json) -> Json:
        self._pause_mode = ""
        return {"message": "Generation continued successfully.", "status": "ok"}

    async def _release(self, body: Json) -> None:
        if self._running:  # the real one asserts that it is idle
            await self._crash()
        self.offloaded |= set(body.get("tags") or _MEMORY)

    async def _resume(self, body: Json) -> None:
        tags = set(body.get("tags") or _MEMORY)
        if not tags <= self.offloaded:
            await self._crash()
        self.offloaded -= tags

    def _flush(self, body: Json) -> str | None:
        if self._running and self._pause_mode != "retract":
            return "Flush cache failed: requests are running."
        self._seen.clear()
        return None

    # Weights: their number is a checksum of whatever was sent

    def _take(self, body: Json, weights: int) -> Json:
        self.weights = weights
        if body.get("weight_version") is not None:
            self.version = body["weight_version"]
        if body.get("flush_cache", True):
            self._seen.clear()
        return {"success": True, "message": "Succeeded to update model weights."}

    def _from_disk(self, body: Json) -> Json:
        files = sorted(Path(body["model_path"]).glob("*.safetensors"))
        if not files:
            return _failure(f"Failed to get weights iterator: {body['model_path']} is not a folder with weights")
        if self.model_weights is not None:
            self.model_weights.load_folder(Path(body["model_path"]))
        if self.loads_and_refuses:
            self.loads_and_refuses -= 1
            return _failure("Weights were updated, but the cache was not flushed because requests are still running.")
        return self._take(body, zlib.crc32(b"".join(file.read_bytes() for file in files)))

    def _from_tensor(self, body: Json) -> Json:
        if not self._has_session and not self.is_old:
            return _failure("no weight-update session is open")
        if self.model_weights is not None:
            self.model_weights.load_serialized(body)
        return self._take(body, zlib.crc32("".join(body["serialized_named_tensors"]).encode()))

    async def _from_distributed(self, body: Json) -> Json:
        if not self._has_session and not self.is_old:
            return _failure("no weight-update session is open")
        if body["group_name"] not in self._groups:
            return _failure(f"group {body['group_name']} not found")
        if self.model_weights is not None:
            await asyncio.to_thread(self.model_weights.receive, body)
        return self._take(body, zlib.crc32("".join(body["names"]).encode()))

    async def _init_group(self, body: Json) -> Json:
        if self.model_weights is not None:
            await asyncio.to_thread(self.model_weights.join, body)
        self._groups.add(body["group_name"])
        return {"success": True, "message": "Succeeded to initialize custom process group."}

    def _destroy_group(self, body: Json) -> Json:
        if body["group_name"] not in self._groups:
            return _failure("The group to be destroyed does not exist.")
        self._groups.remove(body["group_name"])
        return {"success": True, "message": "Succeeded to destroy custom process group."}

    def _begin(self, body: Json) -> Json:
        if self._has_session:
            return _failure("a weight-update session is already open; call end_weight_update() first")
        self._has_session = True
        return {"success": True, "message": "Success"}

    def _end(self, body: Json) -> Json:
        if not self._has_session:
            return _failure("no weight-update session is open; call begin_weight_update() first")
        self._has_session = False
        return {"success": True, "message": "Success"}

    def _checksum(self, body: Json) -> Json:
        if body.get("action") != "checksum":
            return _failure(f"unknown action {body.get('action')}")
        value = f"{self.weights:08x}"
        checksums = {"toy.weight": value} if self.model_weights is None else self.model_weights.checksums()
        rank = {"checksums": checksums, "per_gpu_checksum": value}
        return {"success": True, "message": "Success", "ranks": [rank], "per_engine_checksum": value}

    def _later(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self.tasks.add(task)


def _matched(params: Json, new: Sequence[int]) -> int | str | None:
    """What ends the generation with its newest id; the server looks at decoded text, stop strings first."""
    text = "".join(map(token_text, new))
    for stop in params.get("stop") or ():
        if stop in text:
            return str(stop)
    if params.get("ignore_eos"):
        return None
    return new[-1] if new and new[-1] in {EOS_ID, *(params.get("stop_token_ids") or ())} else None


def _spans(versions: Sequence[str]) -> list[Json]:
    spans: list[Json] = []
    for position, version in enumerate(versions):
        if not spans or spans[-1]["version"] != version:
            spans.append({"version": version, "start": position, "end": position})
        spans[-1]["end"] = position + 1
    return spans


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def _error(message: str) -> web.Response:
    return web.json_response({"error": {"message": message}}, status=400)


def _failure(message: str) -> Json:
    return {"success": False, "message": message}


@contextmanager
def running_in_thread(fake: FakeSGLang) -> Iterator[FakeSGLang]:
    """For callers that have no event loop, or one of their own; the fake's attributes may be read while it runs."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(fake.start(), loop).result(10)
        yield fake
    finally:
        asyncio.run_coroutine_threadsafe(fake.__aexit__(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
