"""Whose top-k: the sets of ids, and the divergence seen through them. Sharded: tests/distributed."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_sdsearch.loss.jsd import DivergenceName, Tail, vocab_parallel_jsd, vocab_parallel_topk_jsd
from megatron_sdsearch.loss.topk import TopKOf, chosen_topk, teacher_topk
from megatron_sdsearch.parallel.vocab import VocabShard

VOCAB = 13
SHARD = VocabShard.whole(VOCAB)
TAILS: tuple[Tail, ...] = ("bucket", "renormalize", "drop")
OTHERS: tuple[TopKOf, ...] = ("student", "union")
DIVERGENCES: tuple[DivergenceName, ...] = ("jsd", "forward_kl", "reverse_kl", "mse")


def make_logits(seed: int, num_rows: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(num_rows, VOCAB, generator=generator, dtype=torch.float64)


def seen_through(student: Tensor, teacher: Tensor, k: int, of: TopKOf, **options: Any) -> Tensor:
    shard = VocabShard.whole(student.shape[1])
    topk = chosen_topk(student, teacher, shard, k, of=of)
    return vocab_parallel_topk_jsd(student, topk, shard, **options)


@st.composite
def pairs_and_k(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    """Student and teacher logits of one row with 2 to 12 columns, ties among them, and a k."""
    num_columns = draw(st.integers(2, 12))
    row = st.lists(st.sampled_from([-4.0, -1.5, 0.0, 0.5, 3.0]), min_size=num_columns, max_size=num_columns)
    student, teacher = (torch.tensor([draw(row)], dtype=torch.float64) for _ in range(2))
    return student, teacher, draw(st.integers(1, num_columns))


@given(pairs_and_k())
def test_a_union_holds_the_ids_of_both_once(case: tuple[Tensor, Tensor, int]) -> None:
    student, teacher, k = case
    shard = VocabShard.whole(student.shape[1])
    topk = chosen_topk(student, teacher, shard, k, of="union")
    ids = [i for i in topk.ids[0].tolist() if i >= 0]
    tops = [set(teacher_topk(logits, shard, k).ids[0].tolist()) for logits in (student, teacher)]
    assert topk.ids.shape == (1, 2 * k)
    assert len(ids) == len(set(ids))
    assert set(ids) == tops[0] | tops[1]
    assert topk.logprobs[topk.ids < 0].tolist() == [-math.inf] * (2 * k - len(ids))
    mass = topk.logprobs.exp().sum() + topk.log_tail_mass.exp().sum()
    assert float(mass) == pytest.approx(1)


@given(pairs_and_k())
def test_more_entries_see_more_and_never_more_than_there_is(case: tuple[Tensor, Tensor, int]) -> None:
    student, teacher, k = case
    whole = vocab_parallel_jsd(student, teacher, VocabShard.whole(student.shape[1])).item()
    union = seen_through(student, teacher, k, "union").item()
    for of in ("teacher", "student"):
        assert seen_through(student, teacher, k, of).item() <= union + 1e-12
    assert union <= whole + 1e-12


def test_the_teacher_s_own_is_teacher_topk_to_the_last_bit() -> None:
    student, teacher = make_logits(1), make_logits(2)
    chosen, plain = chosen_topk(student, teacher, SHARD, 4, of="teacher"), teacher_topk(teacher, SHARD, 4)
    for name in ("ids", "logprobs", "log_tail_mass"):
        assert torch.equal(getattr(chosen, name), getattr(plain, name))


def test_the_student_s_ids_carry_the_teacher_s_probabilities() -> None:
    student, teacher = make_logits(1), make_logits(2)
    topk = chosen_topk(student, teacher, SHARD, 3, of="student")
    assert torch.equal(topk.ids, student.topk(3).indices)
    torch.testing.assert_close(topk.logprobs, teacher.log_softmax(-1).gather(1, topk.ids))


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_union_of_equal_sets_is_the_set(tail: Tail, divergence: DivergenceName) -> None:
    student = make_logits(1).requires_grad_()
    teacher = 1.3 * student.detach()  # another distribution in the same order
    gradients = []
    for of in ("teacher", "union"):
        value = seen_through(student, teacher, 4, of, tail=tail, divergence=divergence)
        gradients.append((value.detach(), *torch.autograd.grad(value.sum(), student)))
    for union, alone in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(union, alone, rtol=1e-12, atol=1e-15)
    assert float(gradients[0][1].abs().max()) > 1e-3


@pytest.mark.parametrize("of", OTHERS)
@pytest.mark.parametrize("tail", TAILS)
def test_as_many_ids_as_there_are_is_the_full_form(of: TopKOf, tail: Tail) -> None:
    student, teacher = make_logits(1), make_logits(2)
    torch.testing.assert_close(
        seen_through(student, teacher, VOCAB + 5, of, tail=tail), vocab_parallel_jsd(student, teacher, SHARD)
    )


@pytest.mark.parametrize("of", OTHERS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("k", [2, 5])
def test_gradcheck(of: TopKOf, divergence: DivergenceName, tail: Tail, k: int) -> None:
    student, teacher = make_logits(3, 2).requires_grad_(), make_logits(4, 2)
    assert torch.autograd.gradcheck(
        lambda logits: seen_through(logits, teacher, k, of, tail=tail, divergence=divergence, beta=0.3), student
    )


@pytest.mark.parametrize("of", OTHERS)
def test_padding_is_never_chosen_and_the_teacher_gets_no_gradient(of: TopKOf) -> None:
    padding = torch.full((4, 3), 1e6, dtype=torch.float64)
    student, teacher = (torch.cat([make_logits(seed), padding], dim=1).requires_grad_() for seed in (1, 2))
    shard = VocabShard.whole(VOCAB, VOCAB + 3)
    topk = chosen_topk(student, teacher, shard, 4, of=of)
    value = vocab_parallel_topk_jsd(student, topk, shard)
    torch.testing.assert_close(value, seen_through(make_logits(1), make_logits(2), 4, of))
    value.sum().backward()
    assert int(topk.ids.max()) < VOCAB
    assert teacher.grad is None
    assert student.grad is not None
    assert torch.equal(student.grad[:, VOCAB:], torch.zeros_like(padding))


@pytest.mark.parametrize("of", OTHERS)
@pytest.mark.parametrize("broken", ["student", "teacher"])
def test_a_nan_is_passed_on_rather_than_hidden(of: TopKOf, broken: str) -> None:
    logits = {"student": make_logits(1), "teacher": make_logits(2)}
    logits[broken][1, 7] = math.nan
    assert seen_through(logits["student"], logits["teacher"], 3, of).isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize("of", OTHERS)
def test_no_rows_give_no_ids(of: TopKOf) -> None:
    empty = torch.empty(0, VOCAB, requires_grad=True)
    value = seen_through(empty, empty.detach(), 3, of)
    assert value.shape == (0,)
    value.sum().backward()
    assert empty.grad is not None


def test_options_out_of_range_are_refused() -> None:
    student, teacher = make_logits(1), make_logits(2)
    with pytest.raises(ValueError, match="of must be one of teacher, student, union, got 'both'"):
        chosen_topk(student, teacher, SHARD, 3, of="both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        chosen_topk(student, teacher, SHARD, 0, of="union")
    with pytest.raises(ValueError, match="teacher_logits has 3 rows, student_logits 4"):
        chosen_topk(student, teacher[:3], SHARD, 3, of="union")
    with pytest.raises(ValueError, match=r"student_logits must be \[rows, 13\]"):
        chosen_topk(student[:, :5], teacher, SHARD, 3, of="union")
