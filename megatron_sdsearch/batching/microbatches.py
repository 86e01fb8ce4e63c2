"""One packed microbatch: sequences end to end in one row, with their boundaries, masks, weights and padding.

Which sequences share a microbatch is decided in ``packing.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_sdsearch.batching.samples import unlearned_sample
from megatron_sdsearch.records import GROUP_CLASSES, TrainingSample


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Microbatch:
    """Packed sequences of one forward pass: everything [T] is one row, sequences end to end, label-aligned.

    The tail up to a multiple of the sequence-parallel size is a sequence of its own whose masks are False.

    Attributes:
        token_ids: [T].
        labels: [T].
        position_ids: [T], restarting at 0 in each sequence.
        cu_seqlens: [num_sequences + 1] int32 boundaries, from 0 to T.
        max_seqlen: length of the longest sequence.
        loss_mask: [T] True at policy tokens.
        distill_mask: [T] True at tokens to distil; a subset of the policy tokens in a student's microbatch.
        rollout_logprobs: [T] nats.
        advantages: [T].
        policy_weights: [T] weight of each policy token in the loss; sums to 1 over the GLOBAL minibatch.
        distill_weights: [T] weight of each distilled token; sums to 1 over the GLOBAL minibatch, to the share of its
            trajectories that have a teacher, or to 0.
        group_classes: [T] index into ``records.GROUP_CLASSES`` of the sequence's group; for metrics alone.
    """

    token_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    loss_mask: Tensor
    distill_mask: Tensor
    rollout_logprobs: Tensor
    advantages: Tensor
    policy_weights: Tensor
    distill_weights: Tensor
    group_classes: Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> Microbatch:
        """The same microbatch on ``device``; floating point fields become ``dtype``."""
        moved: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, value in moved.items():
            if isinstance(value, Tensor):
                moved[name] = value.to(device, dtype if value.is_floating_point() else value.dtype)
        return Microbatch(**moved)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Minibatch:
    """One optimizer update, this data-parallel rank's part of it.

    ``teacher[i]`` holds the teacher's sequences for ``student[i]``: its ``distill_mask`` marks the same response tokens
    in the same order, so row r of one is row r of the other. Both lists have the same length on every rank.

    Attributes:
        student: policy microbatches.
        teacher: teacher microbatches; empty when no sample of the GLOBAL minibatch distils anything.
        num_trajectories: in the global minibatch.
        num_policy_tokens: in the global minibatch.
        num_distill_tokens: in the global minibatch.
    """

    student: Sequence[Microbatch]
    teacher: Sequence[Microbatch]
    num_trajectories: int
    num_policy_tokens: int
    num_distill_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainBatch:
    """One step's minibatches, in the order in which they are learned from."""

    minibatches: Sequence[Minibatch]

    @property
    def num_policy_tokens(self) -> int:
        """Policy tokens of the step, over all ranks."""
        return sum(m.num_policy_tokens for m in self.minibatches)


def assemble(sequences: Sequence[TrainingSample], *, length: int, max_padding_seqlen: int) -> Microbatch:
    """Lay sequences end to end and fill up to ``length`` with padding sequences whose masks are all False.

    Args:
        sequences: in the order of their rows; none gives a microbatch of padding alone.
        length: T, at least the sum of lengths.
        max_padding_seqlen: longest padding sequence. Attention costs the square of a sequence's length, so padding to
            a common length must not make the longest sequence of the run out of nothing.
    """
    num_full, remainder = divmod(length - sum(map(len, sequences)), max_padding_seqlen)
    rows = list(sequences)
    for size in [max_padding_seqlen] * num_full + [remainder] * (remainder > 0):
        zeros = np.zeros(size, dtype=np.int64)
        rows.append(unlearned_sample("padding", zeros, zeros, zeros.astype(np.bool_)))
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    return Microbatch(
        token_ids=_join(row.token_ids for row in rows),
        labels=_join(row.labels for row in rows),
        position_ids=_join(np.arange(size, dtype=np.int64) for size in lengths),
        cu_seqlens=torch.from_numpy(np.append(0, np.cumsum(lengths)).astype(np.int32)),
        max_seqlen=int(lengths.max()),
        loss_mask=_join(row.loss_mask for row in rows),
        distill_mask=_join(row.distill_mask for row in rows),
        rollout_logprobs=_join(row.rollout_logprobs for row in rows),
        advantages=torch.from_numpy(np.repeat([row.advantage for row in rows], lengths)),
        policy_weights=_join(row.loss_mask * row.policy_weight for row in rows),
        distill_weights=_join(row.distill_mask * row.distill_weight for row in rows),
        group_classes=torch.from_numpy(np.repeat([GROUP_CLASSES.index(row.group_class) for row in rows], lengths)),
    )


def _join(arrays: Iterable[NDArray[Any]]) -> Tensor:
    return torch.from_numpy(np.concatenate(list(arrays)))
