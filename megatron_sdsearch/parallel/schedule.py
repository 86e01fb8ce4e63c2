"""The only caller of megatron's pipeline schedules, and the only place where losses are scaled.

megatron divides a loss by the number of microbatches (schedules.py:255) and DDP averages gradients over data-parallel
ranks. Our losses are sums with weights that already hold the global denominators (``records.Microbatch``), so both
divisions are undone here, once, and any (dp, microbatches) factorisation yields the single-process gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_sdsearch.parallel.groups import ParallelState
from megatron_sdsearch.records import Microbatch

Metrics = dict[str, Tensor]
"""0-dim, on the device."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DeviceMicrobatch:
    """A ``records.Microbatch`` as tensors on this rank's device, plus its index in the minibatch.

    The masked fields are gathered to the rows that the loss looks at: N policy tokens and Q distilled ones.

    Attributes:
        index: position in the minibatch's list.
        token_ids, position_ids: [1, T].
        packed: megatron's description of the sequences in the row.
        policy_rows: [N] indices into T.
        policy_labels, rollout_logprobs, advantages, policy_weights: [N].
        query_rows: [Q] indices into T, ascending.
        distill_weights: [Q].
        query_classes: [Q] index into ``records.GROUP_CLASSES``.
    """

    index: int
    token_ids: Tensor
    position_ids: Tensor
    packed: PackedSeqParams
    policy_rows: Tensor
    policy_labels: Tensor
    rollout_logprobs: Tensor
    advantages: Tensor
    policy_weights: Tensor
    query_rows: Tensor
    distill_weights: Tensor
    query_classes: Tensor

    @classmethod
    def load(cls, batch: Microbatch, index: int, device: torch.device, dtype: torch.dtype) -> DeviceMicrobatch:
        """Move one microbatch to ``device``; float fields become ``dtype``."""
        tensor = partial(torch.as_tensor, device=device)
        cu_seqlens = tensor(batch.cu_seqlens, dtype=torch.int32)
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=batch.max_seqlen,
            max_seqlen_kv=batch.max_seqlen,
        )
        policy, query = batch.loss_mask, batch.query_mask
        return cls(
            index=index,
            token_ids=tensor(batch.token_ids).unsqueeze(0),
            position_ids=tensor(batch.position_ids).unsqueeze(0),
            packed=packed,
            policy_rows=tensor(policy.nonzero()[0]),
            policy_labels=tensor(batch.labels[policy]),
            rollout_logprobs=tensor(batch.rollout_logprobs[policy], dtype=dtype),
            advantages=tensor(batch.advantages[policy], dtype=dtype),
            policy_weights=tensor(batch.policy_weights[policy], dtype=dtype),
            query_rows=tensor(query.nonzero()[0]),
            distill_weights=tensor(batch.distill_weights[query], dtype=dtype),
            query_classes=tensor(batch.group_classes[query]),
        )


def forward_backward(
    model: torch.nn.Module,
    microbatches: Sequence[Microbatch],
    loss: Callable[[Tensor, DeviceMicrobatch], tuple[Tensor, Metrics]],
    parallel: ParallelState,
) -> list[Metrics]:
    """Accumulate the gradient of ``sum over microbatches and data-parallel ranks of loss`` into the model.

    Args:
        model: wrapped in megatron's DistributedDataParallel.
        microbatches: this data-parallel rank's; the same number on every rank.
        loss: (hidden states [T, h], batch) -> (scalar sum with global weights, metrics); called on the last stage.
        parallel: this process's place.

    Returns:
        The metrics of each microbatch on the last stage, empty on the others.
    """
    scale = len(microbatches) * parallel.dp_size

    def scaled(batch: DeviceMicrobatch, output: Tensor) -> tuple[Tensor, Metrics]:
        value, metrics = loss(output.squeeze(0), batch)
        return value * scale, metrics  # a new tensor: megatron divides it in place

    return _run(model, microbatches, scaled, parallel, is_forward_only=False)


def forward_collect(
    model: torch.nn.Module,
    microbatches: Sequence[Microbatch],
    collect: Callable[[Tensor, DeviceMicrobatch], Any],
    parallel: ParallelState,
) -> list[Any]:
    """Run the model without gradient and keep what ``collect(hidden [T, h], batch)`` returns on the last stage."""
    if not microbatches:
        return []

    def collected(batch: DeviceMicrobatch, output: Tensor, non_loss_data: bool = False) -> Any:
        return collect(output.squeeze(0), batch)

    with torch.no_grad():
        return _run(model, microbatches, collected, parallel, is_forward_only=True)


def _run(
    model: torch.nn.Module,
    microbatches: Sequence[Microbatch],
    consume: Callable[..., Any],
    parallel: ParallelState,
    *,
    is_forward_only: bool,
) -> list[Any]:
    dtype = next(model.parameters()).dtype
    dtype = dtype if dtype == torch.float64 else torch.float32

    def forward_step(batches: Iterator[tuple[int, Microbatch]], stage: torch.nn.Module) -> tuple[Tensor, Any]:
        index, host = next(batches)
        batch = DeviceMicrobatch.load(host, index, parallel.device, dtype)
        output = stage(batch.token_ids, batch.position_ids, None, packed_seq_params=batch.packed)
        return output, partial(consume, batch)

    return get_forward_backward_func()(  # type: ignore[no-any-return]
        forward_step_func=forward_step,
        data_iterator=iter(enumerate(microbatches)),
        model=model,
        num_microbatches=len(microbatches),
        seq_length=len(microbatches[0].token_ids),
        micro_batch_size=1,
        forward_only=is_forward_only,
        collect_non_loss_data=is_forward_only,
    )
