"""Assigns samples to minibatches, data-parallel ranks and microbatches, and packs each microbatch into one row.

Plan and loss weights follow from global counts before any forward pass. Every rank computes the whole plan from the
same list of samples, so ranks agree on the number of microbatches, and under pipeline parallelism on their lengths,
without communication.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_sdsearch.batching.samples import teacher_sequences, unlearned_sample
from megatron_sdsearch.config import ObjectiveConfig
from megatron_sdsearch.records import GROUP_CLASSES, TrainingSample


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Microbatch:
    """Packed sequences of one forward pass: each [T] tensor is one label-aligned row, sequences end to end.

    Padding up to a multiple of the sequence-parallel size is a sequence of its own, with masks of False.

    Attributes:
        token_ids: [T].
        labels: [T].
        position_ids: [T], restarting at 0 in each sequence.
        cu_seqlens: [num_sequences + 1] int32 boundaries, from 0 to T.
        max_seqlen: length of the longest sequence.
        loss_mask: [T] True at policy tokens.
        distill_mask: [T] True at distilled tokens; a subset of the policy tokens in a student's microbatch.
        rollout_logprobs: [T] nats.
        advantages: [T].
        policy_weights: [T] weight of each policy token in the loss; sums to 1 over the GLOBAL minibatch.
        distill_weights: [T] weight of each distilled token; sums over the GLOBAL minibatch to 1, to the share of its
            trajectories that are distilled (``objective.distill_aggregation``), or to 0.
        group_classes: [T] index into ``records.GROUP_CLASSES`` of the sequence's group; for metrics only.
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
        """Copy the microbatch to ``device``; floating point fields become ``dtype``."""
        moved: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, value in moved.items():
            if isinstance(value, Tensor):
                moved[name] = value.to(device, dtype if value.is_floating_point() else value.dtype)
        return Microbatch(**moved)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Minibatch:
    """This data-parallel rank's part of one optimizer update.

    ``teacher[i]`` holds the teacher's sequences for ``student[i]``. Its ``distill_mask`` marks the same response tokens
    in the same order, so the r-th distilled row of one belongs to the r-th of the other. Both lists have the same
    length on every rank.

    Attributes:
        student: policy microbatches.
        teacher: teacher microbatches; empty when no sample of the GLOBAL minibatch distils anything.
        num_policy_tokens: in the global minibatch.
    """

    student: Sequence[Microbatch]
    teacher: Sequence[Microbatch]
    num_policy_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainBatch:
    """One step's minibatches, in training order."""

    minibatches: Sequence[Minibatch]

    @property
    def num_policy_tokens(self) -> int:
        """Number of policy tokens of the step, over all ranks."""
        return sum(m.num_policy_tokens for m in self.minibatches)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Row:
    """One sample: the student's sequence, and one teacher sequence for each of its teacher prompts."""

    student: TrainingSample
    teacher: Sequence[TrainingSample]

    @property
    def num_teacher_tokens(self) -> int:
        return sum(map(len, self.teacher))

    @property
    def num_tokens(self) -> int:
        return len(self.student) + self.num_teacher_tokens


def pack(
    samples: Sequence[TrainingSample],
    *,
    num_ranks: int,
    rank: int,
    num_minibatches: int,
    max_tokens: int,
    alignment: int,
    equal_lengths: bool,
    objective: ObjectiveConfig,
) -> TrainBatch:
    """Split a step's samples into minibatches and pack this data-parallel rank's part of each.

    A pure function: called with the same samples on every rank, it returns parts that fit together. A sample without a
    teacher prompt or without distilled tokens enters the policy loss only. Demonstrations, which have neither advantage
    nor teacher, are packed by the same function.

    Args:
        samples: all samples of the step, the same list on all ranks.
        num_ranks: number of data-parallel ranks.
        rank: this data-parallel rank, in [0, num_ranks).
        num_minibatches: planned updates of the step. Each gets consecutive samples, and their sizes differ by at most
            one. With fewer samples the last minibatches are empty, because the schedule counts every update.
        max_tokens: maximum tokens of one microbatch, padding to ``alignment`` included, for student and teacher each.
            A single longer sample gets a microbatch of its own; a sample with a teacher prompt for each search holds
            several teacher sequences.
        alignment: divisor of every microbatch's T (the sequence-parallel size).
        equal_lengths: use one T for all students of a minibatch on all ranks, and one for all teachers.
        objective: settings of the weights of tokens.

    Raises:
        AlignmentError: see ``samples.teacher_sequences``; raised on every rank alike.
        ValueError: ``rank`` is not in [0, num_ranks).
    """
    if not 0 <= rank < num_ranks:
        raise ValueError(f"rank {rank} is not in [0, {num_ranks})")
    # Rounding the budget down leaves room for the padding to ``alignment``.
    budget = max_tokens // alignment * alignment
    size, num_larger = divmod(len(samples), num_minibatches)  # the larger minibatches come first
    bounds = accumulate((size + (index < num_larger) for index in range(num_minibatches)), initial=0)
    minibatches = []
    for start, end in pairwise(bounds):
        rows = _rows(samples[start:end], objective)
        plan = _plan(rows, num_ranks, budget)
        students = [[[row.student for row in part] for part in bins] for bins in plan]
        teachers = [[[sequence for row in part for sequence in row.teacher] for part in bins] for bins in plan]
        has_teacher = any(row.teacher for row in rows)
        minibatches.append(
            Minibatch(
                student=_microbatches(students, rank, alignment, equal_lengths),
                teacher=_microbatches(teachers, rank, alignment, equal_lengths) if has_teacher else (),
                num_policy_tokens=sum(int(row.student.loss_mask.sum()) for row in rows),
            )
        )
    return TrainBatch(minibatches=tuple(minibatches))


def _rows(samples: Sequence[TrainingSample], objective: ObjectiveConfig) -> list[_Row]:
    policy_counts = [int(sample.loss_mask.sum()) for sample in samples]
    distill_counts = [int(sample.distill_mask.sum()) if sample.teacher_prompts else 0 for sample in samples]
    policy = _weights(policy_counts, objective.loss_aggregation)
    distill = _weights(distill_counts, objective.distill_aggregation)
    rows = []
    for sample, count, policy_weight, distill_weight in zip(samples, distill_counts, policy, distill, strict=True):
        student = replace(
            sample,
            distill_mask=sample.distill_mask if count else np.zeros_like(sample.distill_mask),
            policy_weight=policy_weight,
            distill_weight=distill_weight,
        )
        rows.append(_Row(student=student, teacher=teacher_sequences(sample) if count else ()))
    return rows


def _weights(counts: Sequence[int], aggregation: str) -> list[float]:
    """Compute the weight of one token of each sample: equal for all tokens (``token``), or equal samples.

    All tokens together weigh 1. With ``all_trajectories`` a sample without tokens counts as one with a loss of 0, so
    they weigh the share of samples that have tokens.
    """
    if aggregation == "token":
        return [1.0 / max(1, sum(counts))] * len(counts)
    num_samples = len(counts) if aggregation == "all_trajectories" else sum(count > 0 for count in counts)
    return [1.0 / (num_samples * count) if count else 0.0 for count in counts]


def _plan(rows: Sequence[_Row], num_ranks: int, budget: int) -> list[list[list[_Row]]]:
    """Assign samples to [rank][microbatch]; all ranks get the same number of microbatches, if need be empty ones.

    Samples go longest first to the rank with the fewest tokens, ties by index; within a rank they keep their order.
    """
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for i in sorted(range(len(rows)), key=lambda i: -rows[i].num_tokens):
        lightest = loads.index(min(loads))
        shares[lightest].append(i)
        loads[lightest] += rows[i].num_tokens
    plan = [_bins([rows[i] for i in sorted(share)], budget) for share in shares]
    num_microbatches = max(map(len, plan))
    return [bins + [[] for _ in range(num_microbatches - len(bins))] for bins in plan]


def _bins(rows: Sequence[_Row], budget: int) -> list[list[_Row]]:
    """Bin by first fit, longest first: at most about 11/9 of the minimum number of bins, and deterministic."""
    bins: list[list[_Row]] = []
    for row in sorted(rows, key=lambda row: -row.num_tokens):
        for part in bins:
            student = sum(len(other.student) for other in part) + len(row.student)
            teacher = sum(other.num_teacher_tokens for other in part) + row.num_teacher_tokens
            if student <= budget and teacher <= budget:
                part.append(row)
                break
        else:
            bins.append([row])
    return bins


def _microbatches(
    plan: Sequence[Sequence[Sequence[TrainingSample]]], rank: int, alignment: int, equal_lengths: bool
) -> tuple[Microbatch, ...]:
    """Pack this rank's microbatches of students or of teachers; ``plan`` is [rank][microbatch][sequence]."""
    # The smallest positive multiple of the alignment that holds all sequences.
    lengths = [[max(1, -(-sum(map(len, part)) // alignment)) * alignment for part in parts] for parts in plan]
    longest = max((len(sequence) for parts in plan for part in parts for sequence in part), default=0)
    common = max((length for row in lengths for length in row), default=0) if equal_lengths else None
    return tuple(
        _assemble(part, length=common or length, max_padding_seqlen=max(longest, alignment))
        for part, length in zip(plan[rank], lengths[rank], strict=True)
    )


def _assemble(sequences: Sequence[TrainingSample], *, length: int, max_padding_seqlen: int) -> Microbatch:
    """Join sequences end to end and fill up to ``length`` with padding sequences, their masks all False.

    Args:
        sequences: in the order of their rows; with none, the microbatch is all padding.
        length: T, at least the sum of lengths.
        max_padding_seqlen: length of the longest padding sequence. The cost of attention is quadratic, so padding must
            not become the longest sequence of the microbatch.
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
