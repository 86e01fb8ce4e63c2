"""The protocol of rollout engines: token ids in, token ids out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from megatron_sdsearch.records import TrajectoryId


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one request.

    Attributes:
        temperature: 0 is greedy.
        top_p: nucleus mass in (0, 1].
        max_new_tokens: limit of this request.
        stop: strings that end sampling; the ids that cover one are kept.
    """

    temperature: float
    top_p: float
    max_new_tokens: int
    stop: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """A request to continue one trajectory.

    Attributes:
        trajectory_id: of the trajectory; its turns share a prefix, which an engine may cache.
        seed: with ``trajectory_id`` the key of the random stream: the number drawn for the token at absolute position p
            (0 = first prompt token) depends only on (seed, trajectory_id, p).
        prompt_ids: all ids so far: prompt, sampled tokens, observations.
        params: of sampling.
    """

    trajectory_id: TrajectoryId
    seed: int
    prompt_ids: tuple[int, ...]
    params: SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """A sampled continuation.

    Attributes:
        token_ids: new ids, including the end-of-sequence id or the tokens that cover a stop string.
        logprobs: of each id at the sampling temperature, before top-p, nats (temperature 0: at temperature 1).
        finish_reason: ``stop`` (a stop string), ``eos``, ``length`` or ``abort``.
        policy_version: of the weights it was sampled from.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: Literal["stop", "eos", "length", "abort"]
    policy_version: int


class Engine(Protocol):
    """Samples continuations; calls of many trajectories run concurrently on one event loop."""

    async def generate(self, request: GenerationRequest) -> Generation:
        """Sample one continuation.

        Raises:
            EngineError: an id is outside the vocabulary, the request exceeds the context, or the engine failed.
        """
        ...

    async def release(self, trajectory_id: TrajectoryId) -> None:
        """Free the cache of a finished trajectory."""
        ...

    async def close(self) -> None:
        """Release memory, processes and connections. Called once."""
        ...
