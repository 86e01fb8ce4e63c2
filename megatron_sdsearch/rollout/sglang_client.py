"""A rollout engine in front of SGLang servers: what is sent to them, and what of an answer may be believed.

Owns retries, the check of weight versions, and the reading of an answer into a ``Generation``. Which server is asked is
``sglang_pool.py``'s, the JSON routes are ``sglang_api.py``'s. Nothing is returned twice: a request is sent again only
when no answer to it was used.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar
from uuid import uuid4

from megatron_sdsearch.config import SGLangConfig
from megatron_sdsearch.errors import EngineError, ServerRefusedError, ServerUnavailableError
from megatron_sdsearch.records import TrajectoryId
from megatron_sdsearch.rollout.checks import check_request
from megatron_sdsearch.rollout.engine import Generation, GenerationRequest
from megatron_sdsearch.rollout.sglang_api import Json
from megatron_sdsearch.rollout.sglang_pool import PooledServer, ServerPool, ServerStats
from megatron_sdsearch.tokenization.spans import StopMatcher, TokenBytes

T = TypeVar("T")
_log = logging.getLogger(__name__)

_MAX_ATTEMPTS = 6
_FIRST_BACKOFF_S = 0.05
_ABORT_TIMEOUT_S = 5.0
# A server's --preferred-sampling-params must not bend the distribution that the log-probabilities are of.
_NEUTRAL = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """What happened since the last snapshot.

    Attributes:
        num_retries: requests sent again, for whatever reason.
        num_moved: times a trajectory went on at another server than before.
        num_wrong_version: answers discarded because a token may be from other weights than the current ones.
        servers: in the order of the urls.
    """

    num_retries: int
    num_moved: int
    num_wrong_version: int
    servers: tuple[ServerStats, ...]


class SGLangEngine:
    """Implements ``Engine`` with servers that hold the policy's weights.

    A trajectory's turns go to one server, whose prefix cache then has all but the newest tokens. When a server fails,
    its trajectories go on elsewhere. An answer counts only when all of its tokens are from the current policy version.

    The protocol's random stream per trajectory is not kept: what is drawn depends on the server. With
    ``deterministic`` a seed made of (seed, trajectory, position) is sent along, which SGLang honours on GPUs under
    ``--enable-deterministic-inference`` and ignores on a CPU.

    Args:
        urls: of the servers, ``http://host:port``.
        token_bytes: of the model's tokenizer, for stop strings.
        eos_ids: ids that end a generation; the server's own end it, too.
        vocab_size: of the model; an id outside kills an SGLang server, so it is never sent.
        max_total_tokens: of prompt and new tokens together.
        config: ``request_timeout_s``, ``down_timeout_s`` and ``max_concurrency`` are read.
        policy_version: of the weights that the servers hold, as ``weight_version`` names it.
        deterministic: see above.
        retry_interval_s: between polls of a server that is down, and the longest pause before a retry.

    Raises:
        EngineError: no url, one twice, or one that is none.
    """

    def __init__(
        self,
        urls: Sequence[str],
        token_bytes: TokenBytes,
        eos_ids: Collection[int],
        vocab_size: int,
        max_total_tokens: int,
        config: SGLangConfig,
        *,
        policy_version: int = 0,
        deterministic: bool = False,
        retry_interval_s: float = 1.0,
    ) -> None:
        self._pool = ServerPool(
            urls,
            max_concurrency=config.max_concurrency,
            down_timeout_s=config.down_timeout_s,
            retry_interval_s=retry_interval_s,
            policy_version=policy_version,
        )
        self._token_bytes = token_bytes
        self._eos_ids = frozenset(eos_ids)
        self._vocab_size = vocab_size
        self._max_total_tokens = max_total_tokens
        self._request_timeout_s = config.request_timeout_s
        self._deterministic = deterministic
        self._retry_interval_s = retry_interval_s
        self._random = random.Random()
        self._open: set[asyncio.Task[Generation]] = set()
        self._is_closed = False
        self._num_retries = self._num_wrong_version = 0

    @property
    def policy_version(self) -> int:
        """The version that every generation must carry."""
        return self._pool.policy_version

    def set_policy_version(self, version: int) -> None:
        """Weights were published: from now on nothing else than ``version`` is returned.

        A server that does not hold it goes down at its first answer and is taken back once it does.
        """
        self._pool.policy_version = version

    def take_stats(self) -> EngineStats:
        """What was counted since the last call."""
        stats = EngineStats(
            num_retries=self._num_retries,
            num_moved=self._pool.num_moved,
            num_wrong_version=self._num_wrong_version,
            servers=self._pool.take_stats(),
        )
        self._num_retries = self._num_wrong_version = self._pool.num_moved = 0
        return stats

    async def generate(self, request: GenerationRequest) -> Generation:
        """See ``Engine``. A caller that is cancelled ends its request at the server, too.

        Raises:
            EngineError: the request would crash a model or does not fit (nothing was sent); a server refused it; no
                server was usable for ``down_timeout_s``; several attempts failed; the answer is no SGLang's, or was
                decoded with another tokenizer; or the engine was closed.
        """
        check_request(request, self._vocab_size, self._max_total_tokens)
        if self._is_closed:
            raise EngineError("the engine was closed")
        task = asyncio.create_task(self._answer(request))  # of its own, so that close can end it
        self._open.add(task)
        task.add_done_callback(self._open.discard)
        try:
            return await task
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if caller is not None and not caller.cancelling():  # then only close has ended the task
                raise EngineError("the engine was closed") from None
            raise

    async def release(self, trajectory_id: TrajectoryId) -> None:
        """Forget the trajectory's server; what that caches it evicts by itself."""
        self._pool.release(trajectory_id)

    async def close(self) -> None:
        """Abort what is open, whose callers get an EngineError; end polls and connections."""
        self._is_closed = True
        tasks = list(self._open)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._pool.close()

    async def _answer(self, request: GenerationRequest) -> Generation:
        payload = self._payload(request)
        reason = ""
        for attempt in range(_MAX_ATTEMPTS):
            if attempt:
                self._num_retries += 1
                await asyncio.sleep(self._backoff_s(attempt))
            async with self._pool.slot(request.trajectory_id) as server:
                version = self.policy_version
                try:
                    answer = await self._send(server, payload)
                except ServerUnavailableError as error:
                    reason = str(error)
                    continue
                reason = self._objection(server, answer, version)
                if not reason:
                    return self._generation(request, server, answer)
        raise EngineError(f"{request.trajectory_id}: gave up after {_MAX_ATTEMPTS} attempts, the last one: {reason}")

    def _payload(self, request: GenerationRequest) -> Json:
        params = request.params
        sampling: Json = {
            "temperature": params.temperature,
            "top_p": params.top_p,
            "max_new_tokens": params.max_new_tokens,
            "stop": list(params.stop),
            "stop_token_ids": sorted(self._eos_ids),
            "no_stop_trim": True,
            "skip_special_tokens": False,
            **_NEUTRAL,
        }
        if self._deterministic:
            sampling["sampling_seed"] = sampling_seed(request)
        return {"input_ids": list(request.prompt_ids), "sampling_params": sampling, "return_logprob": True}

    def _backoff_s(self, attempt: int) -> float:
        longest = min(_FIRST_BACKOFF_S * float(2 ** (attempt - 1)), self._retry_interval_s)
        return longest * self._random.uniform(0.5, 1.0)  # callers that failed together come back apart

    async def _send(self, server: PooledServer, payload: Json) -> Json:
        # Unique per attempt: a server refuses an id that it is still at work on.
        rid = f"sdsearch-{uuid4().hex}"
        server.num_requests += 1
        try:
            return await server.api.generate({**payload, "rid": rid}, timeout_s=self._request_timeout_s)
        except asyncio.CancelledError:
            await self._abort(server, rid)
            raise
        except ServerUnavailableError as error:
            self._pool.take_down(server, str(error), is_hung=error.is_timeout)
            if error.is_timeout:
                await self._abort(server, rid)
            raise

    async def _abort(self, server: PooledServer, rid: str) -> None:
        try:
            await server.api.abort(rid, timeout_s=_ABORT_TIMEOUT_S)
        except (ServerRefusedError, ServerUnavailableError) as error:
            _log.warning("request %s could not be aborted: %s", rid, error)

    def _objection(self, server: PooledServer, answer: Json, version: int) -> str:
        """Why the answer must not be used; empty when it may. ``version`` was current when the request was sent."""
        meta = _field(server, answer, "meta_info", dict)
        finish = _field(server, meta, "finish_reason", dict)
        if finish.get("type") == "abort":
            return f"{server.api.url} aborted the request: {finish.get('message')}"
        held = str(meta.get("weight_version"))
        # Without spans a change of weights half-way goes unseen by the server, but not by whoever published.
        spans = meta.get("weight_versions") or [{"version": version}]
        versions = {held, *(str(span.get("version")) for span in spans)}
        if versions == {str(self.policy_version)}:
            return ""
        self._num_wrong_version += 1
        reason = f"it sampled from weight versions {sorted(versions)}, the current one is '{self.policy_version}'"
        if held != str(self.policy_version) and version == self.policy_version:
            self._pool.take_down(server, reason)
        return f"{server.api.url}: {reason}"

    def _generation(self, request: GenerationRequest, server: PooledServer, answer: Json) -> Generation:
        meta = answer["meta_info"]
        token_ids, logprobs = _tokens(server, answer)
        length, reason = self._cut(request, token_ids, meta["finish_reason"], server.api.url)
        server.num_prompt_tokens += len(request.prompt_ids)
        server.num_cached_tokens += int(meta.get("cached_tokens") or 0)
        return Generation(
            token_ids=token_ids[:length],
            logprobs=logprobs[:length],
            finish_reason=reason,
            policy_version=self.policy_version,
        )

    def _cut(
        self, request: GenerationRequest, token_ids: Sequence[int], finish: Json, url: str
    ) -> tuple[int, Literal["stop", "eos", "length"]]:
        """How many ids belong to the generation, and what ends it: our own bytes decide, the server looks at text."""
        matcher = StopMatcher(request.params.stop)
        for length, token_id in enumerate(token_ids, 1):
            if matcher.push(self._token_bytes[token_id]):
                return length, "stop"
            if token_id in self._eos_ids:
                return length, "eos"
            if length == request.params.max_new_tokens:
                return length, "length"
        if finish["type"] == "length" and token_ids:  # the server's own context is shorter
            return len(token_ids), "length"
        if finish["type"] == "stop" and token_ids and finish.get("matched") == token_ids[-1]:
            return len(token_ids), "eos"  # one of the server's own
        raise EngineError(
            f"{url}: {request.trajectory_id} ended as {finish} after ids {list(token_ids[-8:])}, whose bytes say "
            "nothing of it; the server's tokenizer is not the trainer's, or its model computes NaN"
        )


def sampling_seed(request: GenerationRequest) -> int:
    """Of the request, in [0, 2**31): a function of seed, trajectory and position alone."""
    name = request.trajectory_id
    key = f"{request.seed}\0{name.step}\0{name.sibling}\0{name.question_id}\0{len(request.prompt_ids)}"
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest(), "little") >> 1


def _tokens(server: PooledServer, answer: Json) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Ids and log-probabilities.

    Raises:
        EngineError: the two lists are not there, do not agree, or hold something else.
    """
    token_ids = tuple(_field(server, answer, "output_ids", list))
    entries = _field(server, answer["meta_info"], "output_token_logprobs", list)
    try:
        logprobs = tuple(float(entry[0]) for entry in entries)
        ids_there = tuple(entry[1] for entry in entries)
    except (TypeError, ValueError, LookupError) as error:
        raise EngineError(f"{server.api.url}: log-probabilities are {str(entries)[:200]}") from error
    if ids_there != token_ids or not all(map(math.isfinite, logprobs)):
        raise EngineError(
            f"{server.api.url}: output_ids are {str(token_ids)[:200]}, but output_token_logprobs {str(entries)[:200]}"
        )
    return token_ids, logprobs


def _field(server: PooledServer, record: Json, name: str, kind: type[T]) -> T:
    value = record.get(name)
    if not isinstance(value, kind):
        raise EngineError(f"{server.api.url}: its answer has {name} {str(value)[:200]}; is it an SGLang server?")
    return value
