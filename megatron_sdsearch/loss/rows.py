"""Logits of selected rows of a packed microbatch, computed one chunk at a time, and their log-probabilities."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_sdsearch.batching.packing import Microbatch
from megatron_sdsearch.loss.logprobs import vocab_parallel_logprobs
from megatron_sdsearch.parallel.vocab import VocabShard


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowLogits:
    """Logits on demand, for selected rows only and at most ``chunk_rows`` rows at a time.

    Attributes:
        hidden: [T, h] final hidden states.
        project: the LM head, [n, h] -> [n, V/tp].
        shard: the vocabulary columns of this rank.
        chunk_rows: maximum number of rows with logits in memory at once.
        temperature: the sampling temperature, at which all log-probabilities are computed.
    """

    hidden: Tensor
    project: Callable[[Tensor], Tensor]
    shard: VocabShard
    chunk_rows: int
    temperature: float

    def map(self, rows: Tensor, read: Callable[[Tensor, int, int], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Apply ``read(logits, start, end)`` to chunks of ``rows`` [N] and concatenate its results.

        With more than one chunk, the backward pass recomputes the logits of each instead of keeping them.
        """

        def run(hidden: Tensor, start: int, end: int) -> tuple[Tensor, ...]:
            return read(self.project(hidden[rows[start:end]]), start, end)

        bounds = [(s, min(s + self.chunk_rows, len(rows))) for s in range(0, max(len(rows), 1), self.chunk_rows)]
        if len(bounds) == 1 or not torch.is_grad_enabled():
            parts = [run(self.hidden, *bound) for bound in bounds]
        else:
            parts = [checkpoint(run, self.hidden, *bound, use_reentrant=False) for bound in bounds]
        return tuple(torch.cat(columns) for columns in zip(*parts, strict=True))

    def logprobs(self, batch: Microbatch) -> Tensor:
        """Compute the log-probabilities [N] (nats) of the microbatch's policy tokens, with gradient."""
        rows = batch.loss_mask.nonzero()[:, 0]
        labels = batch.labels[rows]

        def read(part: Tensor, start: int, end: int) -> tuple[Tensor, ...]:
            return (vocab_parallel_logprobs(part, labels[start:end], self.shard, temperature=self.temperature),)

        return self.map(rows, read)[0]
