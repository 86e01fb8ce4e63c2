"""The rollout engine over several SGLang servers: choice of server, retries, and checks of answers.

Restarts and weight updates happen elsewhere: a server that failed is used again once it answers with the current
weights. A request is sent again only if no answer to it was used.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import KW_ONLY, dataclass
from typing import Literal
from uuid import uuid4

from megatron_sdsearch.config import SGLangConfig
from megatron_sdsearch.errors import EngineError, ServerUnavailableError
from megatron_sdsearch.records import TrajectoryId
from megatron_sdsearch.rollout.checks import check_request
from megatron_sdsearch.rollout.engine import Generation, GenerationRequest
from megatron_sdsearch.sglang.api import Json, SGLangServer
from megatron_sdsearch.tokenization.spans import StopMatcher, TokenBytes

_log = logging.getLogger(__name__)

_MAX_ATTEMPTS = 6
_FIRST_BACKOFF_S = 0.05
_ABORT_TIMEOUT_S = 5.0
_POLL_TIMEOUT_S = 5.0
_SAMPLE_TIMEOUT_S = 30.0  # of /health_generate; SGLang's own limit is 20 s
_COUNTS = ("num_retries", "num_moved", "num_wrong_version", "num_prompt_tokens", "num_cached_tokens")
# Overrides a server's --preferred-sampling-params, which would change the distribution of the log-probabilities.
_NEUTRAL = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0}


@dataclass(kw_only=True, eq=False)
class PooledServer:
    """A server as this rank's engine sees it.

    Attributes:
        api: sends requests to it.
        slots: limits this rank's open requests.
        is_usable: whether it gets new requests.
        last_error: why it is, or was, not usable.
        poll: task that waits until a server that is down is usable again.
    """

    api: SGLangServer
    slots: asyncio.Semaphore
    is_usable: bool = True
    last_error: str = ""
    poll: asyncio.Task[None] | None = None


@dataclass(eq=False, repr=False)
class SGLangEngine:
    """Samples from servers that hold the policy's weights; implements ``Engine``.

    All turns of a trajectory go to one server, so that its prefix cache holds all but the newest tokens. When a server
    fails, its trajectories continue on another. An answer counts only if all its tokens are from the current policy
    version.

    Unlike the protocol demands, the random stream depends on the server. With ``deterministic`` a seed derived from
    (seed, trajectory, position) is sent; SGLang uses it on GPUs with ``--enable-deterministic-inference`` and ignores
    it on CPU.

    Attributes:
        urls: of the servers, ``http://host:port``.
        token_bytes: of the model's tokenizer, for stop strings.
        eos_ids: ids that end a generation, besides the server's own.
        vocab_size: of the model; an id outside would kill an SGLang server, so it is never sent.
        max_total_tokens: of prompt and new tokens together.
        config: ``request_timeout_s``, ``down_timeout_s`` and ``max_concurrency`` are read.
        policy_version: set after each publish; answers of any other version are discarded.
        deterministic: see above.
        retry_interval_s: between polls of a server that is down; also the longest pause before a retry.
        raise_root_cause: awaited before an EngineError is raised; may raise a more specific one.
        servers: in the order of the urls.
    """

    urls: Sequence[str]
    token_bytes: TokenBytes
    eos_ids: Collection[int]
    vocab_size: int
    max_total_tokens: int
    config: SGLangConfig
    _: KW_ONLY
    policy_version: int = 0
    deterministic: bool = False
    retry_interval_s: float = 1.0
    raise_root_cause: Callable[[], Awaitable[None]] | None = None

    def __post_init__(self) -> None:
        self.servers = [
            PooledServer(
                api=SGLangServer(url, timeout_s=self.config.request_timeout_s),
                slots=asyncio.Semaphore(self.config.max_concurrency),
            )
            for url in self.urls
        ]
        self._random = random.Random()  # the global one is seeded for the run
        self._counts: Counter[str] = Counter()
        self._assigned: dict[TrajectoryId, PooledServer] = {}
        self._has_usable = asyncio.Event()

    def take_counts(self) -> dict[str, int]:
        """Return the counts since the last call, by metric name.

        ``num_retries``: requests sent again. ``num_moved``: trajectories that continued on another server.
        ``num_wrong_version``: answers discarded because a token may be from other than the current weights.
        ``num_prompt_tokens``: of the answered requests; ``num_cached_tokens`` of them were in prefix caches.
        """
        counts, self._counts = self._counts, Counter()
        return {f"engine/{name}": counts[name] for name in _COUNTS}

    async def generate(self, request: GenerationRequest) -> Generation:
        """Sample one continuation. Cancelling the call also aborts the request on the server.

        Raises:
            EngineError: the request would crash a model or does not fit (nothing was sent); a server refused it; no
                server was usable for ``down_timeout_s``; all attempts failed; the answer is not from SGLang, or was
                decoded with another tokenizer.
        """
        check_request(request, self.vocab_size, self.max_total_tokens)
        try:
            return await self._generate(request)
        except EngineError:
            if self.raise_root_cause is not None:
                await self.raise_root_cause()
            raise

    async def release(self, trajectory_id: TrajectoryId) -> None:
        """Forget the trajectory's server; the server evicts its cache itself."""
        self._assigned.pop(trajectory_id, None)

    async def close(self) -> None:
        """Cancel the polls of servers that are down."""
        polls = [server.poll for server in self.servers if server.poll is not None]
        for poll in polls:
            poll.cancel()
        await asyncio.gather(*polls, return_exceptions=True)

    # One request

    async def _generate(self, request: GenerationRequest) -> Generation:
        payload = self._payload(request)
        problem = ""
        for attempt in range(_MAX_ATTEMPTS):
            if attempt:
                self._counts["num_retries"] += 1
                longest = min(_FIRST_BACKOFF_S * float(2 ** (attempt - 1)), self.retry_interval_s)
                await asyncio.sleep(longest * self._random.uniform(0.5, 1.0))  # spreads requests that failed together
            async with self._slot(request.trajectory_id) as server:
                version = self.policy_version
                try:
                    answer = await self._send(server, payload)
                except ServerUnavailableError as error:
                    problem = str(error)
                    continue
                try:
                    problem = self._version_problem(server, answer, version)
                    if not problem:
                        return self._read_generation(request, answer, server.api.url)
                except (LookupError, TypeError, ValueError, AttributeError) as error:
                    problem = f"its answer {str(answer)[:500]} cannot be read ({error!r}); is it an SGLang server?"
                    raise EngineError(f"{server.api.url}: {problem}") from error
        raise EngineError(f"{request.trajectory_id}: all {_MAX_ATTEMPTS} attempts failed, the last one: {problem}")

    def _payload(self, request: GenerationRequest) -> Json:
        params = request.params
        sampling: Json = {
            "temperature": params.temperature,
            "top_p": params.top_p,
            "max_new_tokens": params.max_new_tokens,
            "stop": list(params.stop),
            "stop_token_ids": sorted(self.eos_ids),
            "no_stop_trim": True,
            "skip_special_tokens": False,
            **_NEUTRAL,
        }
        if self.deterministic:
            sampling["sampling_seed"] = sampling_seed(request)
        return {"input_ids": list(request.prompt_ids), "sampling_params": sampling, "return_logprob": True}

    async def _send(self, server: PooledServer, payload: Json) -> Json:
        # Unique per attempt: a server refuses the id of a request that it is still processing.
        rid = f"sdsearch-{uuid4().hex}"
        try:
            return await server.api.call("/generate", {**payload, "rid": rid})
        except (asyncio.CancelledError, ServerUnavailableError) as error:
            is_open = True  # the server may still be processing it
            if isinstance(error, ServerUnavailableError):
                is_open = error.is_timeout
                self._take_down(server, str(error))
            if is_open:
                try:
                    await server.api.send("/abort_request", {"rid": rid}, timeout_s=_ABORT_TIMEOUT_S)
                except EngineError as failure:
                    _log.warning("request %s could not be aborted: %s", rid, failure)
            raise

    def _version_problem(self, server: PooledServer, answer: Json, version: int) -> str:
        """Return why the answer must be discarded, or "". ``version`` was current when the request was sent."""
        url = server.api.url
        meta = answer["meta_info"]
        if meta["finish_reason"]["type"] == "abort":
            return f"{url} aborted the request: {meta['finish_reason'].get('message')}"
        held = str(meta.get("weight_version"))
        # Servers without spans do not report a change of weights in mid-request.
        spans = meta.get("weight_versions") or [{"version": version}]
        versions = {held, *(str(span.get("version")) for span in spans)}
        if versions == {str(self.policy_version)}:
            return ""
        self._counts["num_wrong_version"] += 1
        problem = f"it sampled from weight versions {sorted(versions)}, the current one is '{self.policy_version}'"
        if held != str(self.policy_version) and version == self.policy_version:
            self._take_down(server, problem)
        return f"{url}: {problem}"

    def _read_generation(self, request: GenerationRequest, answer: Json, url: str) -> Generation:
        meta = answer["meta_info"]
        token_ids, entries = tuple(answer["output_ids"]), meta["output_token_logprobs"]
        logprobs = tuple(float(entry[0]) for entry in entries)
        if tuple(entry[1] for entry in entries) != token_ids or not all(map(math.isfinite, logprobs)):
            raise EngineError(
                f"{url}: output_ids are {str(token_ids)[:200]}, but output_token_logprobs {str(entries)[:200]}"
            )
        length, reason = self._find_end(request, token_ids, meta["finish_reason"], url)
        self._counts["num_prompt_tokens"] += len(request.prompt_ids)
        self._counts["num_cached_tokens"] += int(meta.get("cached_tokens") or 0)
        return Generation(
            token_ids=token_ids[:length],
            logprobs=logprobs[:length],
            finish_reason=reason,
            policy_version=self.policy_version,
        )

    def _find_end(
        self, request: GenerationRequest, token_ids: Sequence[int], finish: Json, url: str
    ) -> tuple[int, Literal["stop", "eos", "length"]]:
        """Return length and finish reason, from the bytes of the ids; the server looks at decoded text instead."""
        matcher = StopMatcher(request.params.stop)
        for length, token_id in enumerate(token_ids, 1):
            if matcher.push(self.token_bytes[token_id]):
                return length, "stop"
            if token_id in self.eos_ids:
                return length, "eos"
            if length == request.params.max_new_tokens:
                return length, "length"
        if finish["type"] == "length" and token_ids:  # the server's own context is shorter
            return len(token_ids), "length"
        if finish["type"] == "stop" and token_ids and finish.get("matched") == token_ids[-1]:
            return len(token_ids), "eos"  # one of the server's own
        raise EngineError(
            f"{url}: {request.trajectory_id} ended with {finish} after ids {list(token_ids[-8:])}, but their bytes "
            "hold no such end; the server's tokenizer is not the trainer's, or its model computes NaN"
        )

    # Which server

    @asynccontextmanager
    async def _slot(self, trajectory_id: TrajectoryId) -> AsyncIterator[PooledServer]:
        """Wait for a slot of a usable server, preferably that of the trajectory's earlier turns.

        Raises:
            EngineError: no server has been usable for ``down_timeout_s``.
        """
        while True:
            while (server := self._assign(trajectory_id)) is None:
                self._has_usable.clear()
                try:
                    await asyncio.wait_for(self._has_usable.wait(), self.config.down_timeout_s)
                except TimeoutError:
                    errors = "; ".join(f"{server.api.url}: {server.last_error}" for server in self.servers)
                    raise EngineError(
                        f"none of {len(self.servers)} SGLang servers was usable for {self.config.down_timeout_s:g} s "
                        f"(rollout.sglang.down_timeout_s); {errors}"
                    ) from None
            async with server.slots:
                if server.is_usable:  # it may have gone down meanwhile
                    yield server
                    return

    def _assign(self, trajectory_id: TrajectoryId) -> PooledServer | None:
        before = self._assigned.get(trajectory_id)
        if before is not None and before.is_usable:
            return before
        usable = [server for server in self.servers if server.is_usable]
        if not usable:
            return None
        loads = Counter(assigned.api.url for assigned in self._assigned.values())
        # Ties are broken at random, because ranks do not see each other's load.
        server = min(usable, key=lambda server: (loads[server.api.url], self._random.random()))
        self._assigned[trajectory_id] = server
        self._counts["num_moved"] += before is not None
        return server

    def _take_down(self, server: PooledServer, problem: str) -> None:
        """Send nothing to the server until it has the current weights and can sample."""
        server.last_error = problem
        if server.is_usable:
            server.is_usable = False
            _log.warning("%s is down: %s", server.api.url, problem)
            server.poll = asyncio.create_task(self._poll_until_usable(server))

    async def _poll_until_usable(self, server: PooledServer) -> None:
        while True:
            await asyncio.sleep(self.retry_interval_s)
            try:
                info = await server.api.call("/model_info", timeout_s=_POLL_TIMEOUT_S)  # answers while paused, too
                version = str(info.get("weight_version"))
                if version == str(self.policy_version):
                    # A server with a hanging scheduler still reports its version.
                    await server.api.send("/health_generate", timeout_s=_SAMPLE_TIMEOUT_S)
                    break
                server.last_error = f"its weight version is {version!r}, the current one is '{self.policy_version}'"
            except EngineError as error:
                server.last_error = str(error)
        _log.warning("%s is back with weight version %d", server.api.url, self.policy_version)
        server.is_usable = True
        self._has_usable.set()


def sampling_seed(request: GenerationRequest) -> int:
    """Return the seed of a request in [0, 2**31), a function of seed, trajectory and position only."""
    name = request.trajectory_id
    key = f"{request.seed}\0{name.step}\0{name.sibling}\0{name.question_id}\0{len(request.prompt_ids)}"
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest(), "little") >> 1
