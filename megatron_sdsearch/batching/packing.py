"""Which sample is learned from where: minibatches, data-parallel ranks, microbatches.

Owns the plan and the loss weights, both fixed from global counts before any forward pass. Every rank computes the
whole plan from the same list of samples, so ranks agree on the number of microbatches and, under pipeline parallelism,
on their lengths without a word between them. Leaves the arrays of one microbatch to ``microbatches.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from megatron_sdsearch.batching.microbatches import (
    PackedSequence,
    assemble,
    hindsight_sequences,
    padded_length,
    student_sequence,
)
from megatron_sdsearch.config import ObjectiveConfig
from megatron_sdsearch.records import Microbatch, Minibatch, TrainBatch, TrainingSample


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
    """What bounds a microbatch: see ``pack``."""

    num_ranks: int
    max_tokens: int
    alignment: int
    equal_lengths: bool


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Row:
    """One sample as both models read it; the teacher once for each of its prompts."""

    student: PackedSequence
    teacher: Sequence[PackedSequence]

    @property
    def num_teacher_tokens(self) -> int:
        return sum(map(len, self.teacher))

    @property
    def num_tokens(self) -> int:
        return len(self.student) + self.num_teacher_tokens


_Bin = list[_Row]


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
    teacher prompt or without query token takes part in the policy loss alone; one without advantage and teacher (a
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
    shape = _Shape(num_ranks=num_ranks, max_tokens=max_tokens, alignment=alignment, equal_lengths=equal_lengths)
    parts = _parts(samples, num_minibatches)
    return TrainBatch(minibatches=tuple(_minibatch(part, shape, rank, objective) for part in parts))


def _parts(samples: Sequence[TrainingSample], num_parts: int) -> list[Sequence[TrainingSample]]:
    """The larger parts come first."""
    size, num_larger = divmod(len(samples), num_parts)
    bounds = accumulate((size + (index < num_larger) for index in range(num_parts)), initial=0)
    return [samples[start:end] for start, end in pairwise(bounds)]


def _minibatch(samples: Sequence[TrainingSample], shape: _Shape, rank: int, objective: ObjectiveConfig) -> Minibatch:
    rows = _rows(samples, objective)
    plan = _plan(rows, shape)
    students = [[[row.student for row in part] for part in parts] for parts in plan]
    teachers = [[[one for row in part for one in row.teacher] for part in parts] for parts in plan]
    has_teacher = any(row.teacher for row in rows)
    return Minibatch(
        student=_microbatches(students, shape, rank),
        teacher=_microbatches(teachers, shape, rank) if has_teacher else (),
        num_trajectories=len(samples),
        num_policy_tokens=sum(int(row.student.loss_mask.sum()) for row in rows),
        num_distill_tokens=sum(int(row.student.query_mask.sum()) for row in rows),
    )


def _rows(samples: Sequence[TrainingSample], objective: ObjectiveConfig) -> list[_Row]:
    policy_counts = [int(sample.loss_mask.sum()) for sample in samples]
    distill_counts = [int(sample.query_mask.sum()) if sample.teacher_prompts else 0 for sample in samples]
    policy = _weights(policy_counts, objective.loss_aggregation)
    distill = _weights(distill_counts, objective.distill_aggregation)
    return [
        _Row(
            student=student_sequence(
                sample, is_distilled=distill_counts[i] > 0, policy_weight=policy[i], distill_weight=distill[i]
            ),
            teacher=hindsight_sequences(sample) if distill_counts[i] else (),
        )
        for i, sample in enumerate(samples)
    ]


def _weights(counts: Sequence[int], aggregation: str) -> list[float]:
    """Weight of one token of each sample: equal tokens (``token``), or equal samples.

    All tokens together weigh 1. Over ``all_trajectories`` they weigh what share of the samples has any: the others
    count as samples whose loss is 0.
    """
    if aggregation == "token":
        return [1.0 / max(1, sum(counts))] * len(counts)
    num_samples = len(counts) if aggregation == "all_trajectories" else sum(count > 0 for count in counts)
    return [1.0 / (num_samples * count) if count else 0.0 for count in counts]


def _plan(rows: Sequence[_Row], shape: _Shape) -> list[list[_Bin]]:
    """[rank][microbatch]: the same number of microbatches on all ranks, empty ones where a rank has no more work."""
    plan = [_bins(share, shape) for share in _deal(rows, shape.num_ranks)]
    num_microbatches = max(len(bins) for bins in plan)
    return [bins + [[] for _ in range(num_microbatches - len(bins))] for bins in plan]


def _deal(rows: Sequence[_Row], num_ranks: int) -> list[list[_Row]]:
    """Longest first to the lightest rank, ties by index; within a rank the samples keep their order."""
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for i in sorted(range(len(rows)), key=lambda i: -rows[i].num_tokens):
        lightest = loads.index(min(loads))
        shares[lightest].append(i)
        loads[lightest] += rows[i].num_tokens
    return [[rows[i] for i in sorted(share)] for share in shares]


def _bins(rows: Sequence[_Row], shape: _Shape) -> list[_Bin]:
    """First fit, longest first: within 11/9 of the fewest bins, and the same on every run."""
    # Rounding the budget down leaves room for the padding that the alignment asks for.
    budget = shape.max_tokens // shape.alignment * shape.alignment
    bins: list[_Bin] = []
    for row in sorted(rows, key=lambda row: -row.num_tokens):
        home = next((part for part in bins if _fits([*part, row], budget)), None)
        if home is None:
            bins.append([row])
        else:
            home.append(row)
    return bins


def _fits(rows: Sequence[_Row], budget: int) -> bool:
    student = sum(len(row.student) for row in rows)
    return student <= budget and sum(row.num_teacher_tokens for row in rows) <= budget


def _microbatches(
    plan: Sequence[Sequence[Sequence[PackedSequence]]], shape: _Shape, rank: int
) -> tuple[Microbatch, ...]:
    """This rank's microbatches of students or of teachers; ``plan`` is [rank][microbatch][sequence]."""
    lengths = [[padded_length(sum(map(len, part)), shape.alignment) for part in parts] for parts in plan]
    longest = max((len(sequence) for parts in plan for part in parts for sequence in part), default=0)
    common = max((length for row in lengths for length in row), default=0)
    return tuple(
        assemble(
            part,
            length=common if shape.equal_lengths else length,
            max_padding_seqlen=max(longest, shape.alignment),
        )
        for part, length in zip(plan[rank], lengths[rank], strict=True)
    )
