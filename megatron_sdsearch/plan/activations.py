"""Count bytes of a layer's activations and of the loss on one rank.

Layers follow the specs of ``model/architecture.py``. ``local``, without CUDA, was counted from torch's allocator tensor
by tensor and is tested against it (tests/distributed/test_memory_plan.py). ``te`` is transformer-engine's, counted from
its source and never measured. The loss was counted from the functions of ``loss/objective.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_sdsearch.config import ObjectiveConfig
from megatron_sdsearch.model.shape import ModelShape
from megatron_sdsearch.plan.workload import MicrobatchLoad

LayerSpec = Literal["local", "te"]
_FP32 = 4
_BLOCK_ELEMENTS = 2**25  # as in loss/logprobs.py
# fp32 temporaries that exist at one time, in blocks of rows; counted in the functions named.
_LOGPROBS_BLOCKS = 3.0  # LogNormalizer.logprobs
_ENTROPY_BLOCKS = 5.25  # _Entropy.backward: times_log and its mask
_TOPK_BLOCKS = 4.5  # _TopKDivergence.backward: tail logits, three of logprobs, two masks of bytes
_FULL_BLOCKS = 9.0  # _FullDivergence.backward: two log-probabilities and the terms of the JSD
_CHOICE_BLOCKS = 4.75  # the teacher's choice in loss/topk.py: tail logits, three for their sum, masks of bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerBytes:
    """Bytes of one layer on one rank for one microbatch.

    Attributes:
        boundary: the input [T, h], sharded by sequence under sequence parallel.
        saved: everything kept for the backward pass, including the input.
        forward: peak of a pass without gradient, including the input.
        backward: peak that the backward pass adds to ``saved``: the incoming gradient, and two tensors of the gated
            MLP's width.
    """

    boundary: int
    saved: int
    forward: int
    backward: int


def layer_bytes(
    shape: ModelShape, spec: LayerSpec, num_tokens: int, *, tp: int, sequence: bool, element: int
) -> LayerBytes:
    """Count a layer's bytes for a row of ``num_tokens``, with ``element`` bytes per activation."""
    boundary = num_tokens // (tp if sequence else 1) * shape.hidden * element
    gated = num_tokens * shape.intermediate // tp * element
    query, key = shape.query_width // tp, shape.key_width_on(tp)
    qkv = shape.query_width + 2 * shape.key_width
    if tp <= shape.num_groups:  # otherwise ranks share a key head, and each holds the whole projection
        qkv //= tp
    has_norm = shape.architecture.has_qk_norm
    if spec == "local":
        # Rotated queries, keys and values repeated for every head, outputs per sequence and in one row; inputs and
        # normalised values of both norms, where the keys' input is a view of all of QKV.
        norms, attention = 6 * boundary, 5 * query + (2 * query + key + qkv) * has_norm
    else:
        # QKV as a whole (the values are a view of it), rotated queries and keys, outputs; normalised queries and keys.
        norms, attention = 4 * boundary, qkv + 2 * query + key + (query + key) * has_norm
    rotary = 4 * shape.head_dim  # cosines and sines, for queries and for keys
    saved_attention = num_tokens * ((attention + rotary) * element + _FP32 * shape.num_heads // tp)
    return LayerBytes(
        boundary=boundary,
        # gate and value (2), silu of the gate, the value plus megatron's offset, their product
        saved=norms + saved_attention + 5 * gated,
        # the layer's input, its residual, the normalised and the finished row, and all of the gated MLP
        forward=4 * boundary + 5 * gated,
        backward=boundary + 2 * gated,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadSize:
    """The output layer on one rank.

    Attributes:
        columns: V/tp.
        hidden: width of the model.
        element: bytes of a logit.
    """

    columns: int
    hidden: int
    element: int

    @property
    def weight_bytes(self) -> int:
        """Bytes of the head, and of its gradient before it is added to the fp32 buffer."""
        return self.columns * self.hidden * self.element

    def logits(self, rows: int) -> int:
        """Count the bytes of ``rows`` logits."""
        return rows * self.columns * self.element

    def blocks(self, rows: int) -> int:
        """Count the bytes of one fp32 temporary when ``rows`` are read in blocks."""
        return min(rows, max(1, _BLOCK_ELEMENTS // self.columns)) * self.columns * _FP32


def loss_bytes(head: HeadSize, load: MicrobatchLoad, chunk_rows: int, objective: ObjectiveConfig) -> int:
    """Count the peak bytes that the loss adds to a stage's saved activations, from hidden states to their gradient.

    The loss projects a chunk of rows and reads it. The backward pass, which projects again when there are several
    chunks, makes one gradient of the logits per reader: divergence, entropy, log-probabilities, in this order.
    """
    rows = min(chunk_rows, load.policy_rows)
    is_chunked = load.policy_rows > chunk_rows
    queries = min(rows, load.query_rows * rows // max(1, load.policy_rows))
    logits = head.logits(rows)
    indexed = logits if load.query_rows else 0  # gradient of the rows that the divergence picked
    blocks_of_queries = _FULL_BLOCKS if kept_entries(objective) is None else _TOPK_BLOCKS
    moments = [
        2 * logits + indexed + _LOGPROBS_BLOCKS * head.blocks(rows),
        logits + 2 * head.logits(queries) + blocks_of_queries * head.blocks(queries),
        logits + (1 + is_chunked) * head.weight_bytes,
    ]
    if objective.entropy_coef > 0:
        moments.append(2 * logits + indexed + _ENTROPY_BLOCKS * head.blocks(rows))
    row = head.hidden * head.element
    # Several chunks: the hidden states stay, and their gradient and the head's grow. One chunk: its rows stay.
    held = 2 * load.num_tokens * row + head.weight_bytes if is_chunked else load.policy_rows * row
    return int(held + max(moments))


def kept_entries(objective: ObjectiveConfig) -> int | None:
    """Return the entries of a teacher target per row; None for all of the teacher's logits."""
    return objective.topk if objective.topk_of == "teacher" else None


def target_bytes(head: HeadSize, load: MicrobatchLoad, topk: int | None) -> int:
    """Count the bytes of a minibatch's targets: an id and a log-probability per entry and a tail, or whole logits."""
    rows = load.query_rows * load.num_microbatches
    return rows * (topk * (8 + _FP32) + _FP32) if topk is not None else head.logits(rows)


def teacher_bytes(head: HeadSize, load: MicrobatchLoad, chunk_rows: int, topk: int | None) -> int:
    """Count the bytes of the teacher's hidden states and logits while one microbatch's targets are made."""
    hidden = load.teacher_tokens * head.hidden * head.element
    if topk is None:  # the chunks are kept, then concatenated
        return hidden + 2 * head.logits(load.query_rows)
    rows = min(chunk_rows, load.query_rows)
    return int(hidden + head.logits(rows) + _CHOICE_BLOCKS * head.blocks(rows))


def logprobs_bytes(head: HeadSize, load: MicrobatchLoad, chunk_rows: int) -> int:
    """Count the bytes for log-probabilities without gradient: of the reference and of the old policy."""
    rows = min(chunk_rows, load.policy_rows)
    hidden = load.num_tokens * head.hidden * head.element
    return int(hidden + head.logits(rows) + _LOGPROBS_BLOCKS * head.blocks(rows))
