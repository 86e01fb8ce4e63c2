"""Log-probabilities and entropies from logits sharded over the vocabulary of tensor-parallel ranks.

Also defines the sharded softmax (``LogNormalizer``) that ``jsd.py`` uses. ``objective.py`` chooses and weights the
tokens and sums over them.

Three rules hold for all functions here. Logits are read, never written: megatron-core's cross entropy overwrites its
input. The backward pass recomputes what it needs from the logits, which are alive anyway, so no fp32 copy of them is
kept. Rows are processed in blocks, so not even a temporary fp32 copy of all of them exists.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_sdsearch.parallel.vocab import VocabShard

# 128 MB per fp32 temporary: a packed microbatch of 16k tokens over 152k columns would be 10 GB at once.
_BLOCK_ELEMENTS = 2**25


def vocab_parallel_logprobs(logits: Tensor, labels: Tensor, shard: VocabShard, *, temperature: float = 1.0) -> Tensor:
    """Compute the log-probability of each row's label.

    The forward pass takes three all-reduces of [N], the backward pass none.

    Args:
        logits: [N, V/tp], any floating point type. Its gradient has the same type and is zero on padding.
        labels: [N] int64 global ids, the same on every rank.
        shard: the vocabulary columns of this rank.
        temperature: divides the logits; above 0.

    Returns:
        [N] nats, with gradient, the same on every rank, in fp32 (float64 for float64 logits).

    Raises:
        ValueError: shapes do not fit, a label is not in ``[0, vocab_size)``, or the temperature is not positive.
    """
    shard.check_logits(logits)
    if labels.shape != logits.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64 [{len(logits)}], got {labels.dtype} {list(labels.shape)}")
    # Every rank holds the same labels, so all ranks raise and none is left waiting in a collective.
    lowest, highest = torch.stack(labels.aminmax()).tolist() if len(labels) else (0, 0)
    if lowest < 0 or highest >= shard.vocab_size:
        raise ValueError(
            f"labels must lie in [0, {shard.vocab_size}), got {lowest}..{highest}; mask ignored tokens before"
        )
    check_temperature(temperature)
    logprobs: Tensor = _Logprobs.apply(logits, labels, shard, temperature)  # type: ignore[no-untyped-call]
    return logprobs


def vocab_parallel_entropy(logits: Tensor, shard: VocabShard, *, temperature: float = 1.0) -> Tensor:
    """Compute the entropy of each row's distribution.

    With the entropy ``H`` and the distribution ``q``, ``dH/dz_i = -q_i (log q_i + H)`` is local once ``H`` is known:
    the backward pass does not communicate. The forward pass takes three all-reduces of [N].

    Args:
        logits: [N, V/tp], any floating point type. Its gradient has the same type and is zero on padding.
        shard: the vocabulary columns of this rank.
        temperature: divides the logits; above 0.

    Returns:
        [N] nats, with gradient, the same on every rank, in fp32 (float64 for float64 logits).

    Raises:
        ValueError: the logits do not fit the shard, or the temperature is not positive.
    """
    shard.check_logits(logits)
    check_temperature(temperature)
    entropy: Tensor = _Entropy.apply(logits, shard, temperature)  # type: ignore[no-untyped-call]
    return entropy


@dataclass(frozen=True, slots=True, eq=False)
class LogNormalizer:
    """The normaliser of a softmax over the whole vocabulary, as two numbers per row.

    They are kept apart because in fp32 the sum ``maximum + log_sum`` loses 5e-4 when logits are near 1e4.

    Attributes:
        maximum: [N] largest logit of the row, before the temperature.
        log_sum: [N] log of ``sum_i exp((z_i - maximum) / temperature)``.
        temperature: divides the logits.
    """

    maximum: Tensor
    log_sum: Tensor
    temperature: float

    def logprobs(self, block: Tensor, rows: slice) -> Tensor:
        """Compute the log-probabilities of ``block``, logits of ``rows`` in some columns, in the normaliser's type."""
        shifted = block.to(self.maximum.dtype) - self.maximum[rows, None]
        return shifted / self.temperature - self.log_sum[rows, None]


def log_normalizers(logits: Sequence[Tensor], shard: VocabShard, temperature: float) -> list[LogNormalizer]:
    """Compute the normalisers of several logits ``[N, V/tp]`` with two all-reduces in total.

    Not differentiable: call it inside an autograd function.
    """
    dtype = compute_dtype(*logits)
    columns = [shard.valid_columns(each) for each in logits]
    maxima = columns[0].new_full((len(columns), len(columns[0])), -math.inf, dtype=dtype)
    for each, maximum in zip(columns, maxima, strict=True):
        if each.shape[1]:  # a rank without real vocabulary stays at -inf: amax refuses an empty dim
            maximum.copy_(each.amax(-1))
    shard.all_reduce(maxima, "max")
    sums = torch.zeros_like(maxima)
    for each, maximum, total in zip(columns, maxima, sums, strict=True):
        for rows in row_blocks(each):
            shifted = each[rows].to(dtype) - maximum[rows, None]
            total[rows] = (shifted / temperature).exp().sum(-1)
    log_sums = shard.all_reduce(sums, "sum").log()
    return [LogNormalizer(maximum, log_sum, temperature) for maximum, log_sum in zip(maxima, log_sums, strict=True)]


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the widest type of the tensors, at least fp32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def row_blocks(columns: Tensor) -> Iterator[slice]:
    """Split the rows into blocks of bounded size; yields nothing when there are no elements."""
    num_rows, num_columns = columns.shape
    if num_rows and num_columns:
        step = max(1, _BLOCK_ELEMENTS // num_columns)
        for start in range(0, num_rows, step):
            yield slice(start, start + step)


def times_log(weight: Tensor, log_value: Tensor) -> Tensor:
    """Multiply with 0 * inf = 0, the limit of x log x. A NaN weight stays NaN."""
    return torch.where(weight == 0, 0.0, weight * log_value)


def check_temperature(temperature: float) -> None:
    """Raise ValueError unless ``temperature`` is finite and above 0."""
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be finite and above 0, got {temperature}")


def check_choice(name: str, value: str, literal: Any) -> None:
    """Raise ValueError unless ``value`` is one of ``literal``'s."""
    if value not in get_args(literal):
        raise ValueError(f"{name} must be one of {', '.join(get_args(literal))}, got {value!r}")


class _Logprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, shard: VocabShard, temperature: float) -> Tensor:
        (normalizer,) = log_normalizers([logits], shard, temperature)
        columns, is_local = shard.local_columns(labels)
        shifted = logits.gather(1, columns[:, None])[:, 0].to(normalizer.maximum.dtype) - normalizer.maximum
        # Exactly one rank owns a label; the sum sends its value to the others.
        label_logits = shard.all_reduce(torch.where(is_local, shifted / temperature, 0.0), "sum")
        ctx.save_for_backward(logits, columns, is_local, normalizer.maximum, normalizer.log_sum)
        ctx.shard, ctx.temperature = shard, temperature
        return label_logits - normalizer.log_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        logits, columns, is_local, maximum, log_sum = ctx.saved_tensors
        normalizer = LogNormalizer(maximum, log_sum, ctx.temperature)
        valid, grad = ctx.shard.valid_columns(logits), torch.zeros_like(logits)
        scale = grad_output / ctx.temperature
        label_scale = torch.where(is_local, scale, 0.0)
        for rows in row_blocks(valid):
            block = normalizer.logprobs(valid[rows], rows).exp_().mul_(-scale[rows, None])
            block.scatter_add_(1, columns[rows, None], label_scale[rows, None])
            grad[rows, : valid.shape[1]] = block
        return grad, None, None, None


class _Entropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, shard: VocabShard, temperature: float) -> Tensor:
        (normalizer,) = log_normalizers([logits], shard, temperature)
        valid, entropy = shard.valid_columns(logits), torch.zeros_like(normalizer.maximum)
        for rows in row_blocks(valid):
            logprobs = normalizer.logprobs(valid[rows], rows)
            entropy[rows] = -times_log(logprobs.exp(), logprobs).sum(-1)
        shard.all_reduce(entropy, "sum")
        ctx.save_for_backward(logits, normalizer.maximum, normalizer.log_sum, entropy)
        ctx.shard, ctx.temperature = shard, temperature
        return entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        logits, maximum, log_sum, entropy = ctx.saved_tensors
        normalizer = LogNormalizer(maximum, log_sum, ctx.temperature)
        valid, grad = ctx.shard.valid_columns(logits), torch.zeros_like(logits)
        scale = grad_output / ctx.temperature
        for rows in row_blocks(valid):
            logprobs = normalizer.logprobs(valid[rows], rows)
            gradient = times_log(logprobs.exp(), logprobs + entropy[rows, None])
            grad[rows, : valid.shape[1]] = gradient * -scale[rows, None]
        return grad, None, None
