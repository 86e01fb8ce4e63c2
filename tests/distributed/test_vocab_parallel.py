"""The sharded losses on real processes, against an unsharded float64 oracle: values, gradients, agreement of ranks."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sdsearch.loss.jsd import DivergenceName, Tail, vocab_parallel_jsd, vocab_parallel_topk_jsd
from megatron_sdsearch.loss.logprobs import vocab_parallel_entropy, vocab_parallel_logprobs
from megatron_sdsearch.loss.topk import TopKOf, chosen_topk, teacher_topk
from megatron_sdsearch.parallel.vocab import VocabShard
from tests.distributed.launch import WorkerFailed, compute_device, run_distributed

Loss = Literal["logprobs", "entropy", "full", "topk"]
Logits = Literal["usual", "huge", "tied"]
DIVERGENCES: tuple[DivergenceName, ...] = ("jsd", "forward_kl", "reverse_kl", "mse")
TAILS: tuple[Tail, ...] = ("bucket", "renormalize", "drop")
# Tensor-parallel sizes for each number of processes: 4 processes make two groups of 2, one without global rank 0.
TP_SIZES = {2: (1, 2), 4: (2, 4)}
VALUE_TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-6}
GRADIENT_TOLERANCE = VALUE_TOLERANCE | {torch.bfloat16: 2**-8}


@dataclass(frozen=True)
class Case:
    """One loss on one set of global tensors."""

    loss: Loss
    vocab_size: int = 101
    padded_vocab_size: int = 104
    num_rows: int = 6
    dtype: torch.dtype = torch.float32
    logits: Logits = "usual"
    k: int = 7
    of: TopKOf = "teacher"
    tail: Tail = "bucket"
    divergence: DivergenceName = "jsd"
    beta: float = 0.3
    temperature: float = 1.3

    @property
    def name(self) -> str:
        numbers = f"vocab{self.vocab_size}-rows{self.num_rows}-k{self.k}-T{self.temperature}"
        form = f"{self.loss}-{self.of}-{self.tail}-{self.divergence}"
        return f"{form}-{self.logits}-{str(self.dtype).removeprefix('torch.')}-{numbers}"


def all_cases() -> Iterator[Case]:
    losses: tuple[Loss, ...] = ("logprobs", "entropy")
    regimes: tuple[tuple[torch.dtype, Logits], ...] = (
        (torch.float64, "usual"),
        (torch.float32, "usual"),
        (torch.float32, "huge"),
    )
    for loss in losses:
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            yield Case(loss=loss, dtype=dtype)
        yield Case(loss=loss, logits="huge", temperature=1.0)
        yield Case(loss=loss, vocab_size=5, padded_vocab_size=8)
        yield Case(loss=loss, num_rows=0)
    for divergence in DIVERGENCES:
        for dtype, logits in regimes:
            temperature = 1.0 if logits == "huge" else 1.3
            yield Case(loss="full", divergence=divergence, dtype=dtype, logits=logits, temperature=temperature)
            for tail in TAILS:
                yield Case(
                    "topk", divergence=divergence, tail=tail, dtype=dtype, logits=logits, temperature=temperature
                )
        # The last of 4 ranks has no real column at all; k = 3 is more than a shard holds, k = 9 more than there is.
        yield Case("full", vocab_size=5, padded_vocab_size=8, divergence=divergence)
        for tail, k in itertools.product(TAILS, (3, 9)):
            yield Case("topk", vocab_size=5, padded_vocab_size=8, k=k, tail=tail, divergence=divergence)
    for tail in TAILS:
        yield Case("topk", k=60, tail=tail)  # more than half of the vocabulary: more than any shard at TP 2 holds
        yield Case("topk", logits="tied", tail=tail, dtype=torch.float64)
        yield Case("topk", num_rows=0, tail=tail)
        yield Case("topk", dtype=torch.bfloat16, tail=tail)
    others: tuple[TopKOf, ...] = ("student", "union")
    for of, tail in itertools.product(others, TAILS):
        for divergence, (dtype, logits) in itertools.product(DIVERGENCES, regimes):
            temperature = 1.0 if logits == "huge" else 1.3
            yield Case(
                "topk", of=of, tail=tail, divergence=divergence, dtype=dtype, logits=logits, temperature=temperature
            )
        yield Case("topk", of=of, k=60, tail=tail)  # both sets together are more than the vocabulary
        yield Case("topk", of=of, logits="tied", tail=tail, dtype=torch.float64)
        yield Case("topk", of=of, num_rows=0, tail=tail)
        yield Case("topk", of=of, dtype=torch.bfloat16, tail=tail)
        for k in (2, 3, 9):
            yield Case("topk", vocab_size=5, padded_vocab_size=8, of=of, k=k, tail=tail)
    yield Case("full", num_rows=0)
    yield Case("full", dtype=torch.bfloat16)


CASES = {case.name: case for case in all_cases()}


def global_tensors(case: Case) -> dict[str, Tensor]:
    """Student, teacher, labels and the upstream gradient, the same on every rank; padding holds garbage."""
    generator = torch.Generator().manual_seed(7)
    shape = (case.num_rows, case.padded_vocab_size)
    student, teacher = (2 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    if case.logits == "huge":
        student, teacher = (1e4 * logits.tanh().round(decimals=3) for logits in (student, teacher))
    if case.logits == "tied":
        student, teacher = student.round(), teacher.round().clamp(-1, 1)
    for logits in (student, teacher):
        logits[:, case.vocab_size :] = math.nan
    tensors = {
        "student": student.to(case.dtype),
        "teacher": teacher.to(case.dtype),
        "labels": torch.randint(case.vocab_size, (case.num_rows,), generator=generator),
        "upstream": torch.rand(case.num_rows, generator=generator, dtype=torch.float64) + 0.5,
    }
    return {name: tensor.to(compute_device()) for name, tensor in tensors.items()}


def oracle(case: Case, tensors: dict[str, Tensor], student: Tensor) -> Tensor:
    """The loss in float64 on one process, with nothing but torch's own autograd. [N]"""
    real = [logits[:, : case.vocab_size] / case.temperature for logits in (student, tensors["teacher"].double())]
    log_q, log_p = (logits.log_softmax(-1) for logits in real)
    if case.loss == "logprobs":
        return log_q.gather(1, tensors["labels"][:, None])[:, 0]
    if case.loss == "entropy":
        return -(log_q.exp() * log_q).sum(-1)
    if case.loss == "topk":
        rows = [oracle_row(case, *row) for row in zip(log_p, log_q, strict=True)]
        return torch.stack(rows) if rows else log_q.sum(-1)
    return oracle_divergence(case, log_p, log_q).sum(-1)


def oracle_row(case: Case, log_p: Tensor, log_q: Tensor) -> Tensor:
    """One row seen through its top-k, as a set of ids and nothing else: rows of a union differ in size."""
    roles = [log for log, role in ((log_p, "teacher"), (log_q, "student")) if case.of in (role, "union")]
    order = [log.detach().sort(descending=True, stable=True).indices[: case.k].tolist() for log in roles]
    is_head = torch.zeros(case.vocab_size, dtype=torch.bool)
    is_head[list(set(itertools.chain(*order)))] = True
    heads = [log[is_head] for log in (log_p, log_q)]
    if case.tail == "renormalize":
        heads = [head.log_softmax(-1) for head in heads]
    elif case.tail == "bucket" and not is_head.all():
        rests = [log[~is_head].logsumexp(-1, keepdim=True) for log in (log_p, log_q)]
        heads = [torch.cat(pair) for pair in zip(heads, rests, strict=True)]
    return oracle_divergence(case, *heads).sum()


def oracle_divergence(case: Case, log_p: Tensor, log_q: Tensor) -> Tensor:
    p, q = log_p.exp(), log_q.exp()
    log_m = torch.logaddexp(log_p + math.log(case.beta), log_q + math.log(1 - case.beta))
    return {
        "jsd": case.beta * p * (log_p - log_m) + (1 - case.beta) * q * (log_q - log_m),
        "forward_kl": p * (log_p - log_q),
        "reverse_kl": q * (log_q - log_p),
        "mse": (p - q).square(),
    }[case.divergence]


def sharded(case: Case, shard: VocabShard, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    if case.loss == "logprobs":
        return vocab_parallel_logprobs(student, labels, shard, temperature=case.temperature)
    if case.loss == "entropy":
        return vocab_parallel_entropy(student, shard, temperature=case.temperature)
    options: dict[str, Any] = {"beta": case.beta, "temperature": case.temperature, "divergence": case.divergence}
    if case.loss == "full":
        return vocab_parallel_jsd(student, teacher, shard, **options)
    topk = (
        teacher_topk(teacher, shard, case.k, temperature=case.temperature)
        if case.of == "teacher"
        else chosen_topk(student, teacher, shard, case.k, of=case.of, temperature=case.temperature)
    )
    return vocab_parallel_topk_jsd(student, topk, shard, tail=case.tail, **options)


@dataclass(frozen=True)
class Outcome:
    """What one rank measured for one case; errors are relative to the largest expected number, or to 0.1."""

    values: list[float]
    value_error: float
    gradient_error: float
    largest_gradient: float
    padding_gradient: float
    gradient_dtype: torch.dtype
    is_unmodified: bool


def relative_error(actual: Tensor, expected: Tensor) -> float:
    if actual.numel() == 0:
        return 0.0
    scale = max(float(expected.abs().max()), 0.1)
    return float((actual.double() - expected).abs().max()) / scale


def measure(case: Case, shard: VocabShard) -> Outcome:
    tensors = global_tensors(case)
    reference = tensors["student"].to(torch.float64, copy=True).requires_grad_()
    expected = oracle(case, tensors, reference)
    (expected * tensors["upstream"]).sum().backward()
    assert reference.grad is not None

    columns = slice(shard.vocab_start_index, shard.vocab_start_index + shard.shard_size)
    student, teacher = (tensors[name][:, columns].clone() for name in ("student", "teacher"))
    student.requires_grad_()
    values = sharded(case, shard, student, teacher, tensors["labels"])
    (values * tensors["upstream"].to(values.dtype)).sum().backward()
    gradient = student.grad
    assert gradient is not None
    num_valid, expected_gradient = shard.num_valid, reference.grad[:, columns]
    return Outcome(
        values=values.tolist(),
        value_error=relative_error(values.detach(), expected.detach()),
        gradient_error=relative_error(gradient[:, :num_valid], expected_gradient[:, :num_valid]),
        largest_gradient=max([0.0, *reference.grad[:, : case.vocab_size].abs().flatten().tolist()]),
        padding_gradient=float(gradient[:, num_valid:].abs().sum()),
        gradient_dtype=gradient.dtype,
        is_unmodified=all(
            torch.equal(local.detach().nan_to_num(), tensors[name][:, columns].nan_to_num())
            for name, local in (("student", student), ("teacher", teacher))
        ),
    )


def tensor_parallel_group(rank: int, world_size: int, tp_size: int) -> dist.ProcessGroup:
    groups = [dist.new_group(list(range(first, first + tp_size))) for first in range(0, world_size, tp_size)]
    own: dist.ProcessGroup = groups[rank // tp_size]
    return own


def measure_all(rank: int, world_size: int) -> dict[tuple[int, str], Outcome]:
    outcomes = {}
    for tp_size in TP_SIZES[world_size]:
        group = tensor_parallel_group(rank, world_size, tp_size)
        check_shard(group, tp_size)
        for name, case in CASES.items():
            shard = VocabShard.split(case.vocab_size, group, case.padded_vocab_size)
            outcomes[tp_size, name] = measure(case, shard)
            check_that_backward_is_silent(case, shard)
    return outcomes


def check_shard(group: dist.ProcessGroup, tp_size: int) -> None:
    """Raises on the rank that disagrees."""
    shard = VocabShard.split(5 * tp_size, group)
    assert (shard.size, shard.shard_size, shard.num_valid) == (tp_size, 5, 5)
    own = torch.tensor([shard.rank], device=compute_device())
    ranks = shard.all_gather(own)
    assert [int(rank) for rank in ranks] == list(range(tp_size))
    assert shard.all_reduce(own.float(), "max").item() == tp_size - 1
    assert shard.all_gather(torch.empty(0, 3))[0].shape == (0, 3)
    if tp_size > 1:
        with pytest.raises(ValueError, match="does not divide"):
            VocabShard.split(5 * tp_size + 1, group)


def check_that_backward_is_silent(case: Case, shard: VocabShard) -> None:
    """Only one rank goes backward: a collective in there would meet the other ranks' sum, or hang."""
    tensors = global_tensors(case)
    columns = slice(shard.vocab_start_index, shard.vocab_start_index + shard.shard_size)
    student = tensors["student"][:, columns].clone().requires_grad_()
    values = sharded(case, shard, student, tensors["teacher"][:, columns], tensors["labels"])
    if shard.rank == 0:
        values.sum().backward()
    assert shard.all_reduce(torch.ones((), device=compute_device()), "sum").item() == shard.size


@pytest.fixture(scope="module")
def launched(request: pytest.FixtureRequest) -> list[dict[tuple[int, str], Outcome]]:
    """What each of ``request.param`` ranks measured; one launch, even a failing one, serves all cases."""
    return run_distributed(measure_all, request.param)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    ("launched", "tp_size"),
    [(world_size, tp_size) for world_size, tp_sizes in TP_SIZES.items() for tp_size in tp_sizes],
    indirect=["launched"],
    scope="module",  # or every case launches anew: an indirect argument among others makes the fixture a function's
)
def test_sharded_loss_equals_the_oracle(
    launched: list[dict[tuple[int, str], Outcome]], tp_size: int, name: str
) -> None:
    case, ranks = CASES[name], [outcomes[tp_size, name] for outcomes in launched]
    for outcome in ranks:
        assert outcome.value_error <= VALUE_TOLERANCE[case.dtype]
        assert outcome.gradient_error <= GRADIENT_TOLERANCE[case.dtype]
        assert outcome.padding_gradient == 0
        assert outcome.gradient_dtype == case.dtype
        assert outcome.is_unmodified
        assert outcome.values == ranks[0].values, "not the same number on all ranks, to the last bit"
        assert len(outcome.values) == case.num_rows
        if case.num_rows and case.logits != "huge":
            assert outcome.largest_gradient > 1e-3, "a gradient near 0 would prove nothing"


def ask_for_a_label_that_nobody_has(rank: int, world_size: int) -> None:
    assert dist.group.WORLD is not None
    shard = VocabShard.split(7, dist.group.WORLD, 8)
    vocab_parallel_logprobs(torch.zeros(1, 4), torch.tensor([7]), shard)


def test_an_error_on_the_ranks_reaches_the_caller_with_its_text() -> None:
    with pytest.raises(WorkerFailed, match=r"(?s)rank\d:\n.*labels must lie in \[0, 7\), got 7\.\.7"):
        run_distributed(ask_for_a_label_that_nobody_has, 2)


def wait_for_a_peer_that_does_not_come(rank: int, world_size: int) -> None:
    if rank == 0:
        dist.barrier()
    else:
        time.sleep(600)


def test_ranks_that_hang_are_ended_in_time() -> None:
    started = time.monotonic()
    with pytest.raises((TimeoutError, WorkerFailed), match="rank"):
        run_distributed(wait_for_a_peer_that_does_not_come, 2, timeout_s=6)
    assert time.monotonic() - started < 60
