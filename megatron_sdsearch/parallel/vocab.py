"""This rank's slice of the vocabulary, and collectives over the ranks of its tensor-parallel group.

Owns the index arithmetic (padding included) and the collectives that the losses use. Leaves the creation of groups to
``groups.py`` and every formula to ``loss/``. Torch only.
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
    """``shard_size`` columns from ``vocab_start_index`` on, of a vocabulary that is padded and cut into equal parts.

    Build it with ``whole`` or ``split``. The same arithmetic as megatron-core's ``VocabUtility``
    (``core/tensor_parallel/utils.py``), plus the knowledge of which columns are padding.

    Attributes:
        vocab_size: number of real vocabulary entries; padding sits behind them.
        padded_vocab_size: number of columns over all ranks.
        size: number of ranks that share the vocabulary.
        rank: this rank's index among them.
        group: the tensor-parallel process group; None for a vocabulary that is whole.

    Raises:
        ValueError: the sizes do not fit together.
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
        """The whole vocabulary on one rank, without any communication.

        Args:
            vocab_size: number of real entries.
            padded_vocab_size: number of columns, when the output layer has more; default ``vocab_size``.
        """
        return cls(vocab_size=vocab_size, padded_vocab_size=padded_vocab_size or vocab_size)

    @classmethod
    def split(cls, vocab_size: int, tp_group: dist.ProcessGroup, padded_vocab_size: int | None = None) -> Self:
        """This rank's part of a vocabulary that ``tp_group`` shares.

        Args:
            vocab_size: number of real entries.
            tp_group: the tensor-parallel group; the caller is a member.
            padded_vocab_size: columns over all ranks; default ``vocab_size``, which then has to divide evenly.

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
        """Number of local columns that are real vocabulary; they come first. May be 0 on the last ranks."""
        return min(max(self.vocab_size - self.vocab_start_index, 0), self.shard_size)

    def check_logits(self, logits: Tensor, name: str = "logits") -> None:
        """Refuse logits that are not floating point ``[rows, shard_size]``.

        Raises:
            ValueError: naming the argument ``name``, what it is and what it should be.
        """
        if logits.dim() != 2 or logits.shape[1] != self.shard_size:
            raise ValueError(f"{name} must be [rows, {self.shard_size}] on this rank, got {list(logits.shape)}")
        if not logits.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {logits.dtype}")

    def valid_columns(self, logits: Tensor) -> Tensor:
        """``logits`` without the padding: a view ``[rows, num_valid]``."""
        return logits[:, : self.num_valid]

    def local_columns(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Where global ids sit on this rank.

        Args:
            ids: int64, any shape.

        Returns:
            Local columns and a boolean mask of the ids that are real vocabulary of this rank, both of ids' shape. Ids
            of other ranks get column 0 as a placeholder that only keeps an index in range: read it through the mask,
            and *add zero* to it rather than write to it, or the rank's first column is overwritten.
        """
        columns = ids - self.vocab_start_index
        is_local = (columns >= 0) & (columns < self.num_valid)
        return torch.where(is_local, columns, 0), is_local

    def all_reduce(self, tensor: Tensor, op: Literal["sum", "max"]) -> Tensor:
        """Reduce over the ranks, in place; returns the same tensor.

        Does nothing for a vocabulary that is whole, nor for a tensor without elements: all ranks see the same rows, so
        all of them skip it.

        Raises:
            ValueError: ``tensor`` requires a gradient. Autograd does not know that ranks share this sum, and
                back-propagating through it gives a wrong gradient as soon as there are two of them.
        """
        if tensor.requires_grad:
            raise ValueError("all_reduce must not be back-propagated through; call it inside an autograd.Function")
        if self.size > 1 and tensor.numel():
            dist.all_reduce(tensor, op=_REDUCE_OPS[op], group=self._peers())
        return tensor

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """One tensor per rank, in rank order. Shape and dtype have to agree over the ranks; carries no gradient."""
        if self.size == 1 or not tensor.numel():
            return [tensor.detach()] * self.size
        gathered = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(gathered, tensor.detach().contiguous(), group=self._peers())
        return gathered

    def _peers(self) -> dist.ProcessGroup:
        if self.group is None:
            raise ValueError(f"a shard of {self.size} ranks without a process group cannot communicate")
        return self.group
