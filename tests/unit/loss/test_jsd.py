"""The divergences on one rank: their definitions, their bounds and their gradients. Sharded: tests/distributed."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_sdsearch.loss import logprobs as logprobs_module
from megatron_sdsearch.loss.jsd import DivergenceName, Tail, vocab_parallel_jsd, vocab_parallel_topk_jsd
from megatron_sdsearch.loss.topk import TopKDistribution, teacher_topk
from megatron_sdsearch.parallel.vocab import VocabShard

VOCAB = 13
SHARD = VocabShard.whole(VOCAB)
DIVERGENCES: tuple[DivergenceName, ...] = ("jsd", "forward_kl", "reverse_kl", "mse")
TAILS: tuple[Tail, ...] = ("bucket", "renormalize", "drop")


def make_logits(seed: int, num_rows: int = 4, num_columns: int = VOCAB, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(num_rows, num_columns, generator=generator, dtype=torch.float64)


def full(student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
    return vocab_parallel_jsd(student, teacher, VocabShard.whole(student.shape[1]), **options)


def truncated(student: Tensor, teacher: Tensor, k: int, *, temperature: float = 1.0, **options: Any) -> Tensor:
    shard = VocabShard.whole(student.shape[1])
    topk = teacher_topk(teacher, shard, k, temperature=temperature)
    return vocab_parallel_topk_jsd(student, topk, shard, temperature=temperature, **options)


def by_definition(p: Tensor, q: Tensor, divergence: DivergenceName, beta: float = 0.5) -> Tensor:
    """The textbook form over probabilities that are all positive; they need not sum to 1."""
    m = beta * p + (1 - beta) * q
    values = {
        "jsd": beta * p * (p / m).log() + (1 - beta) * q * (q / m).log(),
        "forward_kl": p * (p / q).log(),
        "reverse_kl": q * (q / p).log(),
        "mse": (p - q) ** 2,
    }
    return values[divergence].sum(-1)


def truncated_probabilities(p: Tensor, q: Tensor, k: int, tail: Tail) -> tuple[Tensor, Tensor]:
    ids = p.argsort(dim=-1, descending=True)[:, :k]
    p, q = p.gather(1, ids), q.gather(1, ids)
    if tail == "renormalize":
        return p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    if tail == "bucket":
        return tuple(torch.cat([x, 1 - x.sum(-1, keepdim=True)], dim=1) for x in (p, q))  # type: ignore[return-value]
    return p, q


logit_values = st.floats(-30, 30, allow_subnormal=False)


@st.composite
def logit_pairs(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Student and teacher logits, of one row and 2 to 12 columns."""
    num_columns = draw(st.integers(2, 12))
    rows = st.lists(logit_values, min_size=num_columns, max_size=num_columns)
    student, teacher = (torch.tensor([draw(rows)], dtype=torch.float64) for _ in range(2))
    return student, teacher


@settings(deadline=None)
@given(logit_pairs())
def test_jsd_lies_between_zero_and_log_2(pair: tuple[Tensor, Tensor]) -> None:
    value = full(*pair).item()
    assert -1e-12 <= value <= math.log(2) + 1e-12


@settings(deadline=None)
@given(logit_pairs())
def test_jsd_with_equal_weights_is_symmetric(pair: tuple[Tensor, Tensor]) -> None:
    student, teacher = pair
    torch.testing.assert_close(full(student, teacher), full(teacher, student), rtol=1e-12, atol=1e-14)


@settings(deadline=None)
@given(logit_pairs(), st.sampled_from(DIVERGENCES), st.sampled_from(TAILS), st.data())
def test_no_distance_from_itself(
    pair: tuple[Tensor, Tensor], divergence: DivergenceName, tail: Tail, data: st.DataObject
) -> None:
    logits = pair[0].float().requires_grad_()
    k = data.draw(st.integers(1, logits.shape[1]))
    values = torch.cat(
        [
            full(logits, logits.detach(), divergence=divergence),
            truncated(logits, logits.detach(), k, divergence=divergence, tail=tail),
        ]
    )
    values.sum().backward()
    assert logits.grad is not None
    if tail != "renormalize":
        assert values.tolist() == [0.0, 0.0], "exactly, even in fp32"
    torch.testing.assert_close(values, torch.zeros(2), rtol=0, atol=2e-6)
    # With the tail dropped, either KL has a slope at p = q: there is mass to be had from, or lost to, the tail.
    if tail != "drop" or divergence in ("jsd", "mse"):
        torch.testing.assert_close(logits.grad, torch.zeros_like(logits), rtol=0, atol=2e-6)
    if tail != "renormalize" and divergence in ("jsd", "mse"):
        assert not logits.grad.any(), "exactly: nothing to learn is no step, not a small one"


@settings(deadline=None)
@given(logit_pairs(), st.floats(0.05, 0.95), st.data())
def test_a_bucket_is_a_lower_bound_and_dropping_a_lower_one(
    pair: tuple[Tensor, Tensor], beta: float, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, pair[0].shape[1]))
    drop, bucket = (truncated(*pair, k, beta=beta, tail=tail).item() for tail in ("drop", "bucket"))
    assert -1e-12 <= drop <= bucket + 1e-12
    assert bucket <= full(*pair, beta=beta).item() + 1e-12


@settings(deadline=None)
@given(logit_pairs(), st.sampled_from(("forward_kl", "reverse_kl")), st.data())
def test_a_bucket_is_a_lower_bound_of_either_kl(
    pair: tuple[Tensor, Tensor], divergence: DivergenceName, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, pair[0].shape[1]))
    bucket = truncated(*pair, k, divergence=divergence).item()
    assert -1e-12 <= bucket <= full(*pair, divergence=divergence).item() + 1e-12


@settings(deadline=None)
@given(logit_pairs(), st.sampled_from(TAILS), st.sampled_from(DIVERGENCES))
def test_the_whole_vocabulary_as_top_k_is_the_full_form(
    pair: tuple[Tensor, Tensor], tail: Tail, divergence: DivergenceName
) -> None:
    gradients, values = [], []
    for k in (None, pair[0].shape[1], pair[0].shape[1] + 5):
        student = pair[0].clone().requires_grad_()
        value = (
            full(student, pair[1], divergence=divergence)
            if k is None
            else truncated(student, pair[1], k, tail=tail, divergence=divergence)
        )
        value.sum().backward()
        values.append(value.detach())
        gradients.append(student.grad)
    for value, gradient in zip(values[1:], gradients[1:], strict=True):
        torch.testing.assert_close(value, values[0], rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_full_form_is_the_textbooks(divergence: DivergenceName, temperature: float) -> None:
    student, teacher = make_logits(1), make_logits(2)
    p, q = ((logits / temperature).softmax(-1) for logits in (teacher, student))
    for beta in (0.1, 0.5, 0.8):
        value = full(student, teacher, divergence=divergence, temperature=temperature, beta=beta)
        torch.testing.assert_close(value, by_definition(p, q, divergence, beta), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("k", [1, 4, VOCAB - 1])
def test_truncated_form_is_the_textbooks(divergence: DivergenceName, tail: Tail, k: int) -> None:
    student, teacher, temperature, beta = make_logits(1), make_logits(2), 1.5, 0.3
    p, q = ((logits / temperature).softmax(-1) for logits in (teacher, student))
    expected = by_definition(*truncated_probabilities(p, q, k, tail), divergence, beta)
    value = truncated(student, teacher, k, divergence=divergence, tail=tail, temperature=temperature, beta=beta)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradcheck_full(divergence: DivergenceName) -> None:
    student, teacher = make_logits(3, 2).requires_grad_(), make_logits(4, 2)
    options: dict[str, Any] = {"divergence": divergence, "beta": 0.3, "temperature": 0.7}
    assert torch.autograd.gradcheck(lambda logits: full(logits, teacher, **options), student)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("k", [1, 5, VOCAB])
def test_gradcheck_truncated(divergence: DivergenceName, tail: Tail, k: int) -> None:
    student, teacher = make_logits(3, 2).requires_grad_(), make_logits(4, 2)
    options: dict[str, Any] = {"divergence": divergence, "tail": tail, "beta": 0.3, "temperature": 0.7}
    assert torch.autograd.gradcheck(lambda logits: truncated(logits, teacher, k, **options), student)


def test_forward_kl_gradient_carries_the_teachers_mass_on_the_top_k() -> None:
    student, teacher, k = make_logits(5).requires_grad_(), make_logits(6), 3
    truncated(student, teacher, k, divergence="forward_kl", tail="drop").sum().backward()
    p, q = teacher.softmax(-1), student.detach().softmax(-1)
    on_top_k = p >= p.topk(k, dim=1).values[:, -1:]
    mass = (p * on_top_k).sum(-1, keepdim=True)
    assert float(mass.max()) < 0.99, "the mass has to matter for this test to mean something"
    torch.testing.assert_close(student.grad, mass * q - p * on_top_k)


@pytest.mark.parametrize("garbage", [1e6, math.inf, math.nan])
@pytest.mark.parametrize("k", [None, 4, VOCAB])
def test_padding_neither_counts_nor_gets_a_gradient(garbage: float, k: int | None) -> None:
    def run(student: Tensor, teacher: Tensor, shard: VocabShard) -> Tensor:
        if k is None:
            return vocab_parallel_jsd(student, teacher, shard)
        return vocab_parallel_topk_jsd(student, teacher_topk(teacher, shard, k), shard)

    padding = torch.full((4, 3), garbage, dtype=torch.float64)
    student, teacher = (torch.cat([make_logits(seed), padding], dim=1) for seed in (1, 2))
    student.requires_grad_()
    value = run(student, teacher, VocabShard.whole(VOCAB, VOCAB + 3))
    torch.testing.assert_close(value, run(make_logits(1), make_logits(2), SHARD))
    value.sum().backward()
    assert student.grad is not None
    assert torch.equal(student.grad[:, VOCAB:], torch.zeros_like(padding))
    assert bool((student.grad[:, :VOCAB] != 0).all())


@pytest.mark.parametrize("tail", [None, *TAILS])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_inputs_stay_as_they_were_and_the_teacher_gets_no_gradient(
    tail: Tail | None, divergence: DivergenceName
) -> None:
    student, teacher = make_logits(1).requires_grad_(), make_logits(2).requires_grad_()
    topk = teacher_topk(teacher, SHARD, 4)
    read = (student, teacher, topk.ids, topk.logprobs, topk.log_tail_mass)
    before = [tensor.detach().clone() for tensor in read]
    value = (
        full(student, teacher, divergence=divergence)
        if tail is None
        else vocab_parallel_topk_jsd(student, topk, SHARD, tail=tail, divergence=divergence)
    )
    value.sum().backward()
    assert all(torch.equal(tensor.detach(), copy) for tensor, copy in zip(read, before, strict=True))
    assert student.grad is not None
    assert teacher.grad is None


class CountingShard(VocabShard):
    """A whole vocabulary that notes every collective a second rank would take part in."""

    calls: list[tuple[int, ...]] = []  # noqa: RUF012 - one list for the one test that reads it

    def all_reduce(self, tensor: Tensor, op: Any) -> Tensor:
        self.calls.append(tuple(tensor.shape))
        return super().all_reduce(tensor, op)

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        self.calls.append(tuple(tensor.shape))
        return super().all_gather(tensor)


def test_communication_is_small_and_none_of_it_backward() -> None:
    shard, calls, (num_rows, k) = CountingShard.whole(VOCAB), CountingShard.calls, (4, 3)
    student, teacher = make_logits(1).requires_grad_(), make_logits(2)
    calls.clear()
    value = vocab_parallel_jsd(student, teacher, shard)
    assert calls == [(2, num_rows)] * 3
    topk = teacher_topk(teacher, shard, k)
    assert calls[3:] == [(num_rows, k), (num_rows, k), (num_rows,), (num_rows, k + 1)]
    value = value + vocab_parallel_topk_jsd(student, topk, shard)
    assert calls[7:] == [(num_rows,), (num_rows, k + 1)]
    value.sum().backward()
    assert len(calls) == 9
    assert student.grad is not None


def test_top_k_holds_the_most_probable_ids_and_the_rest_of_the_mass() -> None:
    teacher, temperature = make_logits(2), 0.7
    topk = teacher_topk(teacher, SHARD, 5, temperature=temperature)
    logprobs = (teacher / temperature).log_softmax(-1)
    assert torch.equal(topk.ids, logprobs.topk(5).indices)
    torch.testing.assert_close(topk.logprobs, logprobs.gather(1, topk.ids))
    torch.testing.assert_close(
        topk.logprobs.exp().sum(-1) + topk.log_tail_mass.exp(), torch.ones(4, dtype=torch.float64)
    )


def test_top_k_larger_than_the_vocabulary_is_cut_and_has_no_tail() -> None:
    topk = teacher_topk(make_logits(2), SHARD, 99)
    assert topk.ids.shape == topk.logprobs.shape == (4, VOCAB)
    assert topk.log_tail_mass.tolist() == [-math.inf] * 4


@settings(deadline=None)
@given(st.lists(st.integers(-1, 1), min_size=2, max_size=40), st.data())
def test_of_equal_logits_the_lower_id_is_taken(values: list[int], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(values)))
    ids = teacher_topk(torch.tensor([values]).float(), VocabShard.whole(len(values)), k).ids
    assert ids[0].tolist() == sorted(range(len(values)), key=lambda index: (-values[index], index))[:k]


def test_a_tiny_tail_keeps_its_digits() -> None:
    student = torch.tensor([[200.0, 0.0, 1.0, 2.0]], requires_grad=True)
    topk = teacher_topk(student.detach(), VocabShard.whole(4), 1)
    expected = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64).logsumexp(0).item() - 200
    assert topk.log_tail_mass.item() == pytest.approx(expected, rel=1e-7), "exp(-197) is 0 in fp32"
    assert vocab_parallel_topk_jsd(student, topk, VocabShard.whole(4), divergence="forward_kl").item() == 0


@pytest.mark.parametrize("tail", [None, *TAILS])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_far_apart_distributions_stay_finite_in_fp32(tail: Tail | None, divergence: DivergenceName) -> None:
    student = torch.tensor([[1e4, -1e4, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0, 0.0], [1e4, 0.0, 0.0, -1e4]])
    value = (
        full(student, teacher, divergence=divergence)
        if tail is None
        else truncated(student, teacher, 2, tail=tail, divergence=divergence)
    )
    value.sum().backward()
    assert bool(value.isfinite().all())
    assert student.grad is not None
    assert bool(student.grad.isfinite().all())
    if divergence == "jsd":
        assert value[0].item() == pytest.approx(math.log(2) if tail != "drop" else math.log(2) / 2)


@pytest.mark.parametrize(("k", "tail"), [(None, None), *itertools.product((2, 4), TAILS)])
def test_tokens_forbidden_to_both_count_for_nothing(k: int | None, tail: Tail | None) -> None:
    forbidden = torch.full((1, 2), -math.inf)
    student = torch.cat([torch.tensor([[1.0, 2.0]]), forbidden], dim=1).requires_grad_()
    teacher = torch.cat([torch.tensor([[2.0, 0.0]]), forbidden], dim=1)
    value = full(student, teacher) if k is None else truncated(student, teacher, k, tail=tail)
    value.sum().backward()
    expected = full(student.detach()[:, :2], teacher[:, :2])
    torch.testing.assert_close(value.detach(), expected)
    assert student.grad is not None
    assert bool(student.grad.isfinite().all())
    assert student.grad[0, 2:].tolist() == [0, 0]


@pytest.mark.parametrize("k", [None, 2])
@pytest.mark.parametrize("broken", ["student", "teacher"])
def test_a_nan_is_passed_on_rather_than_hidden(k: int | None, broken: str) -> None:
    logits = {"student": make_logits(1), "teacher": make_logits(2)}
    logits[broken][1, 7] = math.nan
    student, teacher = logits["student"], logits["teacher"]
    value = full(student, teacher) if k is None else truncated(student, teacher, k)
    assert value.isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize("tail", [None, *TAILS])
def test_no_rows_give_no_values_and_a_gradient_of_their_shape(tail: Tail | None) -> None:
    student = torch.empty(0, VOCAB, requires_grad=True)
    value = full(student, student) if tail is None else truncated(student, student.detach(), 3, tail=tail)
    assert value.shape == (0,)
    value.sum().backward()
    assert student.grad is not None
    assert student.grad.shape == (0, VOCAB)


@pytest.mark.parametrize("tail", [None, *TAILS])
def test_bf16_logits_are_computed_in_fp32_and_get_a_bf16_gradient(tail: Tail | None) -> None:
    student, teacher = make_logits(1).bfloat16().requires_grad_(), make_logits(2).bfloat16()

    def run(student: Tensor, teacher: Tensor) -> Tensor:
        return full(student, teacher) if tail is None else truncated(student, teacher, 4, tail=tail)

    value = run(student, teacher)
    value.sum().backward()
    assert value.dtype == torch.float32
    assert student.grad is not None
    assert student.grad.dtype == torch.bfloat16
    torch.testing.assert_close(
        value.detach().double(), run(student.detach().double(), teacher.double()), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("tail", [None, *TAILS])
def test_blocks_of_rows_change_nothing(tail: Tail | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> tuple[Tensor, Tensor | None]:
        student, teacher = make_logits(1, 7).requires_grad_(), make_logits(2, 7)
        value = full(student, teacher) if tail is None else truncated(student, teacher, 4, tail=tail)
        (value * torch.arange(1, 8)).sum().backward()
        return value.detach(), student.grad

    at_once = run()
    monkeypatch.setattr(logprobs_module, "_BLOCK_ELEMENTS", 2 * VOCAB + 1)
    in_blocks = run()
    assert torch.equal(in_blocks[0], at_once[0])
    torch.testing.assert_close(in_blocks[1], at_once[1], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, r"beta must lie inside \(0, 1\), got 0.0"),
        ({"beta": 1.0}, "beta must lie inside"),
        ({"beta": math.nan}, "beta must lie inside"),
        ({"divergence": "kl"}, "divergence must be one of jsd, forward_kl, reverse_kl, mse, got 'kl'"),
        ({"temperature": 0.0}, "temperature must be finite and above 0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    student, teacher = make_logits(1), make_logits(2)
    topk = teacher_topk(teacher, SHARD, 3)
    with pytest.raises(ValueError, match=message):
        vocab_parallel_jsd(student, teacher, SHARD, **options)
    with pytest.raises(ValueError, match=message):
        vocab_parallel_topk_jsd(student, topk, SHARD, **options)


def test_top_k_options_out_of_range_are_refused() -> None:
    student, topk = make_logits(1), teacher_topk(make_logits(2), SHARD, 3)
    with pytest.raises(ValueError, match="tail must be one of bucket, renormalize, drop, got 'union'"):
        vocab_parallel_topk_jsd(student, topk, SHARD, tail="union")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        teacher_topk(student, SHARD, 0)
    with pytest.raises(ValueError, match="temperature"):
        teacher_topk(student, SHARD, 3, temperature=-1.0)


def test_shapes_that_do_not_fit_are_refused() -> None:
    student, topk = make_logits(1), teacher_topk(make_logits(2), SHARD, 3)
    with pytest.raises(ValueError, match=r"student_logits must be \[rows, 13\]"):
        vocab_parallel_jsd(student[:, :5], student, SHARD)
    with pytest.raises(ValueError, match=r"teacher_logits must be \[rows, 13\]"):
        vocab_parallel_jsd(student, student[:, :5], SHARD)
    with pytest.raises(ValueError, match="teacher_logits has 3 rows, student_logits 4"):
        vocab_parallel_jsd(student, student[:3], SHARD)
    with pytest.raises(ValueError, match=r"topk\.ids has 4 rows, student_logits 2"):
        vocab_parallel_topk_jsd(student[:2], topk, SHARD)
    short = TopKDistribution(ids=topk.ids, logprobs=topk.logprobs[:, :2], log_tail_mass=topk.log_tail_mass)
    with pytest.raises(ValueError, match="do not fit together"):
        vocab_parallel_topk_jsd(student, short, SHARD)
    int32 = TopKDistribution(ids=topk.ids.int(), logprobs=topk.logprobs, log_tail_mass=topk.log_tail_mass)
    with pytest.raises(ValueError, match=r"topk\.ids must be int64"):
        vocab_parallel_topk_jsd(student, int32, SHARD)
