"""This rank's slice of the vocabulary, and collectives over its tensor-parallel group.

Index arithmetic (padding included) and the collectives that the losses use. Needs torch only: groups are created in
``groups.py``, formulas are in ``loss/``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

import torch
import torch.distributed as dist
from torch import Tensor

_REDUCE_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabShard:
    """One rank's columns of a vocabulary that is padded and split into equal parts.

    Logits of Q rows are then [Q, V/tp] = [Q, shard_size] on each rank. Create it with ``whole`` on one rank, or with
    ``split`` for a tensor-parallel group. The arithmetic is that of megatron-core's ``VocabUtility``
    (``core/tensor_parallel/utils.py``); in addition, padding columns are distinguished from real ones.

    Attributes:
        vocab_size: number of real vocabulary entries; padding follows them.
        padded_vocab_size: number of columns over all ranks.
        size: number of ranks that share the vocabulary.
        rank: this rank's index among them.
        group: the tensor-parallel process group; None for a vocabulary on one rank.

    Raises:
        ValueError: the sizes do not fit together.

    Examples:
        A vocabulary of 10, padded to 12 and split over 4 ranks. The last one holds id 9 and two padding columns:

        >>> shard = VocabShard(vocab_size=10, padded_vocab_size=12, size=4, rank=3)
        >>> shard.shard_size, shard.vocab_start_index, shard.num_valid
        (3, 9, 1)
        >>> columns, is_local = shard.local_columns(torch.tensor([8, 9]))
        >>> columns.tolist(), is_local.tolist()
        ([0, 0], [False, True])
    """

    vocab_size: int
    padded_vocab_size: int
    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        if self.vocab_size < 1:
            raise ValueError(f"vocab_size must be at least 1, got {self.vocab_size}")
        if self.padded_vocab_size < self.vocab_size:
            raise ValueError(f"padded_vocab_size {self.padded_vocab_size} is below vocab_size {self.vocab_size}")
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank {self.rank} is not among {self.size} ranks (not a member of the group?)")
        if self.padded_vocab_size % self.size:
            raise ValueError(
                f"padded_vocab_size {self.padded_vocab_size} does not divide by the group's {self.size} ranks; "
                "pass the padded size that the model's output layer was built with"
            )

    @classmethod
    def whole(cls, vocab_size: int, padded_vocab_size: int | None = None) -> Self:
        """Create the shard of a vocabulary that is whole on one rank: nothing is communicated.

        Args:
            vocab_size: number of real entries.
            padded_vocab_size: number of columns of the output layer; default ``vocab_size``.
        """
        return cls(vocab_size=vocab_size, padded_vocab_size=padded_vocab_size or vocab_size)

    @classmethod
    def split(cls, vocab_size: int, tp_group: dist.ProcessGroup, padded_vocab_size: int | None = None) -> Self:
        """Create this rank's shard of a vocabulary that is split over ``tp_group``.

        Args:
            vocab_size: number of real entries.
            tp_group: the tensor-parallel group; this process must be a member.
            padded_vocab_size: number of columns over all ranks; default ``vocab_size``, which must then divide evenly.

        Raises:
            ValueError: the padded size is too small or does not divide by the group's size.
        """
        return cls(
            vocab_size=vocab_size,
            padded_vocab_size=padded_vocab_size or vocab_size,
            size=dist.get_world_size(tp_group),
            rank=dist.get_rank(tp_group),
            group=tp_group,
        )

    @property
    def shard_size(self) -> int:
        """Number of local columns, padding included; the same on every rank."""
        return self.padded_vocab_size // self.size

    @property
    def vocab_start_index(self) -> int:
        """Global id of the first local column."""
        return self.rank * self.shard_size

    @property
    def num_valid(self) -> int:
        """Number of local columns that are not padding; they come first. May be 0 on the last ranks."""
        return min(max(self.vocab_size - self.vocab_start_index, 0), self.shard_size)

    def check_logits(self, logits: Tensor, name: str = "logits") -> None:
        """Raise ValueError, naming the argument ``name``, unless ``logits`` is a float ``[rows, shard_size]``."""
        if logits.dim() != 2 or logits.shape[1] != self.shard_size:
            raise ValueError(f"{name} must be [rows, {self.shard_size}] on this rank, got {list(logits.shape)}")
        if not logits.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {logits.dtype}")

    def valid_columns(self, logits: Tensor) -> Tensor:
        """Return ``logits`` without the padding columns: a view ``[rows, num_valid]``."""
        return logits[:, : self.num_valid]

    def local_columns(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Map global ids to columns of this rank.

        Args:
            ids: int64, any shape.

        Returns:
            Local columns, and a boolean mask of the ids that this rank holds, both of the shape of ``ids``. Other ids
            get column 0 as a placeholder that keeps the index in range: apply the mask when reading, and *add zero*
            there rather than writing, or the rank's first column is overwritten.
        """
        columns = ids - self.vocab_start_index
        is_local = (columns >= 0) & (columns < self.num_valid)
        return torch.where(is_local, columns, 0), is_local

    def all_reduce(self, tensor: Tensor, op: Literal["sum", "max"]) -> Tensor:
        """Reduce ``tensor`` over the ranks, in place, and return it.

        Does nothing on a single rank, nor for a tensor without elements: all ranks have the same rows, so all skip it.

        Raises:
            ValueError: ``tensor`` requires a gradient. Autograd treats the other ranks' parts of the sum as constants,
                so back-propagating through it gives a wrong gradient on two or more ranks.
        """
        if tensor.requires_grad:
            raise ValueError("all_reduce must not be back-propagated through; call it inside an autograd.Function")
        if self.size > 1 and tensor.numel():
            dist.all_reduce(tensor, op=_REDUCE_OPS[op], group=self._peers())
        return tensor

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Gather one tensor per rank, in rank order, without gradient. All ranks must pass the same shape and dtype."""
        if self.size == 1 or not tensor.numel():
            return [tensor.detach()] * self.size
        gathered = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(gathered, tensor.detach().contiguous(), group=self._peers())
        return gathered

    def _peers(self) -> dist.ProcessGroup:
        if self.group is None:
            raise ValueError(f"a shard of {self.size} ranks without a process group cannot communicate")
        return self.group
