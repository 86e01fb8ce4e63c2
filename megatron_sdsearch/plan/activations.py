"""Bytes that a layer keeps for its backward pass, for the two layer specs that ``model/architecture.py`` chooses from.

``local`` is the spec without CUDA: read off torch's allocator tensor by tensor, and held to it by
tests/distributed/test_memory_plan.py. ``te`` is transformer-engine's, from its source; it was never measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_sdsearch.plan.shape import ModelShape

LayerSpec = Literal["local", "te"]
_FP32 = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerBytes:
    """One layer, one rank, one microbatch.

    Attributes:
        boundary: its input [T, h], sharded by sequence under sequence parallel.
        saved: everything kept for the backward pass, the input included.
        forward: most that exists at one time in a pass without gradient, the input included.
        backward: most that its backward pass adds to what is saved: the gradient that comes in, and two of the
            gated MLP's width.
    """

    boundary: int
    saved: int
    forward: int
    backward: int

    @classmethod
    def of(
        cls, shape: ModelShape, spec: LayerSpec, num_tokens: int, *, tp: int, sequence: bool, element: int
    ) -> LayerBytes:
        """For a row of ``num_tokens``, with ``element`` bytes per activation."""
        boundary = num_tokens // (tp if sequence else 1) * shape.hidden * element
        gated = num_tokens * shape.intermediate // tp * element
        norms = (6 if spec == "local" else 4) * boundary
        attention = _local_attention(shape, tp) if spec == "local" else _te_attention(shape, tp)
        rotary = 4 * shape.head_dim  # cosines and sines, for queries and for keys
        saved_attention = num_tokens * ((attention + rotary) * element + _FP32 * shape.num_heads // tp)
        return cls(
            boundary=boundary,
            # gate and value (2), silu of the gate, the value plus megatron's offset, their product
            saved=norms + saved_attention + 5 * gated,
            # the layer's input, its residual, the normalised and the finished row, and all of the gated MLP
            forward=4 * boundary + 5 * gated,
            backward=boundary + 2 * gated,
        )


def _local_attention(shape: ModelShape, tp: int) -> int:
    """Elements per token: rotated queries, keys and values repeated for every head, outputs, and these in one row."""
    query, key = shape.query_width // tp, shape.key_width_on(tp)
    elements = 5 * query
    if shape.has_qk_norm:  # inputs and normalised values of both norms; the keys' input is a view of all of QKV
        elements += 2 * query + key + _qkv(shape, tp)
    return elements


def _te_attention(shape: ModelShape, tp: int) -> int:
    """Elements per token: rotated queries and keys, QKV as a whole (the values are a view of it), outputs."""
    query, key = shape.query_width // tp, shape.key_width_on(tp)
    elements = _qkv(shape, tp) + 2 * query + key
    if shape.has_qk_norm:
        elements += query + key
    return elements


def _qkv(shape: ModelShape, tp: int) -> int:
    """Elements per token of the projection: a rank's share, or all of it where a key head is shared by ranks."""
    whole = shape.query_width + 2 * shape.key_width
    return whole // tp if tp <= shape.num_groups else whole
