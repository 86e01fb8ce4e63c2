"""Assigns samples to minibatches, data-parallel ranks and microbatches, and packs each microbatch into one row.

Owns the plan, the loss weights, both fixed from global counts before any forward pass, and the tensors of a microbatch.
Every rank computes the whole plan from the same list of samples, so ranks agree on the number of microbatches and,
under pipeline parallelism, on their lengths without communication.
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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Row:
    """One sample as both models read it; the teacher once for each of its prompts."""

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

    A pure function: called with the same samples on every rank, it gives parts that fit together. A sample without
    teacher prompt or without token to distil takes part in the policy loss alone; one without advantage and teacher (a
    demonstration) still counts its tokens, so supervised training packs with the same function.

    Args:
        samples: of the whole step, the same list on all ranks.
        num_ranks: data-parallel ranks.
        rank: this one, in [0, num_ranks).
        num_minibatches: planned updates of the step, each of consecutive samples, their numbers equal or one apart.
            With fewer samples than that the last minibatches are empty: the schedule counts on every one.
        max_tokens: bound on the tokens of one microbatch, padding to ``alignment`` included, for student and teacher
            each. A single longer sample still gets a microbatch, of its own; of a teacher with a prompt for each
            search a sample holds several sequences.
        alignment: every microbatch's T is a multiple of it (the sequence-parallel size).
        equal_lengths: give all microbatches of a minibatch one T on all ranks, students and teachers each their own.
        objective: how tokens are weighed against each other.

    Raises:
        AlignmentError: see ``samples.teacher_sequences``; on every rank alike.
        ValueError: ``rank`` is not one of the ranks.
    """
    if not 0 <= rank < num_ranks:
        raise ValueError(f"rank {rank} is not in [0, {num_ranks})")
    # Rounding the budget down leaves room for the padding that the alignment asks for.
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
                num_trajectories=len(rows),
                num_policy_tokens=sum(int(row.student.loss_mask.sum()) for row in rows),
                num_distill_tokens=sum(int(row.student.distill_mask.sum()) for row in rows),
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
    """Weight of one token of each sample: equal tokens (``token``), or equal samples.

    All tokens together weigh 1. Over ``all_trajectories`` they weigh what share of the samples has any: the others
    count as samples whose loss is 0.
    """
    if aggregation == "token":
        return [1.0 / max(1, sum(counts))] * len(counts)
    num_samples = len(counts) if aggregation == "all_trajectories" else sum(count > 0 for count in counts)
    return [1.0 / (num_samples * count) if count else 0.0 for count in counts]


def _plan(rows: Sequence[_Row], num_ranks: int, budget: int) -> list[list[list[_Row]]]:
    """[rank][microbatch]: the same number of microbatches on all ranks, empty ones where a rank has no more work.

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
    """First fit, longest first: within 11/9 of the fewest bins, and the same on every run."""
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
    """This rank's microbatches of students or of teachers; ``plan`` is [rank][microbatch][sequence]."""
    # The least positive multiple of the alignment that holds all sequences.
    lengths = [[max(1, -(-sum(map(len, part)) // alignment)) * alignment for part in parts] for parts in plan]
    longest = max((len(sequence) for parts in plan for part in parts for sequence in part), default=0)
    common = max((length for row in lengths for length in row), default=0) if equal_lengths else None
    return tuple(
        _assemble(part, length=common or length, max_padding_seqlen=max(longest, alignment))
        for part, length in zip(plan[rank], lengths[rank], strict=True)
    )


def _assemble(sequences: Sequence[TrainingSample], *, length: int, max_padding_seqlen: int) -> Microbatch:
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
