"""The protocol of every rollout engine: token ids in, token ids out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from megatron_sdsearch.records import TrajectoryId


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to sample.

    Attributes:
        temperature: 0 is greedy.
        top_p: nucleus mass in (0, 1].
        max_new_tokens: upper bound for this call.
        stop: strings at whose end sampling stops; the ids that cover one are kept.
    """

    temperature: float
    top_p: float
    max_new_tokens: int
    stop: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """Continue one trajectory.

    Attributes:
        trajectory_id: of the trajectory to continue; turns of one trajectory share a prefix, which an engine may cache.
        seed: with ``trajectory_id`` the key of the random stream; the number drawn for the token at absolute
            position p (0 = first prompt token) depends on (seed, trajectory_id, p) alone.
        prompt_ids: everything so far: prompt, sampled tokens, observations.
        params: how to sample.
    """

    trajectory_id: TrajectoryId
    seed: int
    prompt_ids: tuple[int, ...]
    params: SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What was sampled.

    Attributes:
        token_ids: new ids, the end-of-sequence id or the tokens that cover a stop string included.
        logprobs: of each id at the sampling temperature, before top-p, nats (temperature 0: at temperature 1).
        finish_reason: ``stop`` (a stop string), ``eos``, ``length`` or ``abort``.
        policy_version: of the weights that sampled it.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: Literal["stop", "eos", "length", "abort"]
    policy_version: int


class Engine(Protocol):
    """Samples continuations. Calls of many trajectories run at the same time on one event loop."""

    async def generate(self, request: GenerationRequest) -> Generation:
        """Sample one continuation.

        Raises:
            EngineError: an id is outside the vocabulary, the request does not fit the context, or the engine died.
        """
        ...

    async def release(self, trajectory_id: TrajectoryId) -> None:
        """Forget what is cached for a trajectory that is over."""
        ...

    async def close(self) -> None:
        """Release memory, processes and connections. Called once."""
        ...
