"""Packing: every token once, weights that sum to 1, aligned teachers, equal numbers of microbatches."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_sdsearch.batching.packing import Microbatch, Minibatch, TrainBatch, pack
from megatron_sdsearch.batching.samples import teacher_sequences
from megatron_sdsearch.config import ObjectiveConfig
from megatron_sdsearch.errors import AlignmentError
from megatron_sdsearch.records import TeacherPrompt, TrainingSample

BUDGET = 24
unhurried = settings(deadline=None, max_examples=60)  # a busy machine is no failure


def make_sample(
    index: int,
    *,
    prompt: int = 2,
    response: int = 4,
    sampled: Sequence[int] | None = None,
    query: Sequence[int] = (),
    teacher_prompt: int = 0,
    advantage: float = 1.0,
) -> TrainingSample:
    """Sampled and query positions count response tokens; ids name sample and position, so they are unique."""
    length = prompt + response
    token_ids = 1000 * (index + 1) + np.arange(length, dtype=np.int64)
    sampled = range(response) if sampled is None else sampled
    loss_mask, distill_mask = np.zeros(length, dtype=np.bool_), np.zeros(length, dtype=np.bool_)
    loss_mask[[prompt + j - 1 for j in sampled]] = True
    distill_mask[[prompt + j - 1 for j in query]] = True
    labels = np.append(token_ids[1:], 0)
    teacher_ids = tuple(500_000 + 1000 * index + i for i in range(teacher_prompt))
    return TrainingSample(
        sample_id=f"sample {index}",
        token_ids=token_ids,
        labels=labels,
        loss_mask=loss_mask,
        distill_mask=distill_mask,
        rollout_logprobs=np.where(loss_mask, -labels / 1000.0, 0.0),
        advantage=advantage,
        prompt_length=prompt,
        teacher_prompts=(TeacherPrompt(token_ids=teacher_ids, start=0, end=length),) if teacher_ids else (),
    )


def run(
    samples: Sequence[TrainingSample], *, num_ranks: int = 1, objective: ObjectiveConfig | None = None, **changes: Any
) -> list[TrainBatch]:
    options: dict[str, Any] = {
        "num_minibatches": 1,
        "max_tokens": BUDGET,
        "alignment": 1,
        "equal_lengths": False,
        **changes,
    }
    return [
        pack(samples, num_ranks=num_ranks, rank=rank, objective=objective or ObjectiveConfig(), **options)
        for rank in range(num_ranks)
    ]


def whole(batches: Sequence[TrainBatch], minibatch: int = 0) -> list[Minibatch]:
    return [batch.minibatches[minibatch] for batch in batches]


def microbatches(parts: Sequence[Minibatch]) -> list[Microbatch]:
    return [microbatch for part in parts for microbatch in part.student]


def sequences(microbatch: Microbatch) -> list[Tensor]:
    return list(microbatch.token_ids.tensor_split(microbatch.cu_seqlens[1:-1].tolist()))


def is_padding(token_ids: Tensor) -> bool:
    return not token_ids.any()  # real ids are never 0


@st.composite
def sample_lists(draw: st.DrawFn) -> list[TrainingSample]:
    result = []
    for index in range(draw(st.integers(1, 9))):
        response = draw(st.integers(1, 14))
        sampled = draw(st.sets(st.integers(0, response - 1), min_size=1))
        query = draw(st.sets(st.sampled_from(sorted(sampled))))
        result.append(
            make_sample(
                index,
                prompt=draw(st.integers(1, 5)),
                response=response,
                sampled=sorted(sampled),
                query=sorted(query),
                teacher_prompt=draw(st.integers(0, 9)),
                advantage=draw(st.floats(-2, 2)),
            )
        )
    return result


layouts = given(
    samples=sample_lists(),
    num_ranks=st.integers(1, 4),
    num_minibatches=st.sampled_from([1, 2, 3, 10]),
    alignment=st.sampled_from([1, 2, 4]),
    equal_lengths=st.booleans(),
)


@unhurried
@layouts
def test_every_token_exactly_once(
    samples: list[TrainingSample], num_ranks: int, num_minibatches: int, alignment: int, equal_lengths: bool
) -> None:
    batches = run(
        samples,
        num_ranks=num_ranks,
        num_minibatches=num_minibatches,
        alignment=alignment,
        equal_lengths=equal_lengths,
    )
    packed = Counter(
        tuple(ids.tolist())
        for batch in batches
        for minibatch in batch.minibatches
        for microbatch in minibatch.student
        for ids in sequences(microbatch)
        if not is_padding(ids)
    )
    assert packed == Counter(tuple(sample.token_ids.tolist()) for sample in samples)


@unhurried
@layouts
def test_arrays_are_carried_over_position_by_position(
    samples: list[TrainingSample], num_ranks: int, num_minibatches: int, alignment: int, equal_lengths: bool
) -> None:
    by_first_id = {int(sample.token_ids[0]): sample for sample in samples}
    batches = run(
        samples,
        num_ranks=num_ranks,
        num_minibatches=num_minibatches,
        alignment=alignment,
        equal_lengths=equal_lengths,
    )
    for microbatch in (m for batch in batches for mini in batch.minibatches for m in mini.student):
        for start, end in zip(microbatch.cu_seqlens, microbatch.cu_seqlens[1:], strict=False):
            assert microbatch.position_ids[start:end].tolist() == list(range(end - start))
            sample = by_first_id.get(int(microbatch.token_ids[start]))
            if sample is None:
                assert not microbatch.loss_mask[start:end].any()
                assert not microbatch.distill_mask[start:end].any()
                continue
            assert microbatch.labels[start:end].tolist() == sample.labels.tolist()
            assert microbatch.loss_mask[start:end].tolist() == sample.loss_mask.tolist()
            assert microbatch.rollout_logprobs[start:end].tolist() == sample.rollout_logprobs.tolist()
            assert set(microbatch.advantages[start:end].tolist()) == {sample.advantage}
            distils = bool(sample.teacher_prompts)
            assert microbatch.distill_mask[start:end].tolist() == (sample.distill_mask & distils).tolist()


@unhurried
@layouts
def test_shapes_budgets_and_counts(
    samples: list[TrainingSample], num_ranks: int, num_minibatches: int, alignment: int, equal_lengths: bool
) -> None:
    batches = run(
        samples,
        num_ranks=num_ranks,
        num_minibatches=num_minibatches,
        alignment=alignment,
        equal_lengths=equal_lengths,
    )
    assert len({len(batch.minibatches) for batch in batches}) == 1
    for i in range(len(batches[0].minibatches)):
        parts = whole(batches, i)
        assert len({len(part.student) for part in parts}) == 1
        assert bool(parts[0].student) == (parts[0].num_policy_tokens > 0)
        assert all(len(part.teacher) in (0, len(part.student)) for part in parts)
        assert len({(p.num_policy_tokens, len(p.teacher)) for p in parts}) == 1
        for role in ("student", "teacher"):
            lengths = set()
            for microbatch in (m for part in parts for m in getattr(part, role)):
                lengths.add(check_shape(microbatch, alignment))
            assert not equal_lengths or len(lengths) <= 1


def check_shape(microbatch: Microbatch, alignment: int) -> int:
    names = {field.name for field in dataclasses.fields(microbatch)} - {"cu_seqlens", "max_seqlen"}
    length = len(microbatch.token_ids)
    assert all(getattr(microbatch, name).shape == (length,) for name in names)
    assert length % alignment == 0
    assert length > 0
    assert microbatch.cu_seqlens[0] == 0
    assert microbatch.cu_seqlens[-1] == length
    lengths = microbatch.cu_seqlens.diff()
    assert (lengths > 0).all()
    assert microbatch.max_seqlen == lengths.max()
    real = [len(ids) for ids in sequences(microbatch) if not is_padding(ids)]
    assert sum(real) <= BUDGET or len(real) == 1
    for name in ("token_ids", "labels", "position_ids", "group_classes"):
        assert getattr(microbatch, name).dtype == torch.int64
    for name in ("rollout_logprobs", "advantages", "policy_weights", "distill_weights"):
        assert getattr(microbatch, name).dtype == torch.float64
    assert microbatch.cu_seqlens.dtype == torch.int32
    assert microbatch.loss_mask.dtype == microbatch.distill_mask.dtype == torch.bool
    return length


def test_a_microbatch_moves_whole_and_its_floats_take_the_type_asked_for() -> None:
    (batch,) = run([make_sample(0, query=[1], teacher_prompt=3)])
    host = batch.minibatches[0].student[0]
    moved = host.to(torch.device("cpu"), torch.float32)
    for field in dataclasses.fields(host):
        before, after = getattr(host, field.name), getattr(moved, field.name)
        if isinstance(before, int):
            assert after == before
        else:
            assert after.dtype == (torch.float32 if before.dtype == torch.float64 else before.dtype), field.name
            torch.testing.assert_close(after, before, check_dtype=False)


@unhurried
@layouts
@pytest.mark.parametrize(
    "aggregation", [("token", "trajectory"), ("sequence", "token"), ("sequence", "all_trajectories")]
)
def test_weights_sum_to_one_over_all_ranks_or_to_the_share_that_distils(
    aggregation: tuple[str, str],
    samples: list[TrainingSample],
    num_ranks: int,
    num_minibatches: int,
    alignment: int,
    equal_lengths: bool,
) -> None:
    batches = run(
        samples,
        num_ranks=num_ranks,
        num_minibatches=num_minibatches,
        alignment=alignment,
        equal_lengths=equal_lengths,
        objective=ObjectiveConfig.model_validate(
            {"loss_aggregation": aggregation[0], "distill_aggregation": aggregation[1]}
        ),
    )
    for i in range(len(batches[0].minibatches)):
        parts = whole(batches, i)
        if not parts[0].num_policy_tokens:
            continue
        students = microbatches(parts)
        assert sum(m.policy_weights.sum() for m in students) == pytest.approx(1.0, abs=1e-12)
        assert sum(int(m.loss_mask.sum()) for m in students) == parts[0].num_policy_tokens
        distills = any(m.distill_mask.any() for m in students)
        share = float(distills)
        if aggregation[1] == "all_trajectories":
            bounds = [(m, start, end) for m in students for start, end in pairwise(m.cu_seqlens.tolist())]
            num_trajectories = sum(bool(m.loss_mask[start:end].any()) for m, start, end in bounds)
            share = sum(bool(m.distill_mask[start:end].any()) for m, start, end in bounds) / num_trajectories
        assert sum(m.distill_weights.sum() for m in students) == pytest.approx(share, abs=1e-12)
        assert bool(parts[0].teacher) == distills
        for m in students:
            assert ((m.policy_weights > 0) == m.loss_mask).all()
            assert ((m.distill_weights > 0) == m.distill_mask).all()


@unhurried
@layouts
def test_teacher_rows_are_the_student_s_rows(
    samples: list[TrainingSample], num_ranks: int, num_minibatches: int, alignment: int, equal_lengths: bool
) -> None:
    assume(any(sample.teacher_prompts and sample.distill_mask.any() for sample in samples))
    batches = run(
        samples,
        num_ranks=num_ranks,
        num_minibatches=num_minibatches,
        alignment=alignment,
        equal_lengths=equal_lengths,
    )
    teachers = Counter[tuple[int, ...]]()
    for minibatch in (mini for batch in batches for mini in batch.minibatches if mini.teacher):
        for student, teacher in zip(minibatch.student, minibatch.teacher, strict=True):
            assert student.labels[student.distill_mask].tolist() == teacher.labels[teacher.distill_mask].tolist()
            assert not teacher.loss_mask.any()
            assert not teacher.policy_weights.any()
            teachers.update(tuple(ids.tolist()) for ids in sequences(teacher) if not is_padding(ids))
    expected = [s for s in samples if s.teacher_prompts and s.distill_mask.any()]
    assert teachers == Counter(tuple(t.token_ids.tolist()) for s in expected for t in teacher_sequences(s))


def test_token_weights_by_hand() -> None:
    samples = [make_sample(0, response=1), make_sample(1, response=3)]
    (batch,) = run(samples)
    (student,) = batch.minibatches[0].student
    assert sorted(student.policy_weights[student.loss_mask].tolist()) == [0.25] * 4


def test_sequence_weights_by_hand() -> None:
    samples = [make_sample(0, response=1), make_sample(1, response=5)]
    (batch,) = run(samples, objective=ObjectiveConfig(loss_aggregation="sequence"))
    (student,) = batch.minibatches[0].student
    assert sorted(student.policy_weights[student.loss_mask].tolist()) == [0.1] * 5 + [0.5]


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("all_trajectories", [1 / 12] * 3 + [0.25]),
        ("trajectory", [1 / 6] * 3 + [0.5]),
        ("token", [0.25] * 4),
    ],
)
def test_distillation_weights_by_hand(aggregation: str, expected: list[float]) -> None:
    samples = [
        make_sample(0, query=[1], teacher_prompt=3),
        make_sample(1, query=[0, 1, 2], teacher_prompt=3),
        make_sample(2, query=[0, 1]),  # no teacher prompt
        make_sample(3, teacher_prompt=3),  # no query token
    ]
    objective = ObjectiveConfig.model_validate({"distill_aggregation": aggregation})
    (batch,) = run(samples, objective=objective, max_tokens=100)
    (student,) = batch.minibatches[0].student
    assert sorted(student.distill_weights[student.distill_mask].tolist()) == pytest.approx(expected)
    assert student.distill_mask.sum() == 4


def test_weights_are_those_of_the_own_minibatch() -> None:
    samples = [make_sample(0, response=2), make_sample(1, response=2), make_sample(2, response=4)]
    (batch,) = run(samples, num_minibatches=2)
    assert [len(indices) for indices in contents(batch)] == [2, 1], "the larger part first"
    assert [m.num_policy_tokens for m in batch.minibatches] == [4, 4]
    assert batch.num_policy_tokens == 8
    assert [sequences(m.student[0])[0][0] // 1000 for m in batch.minibatches] == [1, 3], "consecutive samples"


def contents(batch: TrainBatch) -> list[list[int]]:
    """Indices of the samples of each minibatch, in their order."""
    return [
        sorted(int(ids[0]) // 1000 - 1 for m in minibatch.student for ids in sequences(m) if not is_padding(ids))
        for minibatch in batch.minibatches
    ]


@pytest.mark.parametrize(
    ("num_samples", "num_minibatches", "sizes"),
    [
        (1280, 5, [256] * 5),
        (1025, 5, [205] * 5),  # a fifth was lost to failed searches
        (10, 3, [4, 3, 3]),
        (7, 4, [2, 2, 2, 1]),
        (2, 5, [1, 1, 0, 0, 0]),
        (0, 2, [0, 0]),
    ],
)
def test_a_step_makes_the_planned_number_of_nearly_equal_minibatches(
    num_samples: int, num_minibatches: int, sizes: list[int]
) -> None:
    samples = [make_sample(i, prompt=1, response=1) for i in range(num_samples)]
    by_rank = run(samples, num_ranks=2, num_minibatches=num_minibatches, max_tokens=10_000)
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    learned = [sorted(a + b) for a, b in zip(*map(contents, by_rank), strict=True)]
    assert learned == [list(range(end - size, end)) for end, size in zip(ends, sizes, strict=True)], "in their order"
    idle = [m for batch in by_rank for m in batch.minibatches if not m.num_policy_tokens]
    assert all(len(m.student) == len(m.teacher) == 0 for m in idle)
    assert len(idle) == 2 * sizes.count(0)


def test_the_last_searcher_of_a_minibatch_does_not_carry_the_whole_alpha() -> None:
    samples = [make_sample(i, query=[1] if i == 5 else [], teacher_prompt=3) for i in range(8)]
    for num_minibatches, share in ((1, 1 / 8), (2, 1 / 4)):
        batches = run(samples, num_ranks=2, num_minibatches=num_minibatches)
        weights = [m.distill_weights.sum() for part in whole(batches, num_minibatches - 1) for m in part.student]
        assert sum(weights) == pytest.approx(share), "one of all trajectories of its minibatch, at any split"


def test_the_longest_goes_first_to_the_lightest_rank() -> None:
    samples = [make_sample(i, prompt=1, response=r) for i, r in enumerate([4, 9, 5, 8])]
    batches = run(samples, num_ranks=2, max_tokens=100)
    ranks = [
        {int(ids[0]) // 1000 - 1 for m in batch.minibatches[0].student for ids in sequences(m)} for batch in batches
    ]
    assert ranks == [{0, 1}, {2, 3}]


def test_a_rank_without_work_gets_padding_so_that_all_ranks_step_together() -> None:
    batches = run([make_sample(0, query=[1], teacher_prompt=2)], num_ranks=2, alignment=2)
    busy, idle = whole(batches)
    assert len(busy.student) == len(idle.student) == len(idle.teacher) == 1
    for dummy in (idle.student[0], idle.teacher[0]):
        assert dummy.token_ids.tolist() == [0, 0]
        assert dummy.cu_seqlens.tolist() == [0, 2]
        assert not dummy.loss_mask.any() | dummy.distill_mask.any()
    assert idle.num_policy_tokens == busy.num_policy_tokens == 4


def test_a_microbatch_that_distils_nothing_has_a_dummy_teacher_when_another_distils() -> None:
    samples = [make_sample(0, response=20, query=[0], teacher_prompt=2), make_sample(1, response=20)]
    (batch,) = run(samples)
    minibatch = batch.minibatches[0]
    assert len(minibatch.student) == len(minibatch.teacher) == 2
    assert sorted(int(m.distill_mask.sum()) for m in minibatch.teacher) == [0, 1]


def test_nothing_to_distil_has_no_teacher_and_zero_weights() -> None:
    samples = [make_sample(0, query=[1]), make_sample(1, teacher_prompt=3)]
    (batch,) = run(samples)
    (minibatch,) = batch.minibatches
    assert minibatch.teacher == ()
    assert not any(m.distill_mask.any() or m.distill_weights.any() for m in minibatch.student)


def test_teachers_have_a_budget_of_their_own() -> None:
    # Three students fit one microbatch of 24; their teachers of 2 + 9 tokens do not.
    samples = [make_sample(i, response=4, query=[3], teacher_prompt=8) for i in range(3)]
    (batch,) = run(samples)
    lengths = sorted(len(m.token_ids) for m in batch.minibatches[0].teacher)
    assert lengths == [11, 22]


@pytest.mark.parametrize("alignment", [1, 4])
def test_a_sequence_above_the_budget_has_its_own_microbatch(alignment: int) -> None:
    samples = [make_sample(0, response=3), make_sample(1, response=40, query=[39], teacher_prompt=30)]
    (batch,) = run(samples, alignment=alignment)
    student_sizes = [[len(ids) for ids in sequences(m) if not is_padding(ids)] for m in batch.minibatches[0].student]
    assert sorted(student_sizes) == [[5], [42]]


@given(sample_lists(), st.sampled_from([2, 4]))
@unhurried
def test_alignment_padding_stays_within_the_budget(samples: list[TrainingSample], alignment: int) -> None:
    (batch,) = run(samples, alignment=alignment, max_tokens=23)
    for minibatch in batch.minibatches:
        assert all(len(m.token_ids) <= 23 for m in minibatch.student)


def test_padding_to_a_common_length_never_makes_a_longer_sequence_than_the_samples_do() -> None:
    samples = [make_sample(i, prompt=1, response=7) for i in range(3)] + [make_sample(3, prompt=1, response=1)]
    (batch,) = run(samples, equal_lengths=True, alignment=2)
    students = batch.minibatches[0].student
    assert [len(m.token_ids) for m in students] == [24, 24]
    assert max(m.max_seqlen for m in students) == 8
    assert [is_padding(ids) for ids in sequences(students[1])] == [False, True, True, True]


def test_packing_is_a_pure_function() -> None:
    samples = [make_sample(i, response=1 + i % 5, query=[0], teacher_prompt=2) for i in range(9)]
    first, second = run(samples, num_ranks=2), run(samples, num_ranks=2)
    for one, other in zip(microbatches(whole(first)), microbatches(whole(second)), strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()


def test_demonstrations_pack_like_any_sample() -> None:
    samples = [make_sample(i, response=3, advantage=0.0) for i in range(2)]
    (batch,) = run(samples)
    (student,) = batch.minibatches[0].student
    assert student.policy_weights.sum() == pytest.approx(1.0, abs=1e-12)
    assert not student.advantages.any()
    assert batch.minibatches[0].teacher == ()


def test_a_misaligned_teacher_raises_on_every_rank() -> None:
    good = make_sample(0, query=[1], teacher_prompt=2)
    spoilt = dataclasses.replace(good, labels=good.labels + 1)
    for rank in range(2):
        with pytest.raises(AlignmentError, match="sample 0"):
            pack(
                [spoilt],
                num_ranks=2,
                rank=rank,
                num_minibatches=1,
                max_tokens=BUDGET,
                alignment=1,
                equal_lengths=False,
                objective=ObjectiveConfig(),
            )


def test_a_rank_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="rank 1"):
        pack(
            [make_sample(0)],
            num_ranks=1,
            rank=1,
            num_minibatches=1,
            max_tokens=BUDGET,
            alignment=1,
            equal_lengths=False,
            objective=ObjectiveConfig(),
        )
