"""One packed microbatch: sequences end to end in one row, with their boundaries, masks, weights and padding.

Which sequences go together is decided in ``packing.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_sdsearch.batching.samples import teacher_sequences
from megatron_sdsearch.records import (
    GROUP_CLASSES,
    BoolArray,
    FloatArray,
    GroupClass,
    IntArray,
    Microbatch,
    TrainingSample,
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedSequence:
    """One sequence of a microbatch, label-aligned.

    Attributes:
        token_ids: [L].
        labels: [L].
        loss_mask: [L].
        query_mask: [L].
        rollout_logprobs: [L].
        advantage: at every position.
        policy_weight: at every policy token.
        distill_weight: at every distilled token.
        group_class: of the whole sequence.
    """

    token_ids: IntArray
    labels: IntArray
    loss_mask: BoolArray
    query_mask: BoolArray
    rollout_logprobs: FloatArray
    advantage: float = 0.0
    policy_weight: float = 0.0
    distill_weight: float = 0.0
    group_class: GroupClass = "mixed"

    def __len__(self) -> int:
        return len(self.token_ids)


def student_sequence(
    sample: TrainingSample, *, is_distilled: bool, policy_weight: float, distill_weight: float
) -> PackedSequence:
    """The policy's view of a sample; undistilled, its query mask is cleared, for its rows have no teacher."""
    return PackedSequence(
        token_ids=sample.token_ids,
        labels=sample.labels,
        loss_mask=sample.loss_mask,
        query_mask=sample.query_mask if is_distilled else np.zeros_like(sample.query_mask),
        rollout_logprobs=sample.rollout_logprobs,
        advantage=sample.advantage,
        policy_weight=policy_weight,
        distill_weight=distill_weight,
        group_class=sample.group_class,
    )


def hindsight_sequences(sample: TrainingSample) -> list[PackedSequence]:
    """The teacher's view of a sample: query rows only, in the student's order, nothing that could enter another loss.

    Raises:
        AlignmentError: see ``samples.teacher_sequences``.
    """
    pairs = teacher_sequences(sample)
    # The label of a last position is a last query token, which the teacher's input no longer holds.
    ends = np.cumsum([mask.sum() for _, mask in pairs])
    last_labels = sample.labels[sample.query_mask][ends - 1]
    return [
        PackedSequence(
            token_ids=token_ids,
            labels=np.append(token_ids[1:], last_label),
            loss_mask=np.zeros_like(query_mask),
            query_mask=query_mask,
            rollout_logprobs=np.zeros(len(token_ids)),
        )
        for (token_ids, query_mask), last_label in zip(pairs, last_labels, strict=True)
    ]


def padded_length(num_tokens: int, alignment: int) -> int:
    """The least positive multiple of ``alignment`` that holds ``num_tokens``."""
    return max(1, -(-num_tokens // alignment)) * alignment


def assemble(sequences: Sequence[PackedSequence], *, length: int, max_padding_seqlen: int) -> Microbatch:
    """Lay sequences end to end and fill up to ``length`` with padding sequences whose masks are all False.

    Args:
        sequences: in the order of their rows; none gives a microbatch of padding alone.
        length: T, at least the sum of lengths.
        max_padding_seqlen: longest padding sequence. Attention costs the square of a sequence's length, so padding to
            a common length must not make the longest sequence of the run out of nothing.
    """
    missing = length - sum(len(sequence) for sequence in sequences)
    sizes = [max_padding_seqlen] * (missing // max_padding_seqlen)
    sizes += [missing % max_padding_seqlen] * (missing % max_padding_seqlen > 0)
    rows = [*sequences, *(_padding(size) for size in sizes)]
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    return Microbatch(
        token_ids=np.concatenate([row.token_ids for row in rows]),
        labels=np.concatenate([row.labels for row in rows]),
        position_ids=np.concatenate([np.arange(size, dtype=np.int64) for size in lengths]),
        cu_seqlens=np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)]),
        loss_mask=np.concatenate([row.loss_mask for row in rows]),
        query_mask=np.concatenate([row.query_mask for row in rows]),
        rollout_logprobs=np.concatenate([row.rollout_logprobs for row in rows]),
        advantages=np.repeat([row.advantage for row in rows], lengths),
        policy_weights=np.concatenate([row.loss_mask * row.policy_weight for row in rows]),
        distill_weights=np.concatenate([row.query_mask * row.distill_weight for row in rows]),
        group_classes=np.repeat([GROUP_CLASSES.index(row.group_class) for row in rows], lengths),
    )


def _padding(size: int) -> PackedSequence:
    return PackedSequence(
        token_ids=np.zeros(size, dtype=np.int64),
        labels=np.zeros(size, dtype=np.int64),
        loss_mask=np.zeros(size, dtype=np.bool_),
        query_mask=np.zeros(size, dtype=np.bool_),
        rollout_logprobs=np.zeros(size),
    )
