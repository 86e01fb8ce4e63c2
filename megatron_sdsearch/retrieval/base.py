"""The protocol of every search engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from megatron_sdsearch.records import Passage


class Retriever(Protocol):
    """Answers queries. Safe to call from many coroutines of one event loop."""

    @property
    def fingerprint(self) -> str:
        """Names the engine and the exact index behind it; equal fingerprints give equal results."""
        ...

    async def search(self, query: str, *, top_k: int) -> Sequence[Passage]:
        """Return at most ``top_k`` passages, best first; empty when nothing matches.

        Raises:
            RetrievalError: the engine failed. Never returned as an empty result.
        """
        ...

    async def close(self) -> None:
        """Close connections and files. Called once."""
        ...
