"""Most bytes that ``loss/objective.py`` adds to a stage's activations, read off its functions one by one.

The loss projects a chunk of rows, reads it, and in the backward pass (again, when there are several chunks) makes one
gradient of the logits per reader: the divergence, the entropy, the log-probabilities, in this order. fp32 copies exist
in blocks alone (``loss/logprobs.py``, ``row_blocks``).
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sdsearch.config import ObjectiveConfig
from megatron_sdsearch.plan.layout import MicrobatchLoad

_FP32 = 4
_BLOCK_ELEMENTS = 2**25  # as in loss/logprobs.py
# fp32 temporaries that exist together, in blocks; counted in the functions named.
_LOGPROBS_BLOCKS = 3.0  # LogNormalizer.logprobs
_ENTROPY_BLOCKS = 5.25  # _Entropy.backward: times_log and its mask
_TOPK_BLOCKS = 4.5  # _TopKDivergence.backward: tail logits, three of logprobs, two masks of bytes
_FULL_BLOCKS = 9.0  # _FullDivergence.backward: two log-probabilities and the terms of the JSD
_CHOICE_BLOCKS = 4.75  # topk.TopKLogits.read: tail logits, three on the way to their sum, masks of bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadSize:
    """The output layer on one rank.

    Attributes:
        columns: V/tp.
        hidden: of the model.
        element: bytes of a logit.
    """

    columns: int
    hidden: int
    element: int

    @property
    def weight_bytes(self) -> int:
        """Of the head, and of its gradient before that is added to the fp32 buffer."""
        return self.columns * self.hidden * self.element

    def logits(self, rows: int) -> int:
        """Bytes of ``rows`` logits."""
        return rows * self.columns * self.element

    def blocks(self, rows: int) -> int:
        """Bytes of one fp32 temporary when ``rows`` are walked in blocks."""
        return min(rows, max(1, _BLOCK_ELEMENTS // self.columns)) * self.columns * _FP32


def kept_entries(objective: ObjectiveConfig) -> int | None:
    """Entries that a teacher target has per row; None where it is all of the teacher's logits."""
    return objective.topk if objective.topk_of == "teacher" else None


def update_bytes(head: HeadSize, load: MicrobatchLoad, chunk_rows: int, objective: ObjectiveConfig) -> int:
    """Beyond the stage's saved activations, from the hidden states to their gradient."""
    rows = min(chunk_rows, load.policy_rows)
    is_chunked = load.policy_rows > chunk_rows
    queries = min(rows, load.query_rows * rows // max(1, load.policy_rows))
    logits, of_queries = head.logits(rows), head.logits(queries)
    indexed = logits if load.query_rows else 0  # gradient of the rows that the divergence picked
    blocks_of_queries = _FULL_BLOCKS if kept_entries(objective) is None else _TOPK_BLOCKS
    moments = [
        2 * logits + indexed + _LOGPROBS_BLOCKS * head.blocks(rows),
        logits + 2 * of_queries + blocks_of_queries * head.blocks(queries),
        logits + (1 + is_chunked) * head.weight_bytes,
    ]
    if objective.entropy_coef > 0:
        moments.append(2 * logits + indexed + _ENTROPY_BLOCKS * head.blocks(rows))
    row = head.hidden * head.element
    # Several chunks: the hidden states stay, and their gradient and the head's grow. One: its rows stay.
    held = 2 * load.num_tokens * row + head.weight_bytes if is_chunked else load.policy_rows * row
    return int(held + max(moments))


def teacher_bytes(head: HeadSize, load: MicrobatchLoad, chunk_rows: int, topk: int | None) -> int:
    """Of the teacher's logits while one microbatch's targets are made."""
    hidden = load.teacher_tokens * head.hidden * head.element
    if topk is None:  # the chunks are kept, then put into one tensor
        return hidden + 2 * head.logits(load.query_rows)
    rows = min(chunk_rows, load.query_rows)
    return int(hidden + head.logits(rows) + _CHOICE_BLOCKS * head.blocks(rows))


def reading_bytes(head: HeadSize, load: MicrobatchLoad, chunk_rows: int) -> int:
    """Of log-probabilities without gradient: reference and old policy."""
    rows = min(chunk_rows, load.policy_rows)
    hidden = load.num_tokens * head.hidden * head.element
    return int(hidden + head.logits(rows) + _LOGPROBS_BLOCKS * head.blocks(rows))


def target_bytes(head: HeadSize, load: MicrobatchLoad, topk: int | None) -> int:
    """Of all targets of a rank's minibatch: an id and a log-probability per entry and a tail, or whole logits."""
    rows = load.query_rows * load.num_microbatches
    return rows * (topk * (8 + _FP32) + _FP32) if topk is not None else head.logits(rows)
