"""Log-probabilities and entropies on one rank, against torch's own; the sharded case is in tests/distributed."""

import math

import pytest
import torch
from torch import Tensor

from megatron_sdsearch.loss import logprobs as module
from megatron_sdsearch.loss.logprobs import vocab_parallel_entropy, vocab_parallel_logprobs
from megatron_sdsearch.parallel.vocab import VocabShard

VOCAB = 11
SHARD = VocabShard.whole(VOCAB)


def make_logits(num_rows: int = 6, num_columns: int = VOCAB, *, scale: float = 3.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(num_rows, num_columns, generator=generator, dtype=torch.float64)


def reference(logits: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    distribution = torch.distributions.Categorical(logits=logits / temperature)
    return distribution.log_prob(labels), distribution.entropy()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_values_and_gradients_equal_torchs(temperature: float) -> None:
    labels, weights = torch.tensor([0, 10, 3, 3, 7, 1]), torch.arange(1.0, 7.0, dtype=torch.float64)
    ours, theirs = make_logits().requires_grad_(), make_logits().requires_grad_()
    logprobs = vocab_parallel_logprobs(ours, labels, SHARD, temperature=temperature)
    entropy = vocab_parallel_entropy(ours, SHARD, temperature=temperature)
    expected_logprobs, expected_entropy = reference(theirs, labels, temperature)
    torch.testing.assert_close(logprobs, expected_logprobs)
    torch.testing.assert_close(entropy, expected_entropy)
    (weights * (logprobs + 2 * entropy)).sum().backward()
    (weights * (expected_logprobs + 2 * expected_entropy)).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_gradcheck() -> None:
    logits, labels = make_logits(3).requires_grad_(), torch.tensor([4, 0, 10])
    assert torch.autograd.gradcheck(lambda x: vocab_parallel_logprobs(x, labels, SHARD, temperature=0.7), logits)
    assert torch.autograd.gradcheck(lambda x: vocab_parallel_entropy(x, SHARD, temperature=0.7), logits)


@pytest.mark.parametrize("garbage", [1e6, math.inf, math.nan])
def test_padding_neither_counts_nor_gets_a_gradient(garbage: float) -> None:
    padded = torch.cat([make_logits(), torch.full((6, 5), garbage, dtype=torch.float64)], dim=1).requires_grad_()
    labels = torch.tensor([0, 10, 3, 3, 7, 1])
    shard = VocabShard.whole(VOCAB, padded_vocab_size=VOCAB + 5)
    logprobs, entropy = vocab_parallel_logprobs(padded, labels, shard), vocab_parallel_entropy(padded, shard)
    expected_logprobs, expected_entropy = reference(make_logits(), labels, 1.0)
    torch.testing.assert_close(logprobs, expected_logprobs)
    torch.testing.assert_close(entropy, expected_entropy)
    (logprobs + entropy).sum().backward()
    assert padded.grad is not None
    assert torch.equal(padded.grad[:, VOCAB:], torch.zeros(6, 5, dtype=torch.float64))
    assert bool((padded.grad[:, :VOCAB] != 0).all())


def test_logits_are_left_as_they_were() -> None:
    logits, labels = make_logits().requires_grad_(), torch.zeros(6, dtype=torch.int64)
    before = logits.detach().clone()
    (vocab_parallel_logprobs(logits, labels, SHARD) + vocab_parallel_entropy(logits, SHARD)).sum().backward()
    assert torch.equal(logits.detach(), before)


def test_logits_that_somebody_else_overwrites_are_noticed() -> None:
    logits = make_logits().requires_grad_() * 1.0
    loss = vocab_parallel_logprobs(logits, torch.zeros(6, dtype=torch.int64), SHARD).sum()
    logits.exp_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_huge_logits_keep_their_digits_in_fp32() -> None:
    logits = torch.tensor([[1e4, 1e4 - 1, -1e4], [-1e4, -1e4, -1e4]], requires_grad=True)
    shard, labels = VocabShard.whole(3), torch.tensor([1, 2])
    logprobs, entropy = vocab_parallel_logprobs(logits, labels, shard), vocab_parallel_entropy(logits, shard)
    expected_logprobs, expected_entropy = reference(logits.detach().double(), labels, 1.0)
    torch.testing.assert_close(logprobs.detach().double(), expected_logprobs, rtol=0, atol=3e-7)
    torch.testing.assert_close(entropy.detach().double(), expected_entropy, rtol=0, atol=3e-7)
    (logprobs + entropy).sum().backward()
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())


def test_a_forbidden_token_has_no_probability_and_no_share_in_the_entropy() -> None:
    logits = torch.tensor([[0.0, 0.0, -math.inf]], requires_grad=True)
    shard = VocabShard.whole(3)
    assert vocab_parallel_logprobs(logits, torch.tensor([2]), shard).item() == -math.inf
    entropy = vocab_parallel_entropy(logits, shard)
    assert entropy.item() == pytest.approx(math.log(2))
    entropy.sum().backward()
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())


def test_bf16_logits_are_computed_in_fp32_and_get_a_bf16_gradient() -> None:
    logits, labels = make_logits().bfloat16().requires_grad_(), torch.zeros(6, dtype=torch.int64)
    logprobs, entropy = vocab_parallel_logprobs(logits, labels, SHARD), vocab_parallel_entropy(logits, SHARD)
    expected_logprobs, expected_entropy = reference(logits.detach().double(), labels, 1.0)
    assert logprobs.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logprobs.detach().double(), expected_logprobs, rtol=0, atol=2e-6)
    torch.testing.assert_close(entropy.detach().double(), expected_entropy, rtol=0, atol=2e-6)
    (logprobs + entropy).sum().backward()
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16


def test_no_rows_give_no_values_and_a_gradient_of_their_shape() -> None:
    logits, labels = torch.empty(0, VOCAB, requires_grad=True), torch.empty(0, dtype=torch.int64)
    logprobs, entropy = vocab_parallel_logprobs(logits, labels, SHARD), vocab_parallel_entropy(logits, SHARD)
    assert logprobs.shape == entropy.shape == (0,)
    (logprobs.sum() + entropy.sum()).backward()
    assert logits.grad is not None
    assert logits.grad.shape == (0, VOCAB)


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> tuple[Tensor, Tensor | None]:
        logits, labels = make_logits(7).requires_grad_(), torch.arange(7)
        values = vocab_parallel_logprobs(logits, labels, SHARD) + vocab_parallel_entropy(logits, SHARD)
        (values * torch.arange(7)).sum().backward()
        return values.detach(), logits.grad

    at_once = run()
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", 2 * VOCAB + 1)
    assert len(list(module.row_blocks(make_logits(7)))) == 4
    in_blocks = run()
    assert torch.equal(in_blocks[0], at_once[0])
    torch.testing.assert_close(in_blocks[1], at_once[1], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, VOCAB]), rf"labels must lie in \[0, {VOCAB}\), got 0..{VOCAB}"),
        (torch.tensor([-100, 1]), "got -100..1; mask ignored tokens before"),
        (torch.tensor([1]), r"labels must be int64 \[2\]"),
        (torch.tensor([0.0, 1.0]), r"labels must be int64 \[2\], got torch.float32"),
    ],
)
def test_labels_outside_the_vocabulary_are_refused(labels: Tensor, message: str) -> None:
    padded = VocabShard.whole(VOCAB, padded_vocab_size=VOCAB + 2)
    with pytest.raises(ValueError, match=message):
        vocab_parallel_logprobs(make_logits(2, VOCAB + 2), labels, padded)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_temperatures_that_are_none_are_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature must be finite and above 0"):
        vocab_parallel_logprobs(make_logits(1), torch.tensor([0]), SHARD, temperature=temperature)
    with pytest.raises(ValueError, match="temperature must be finite and above 0"):
        vocab_parallel_entropy(make_logits(1), SHARD, temperature=temperature)
