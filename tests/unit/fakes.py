"""Hand-written stand-ins for the engine and the search engine."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from megatron_sdsearch.errors import RetrievalError
from megatron_sdsearch.records import Passage, TrajectoryId
from megatron_sdsearch.rollout.engine import Generation, GenerationRequest
from megatron_sdsearch.tokenization.renderer import Renderer

ABORT = "\0abort"
"""A scripted turn that the engine gives up on after no token at all."""


class ScriptedEngine:
    """Says what each trajectory's script says, turn by turn, cut to ``max_new_tokens``.

    Attributes:
        requests: every request, in order.
        released: every trajectory released, in order.
        num_closed: calls of ``close``.
    """

    def __init__(
        self,
        renderer: Renderer,
        script: Sequence[str],
        *,
        by_sibling: Mapping[int, Sequence[str]] | None = None,
        policy_version: int = 0,
        error: Exception | None = None,
    ) -> None:
        self._renderer = renderer
        self._script = script
        self._by_sibling = by_sibling or {}
        self._policy_version = policy_version
        self._error = error
        self._num_turns: dict[TrajectoryId, int] = {}
        self.requests: list[GenerationRequest] = []
        self.released: list[TrajectoryId] = []
        self.num_closed = 0

    async def generate(self, request: GenerationRequest) -> Generation:
        self.requests.append(request)
        await asyncio.sleep(0)
        script = self._by_sibling.get(request.trajectory_id.sibling, self._script)
        turn = self._num_turns.get(request.trajectory_id, 0)
        self._num_turns[request.trajectory_id] = turn + 1
        if self._error is not None and turn == len(script):
            raise self._error
        text = script[turn]
        if text == ABORT:
            return self._generation((), "abort")
        ids = self._renderer.encode_own(text)
        limit = request.params.max_new_tokens
        if len(ids) > limit:
            return self._generation(ids[:limit], "length")
        return self._generation(ids, "stop" if text.rstrip().endswith(request.params.stop) else "eos")

    def _generation(self, ids: tuple[int, ...], reason: str) -> Generation:
        return Generation(
            token_ids=ids,
            logprobs=tuple(-0.5 for _ in ids),
            finish_reason=reason,  # type: ignore[arg-type]
            policy_version=self._policy_version,
        )

    async def release(self, trajectory_id: TrajectoryId) -> None:
        self.released.append(trajectory_id)

    async def close(self) -> None:
        self.num_closed += 1


class DictRetriever:
    """Looks queries up; an unknown one matches nothing, and one whose value is None fails.

    Attributes:
        queries: every query, in order.
        num_closed: calls of ``close``.
    """

    fingerprint = "dict"

    def __init__(self, passages: Mapping[str, Sequence[Passage] | None] | None = None) -> None:
        self._passages = passages or {}
        self.queries: list[str] = []
        self.num_closed = 0

    async def search(self, query: str, *, top_k: int) -> Sequence[Passage]:
        self.queries.append(query)
        await asyncio.sleep(0)
        found = self._passages.get(query, ())
        if found is None:
            raise RetrievalError(f"no route to the engine for {query!r}")
        return found[:top_k]

    async def close(self) -> None:
        self.num_closed += 1
