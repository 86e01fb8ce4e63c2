"""Runs megatron's pipeline schedules and scales the losses; nothing else does either.

megatron divides a loss by the number of microbatches (schedules.py:255), and DDP averages gradients over data-parallel
ranks. Our losses are sums with weights that already hold the global denominators (``Microbatch``), so both divisions
are undone here, and any split into ranks and microbatches gives the gradient of a single process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_sdsearch.batching.packing import Microbatch
from megatron_sdsearch.parallel.groups import ParallelState

ReadHidden = Callable[[Tensor, Microbatch], Any]
"""(hidden states [T, h], the microbatch on the device) -> any result; called on the last pipeline stage only."""


def forward_backward(
    model: torch.nn.Module, microbatches: Sequence[Microbatch], losses: Sequence[ReadHidden], parallel: ParallelState
) -> list[dict[str, Tensor]]:
    """Accumulate the gradient of ``sum over microbatches and data-parallel ranks of loss`` into the model.

    Args:
        model: wrapped in megatron's DistributedDataParallel.
        microbatches: those of this data-parallel rank; every rank must have the same number.
        losses: one per microbatch, each returning (scalar sum with global weights, metrics).
        parallel: ranks and groups.

    Returns:
        The metrics of each microbatch on the last stage; an empty list on the others.
    """
    scale = len(microbatches) * parallel.dp_size

    def scaled(loss: ReadHidden, batch: Microbatch, output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        value, metrics = loss(output.squeeze(0), batch)
        return value * scale, metrics  # a new tensor, because megatron divides it in place

    return _run(model, microbatches, [partial(scaled, loss) for loss in losses], parallel, is_forward_only=False)


def forward_collect(
    model: torch.nn.Module, microbatches: Sequence[Microbatch], read: ReadHidden, parallel: ParallelState
) -> list[Any]:
    """Run the model without gradients; returns ``read``'s result per microbatch, an empty list off the last stage."""
    if not microbatches:
        return []

    def collected(batch: Microbatch, output: Tensor, non_loss_data: bool = False) -> Any:
        return read(output.squeeze(0), batch)

    with torch.no_grad():
        return _run(model, microbatches, [collected] * len(microbatches), parallel, is_forward_only=True)


def _run(
    model: torch.nn.Module,
    microbatches: Sequence[Microbatch],
    consumers: Sequence[Callable[..., Any]],
    parallel: ParallelState,
    *,
    is_forward_only: bool,
) -> list[Any]:
    dtype = torch.promote_types(next(model.parameters()).dtype, torch.float32)

    def forward_step(
        work: Iterator[tuple[Microbatch, Callable[..., Any]]], stage: torch.nn.Module
    ) -> tuple[Tensor, Any]:
        host, consume = next(work)
        batch = host.to(parallel.device, dtype)
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=batch.cu_seqlens,
            cu_seqlens_kv=batch.cu_seqlens,
            max_seqlen_q=batch.max_seqlen,
            max_seqlen_kv=batch.max_seqlen,
        )
        output = stage(batch.token_ids[None], batch.position_ids[None], None, packed_seq_params=packed)
        return output, partial(consume, batch)

    return get_forward_backward_func()(  # type: ignore[no-any-return]
        forward_step_func=forward_step,
        data_iterator=iter(zip(microbatches, consumers, strict=True)),
        model=model,
        num_microbatches=len(microbatches),
        seq_length=len(microbatches[0].token_ids),
        micro_batch_size=1,
        forward_only=is_forward_only,
        collect_non_loss_data=is_forward_only,
    )
