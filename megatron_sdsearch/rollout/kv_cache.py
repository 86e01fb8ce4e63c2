"""Keys and values of many trajectories in one block of memory: a slot for each, with its own length.

``SlotCache`` is the ``past_key_values`` of a plain transformers model. Nothing is concatenated or moved as text grows:
a forward pass writes at the rows and positions set by ``point_at`` and reads a slice up to the longest of them. Content
beyond a slot's length is stale; the caller masks it. ``embedded.py`` schedules the rows.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Cache

from megatron_sdsearch.records import TrajectoryId

_GRANULE = 64  # tokens; capacity is rounded up to it


class SlotCache(Cache):
    """A key-value cache with rows that start, grow and end independently.

    Attributes:
        token_ids: per slot, the ids of the keys and values in it.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.token_ids: list[list[int]] = []
        self._keys: list[Tensor] = []  # per layer [slots, heads, capacity, head_dim]
        self._values: list[Tensor] = []
        self._capacity = 0
        self._slot_of: dict[TrajectoryId, int] = {}
        self._free: list[int] = []
        self._target: tuple[Tensor | slice, Tensor, Tensor, int] | None = None

    def acquire(self, trajectory_id: TrajectoryId) -> int:
        """Return the trajectory's slot; a new one gets the lowest free slot, so that used slots stay close together."""
        if trajectory_id not in self._slot_of:
            if not self._free:
                self._free.append(len(self.token_ids))
                self.token_ids.append([])
            self._slot_of[trajectory_id] = heapq.heappop(self._free)
        return self._slot_of[trajectory_id]

    def release(self, trajectory_id: TrajectoryId) -> None:
        """Free the trajectory's slot, if it has one."""
        slot = self._slot_of.pop(trajectory_id, None)
        if slot is not None:
            self.token_ids[slot] = []
            heapq.heappush(self._free, slot)

    def keep_prefix(self, slot: int, prompt_ids: Sequence[int]) -> int:
        """Drop what does not match ``prompt_ids``, and the last id in any case; return the length kept.

        The last id is always recomputed, because the next token is sampled from its logits.
        """
        held = self.token_ids[slot]
        limit = min(len(held), len(prompt_ids) - 1)
        kept = limit
        if held[:limit] != list(prompt_ids[:limit]):
            kept = next(i for i in range(limit) if held[i] != prompt_ids[i])
        del held[kept:]
        return kept

    def swap(self, one: int, other: int) -> None:
        """Exchange the contents and owners of two slots."""
        for block in (*self._keys, *self._values):
            block[[one, other]] = block[[other, one]]
        self.token_ids[one], self.token_ids[other] = self.token_ids[other], self.token_ids[one]
        self._slot_of = {
            owner: other if slot == one else one if slot == other else slot for owner, slot in self._slot_of.items()
        }
        self._free = [other if slot == one else one if slot == other else slot for slot in self._free]
        heapq.heapify(self._free)

    def copy_prefix(self, source: int, targets: Sequence[int], length: int) -> None:
        """Copy the first ``length`` keys and values of ``source`` to ``targets``."""
        for block in (*self._keys, *self._values):
            block[targets, :, :length] = block[source, :, :length]
        for target in targets:
            self.token_ids[target] = self.token_ids[source][:length]

    def point_at(self, slots: Tensor | slice, rows: Tensor, positions: Tensor) -> int:
        """Set where the next forward pass writes, and make room for it.

        Args:
            slots: rows that attention reads; a slice reads in place, an index tensor copies.
            rows: [n, 1] the same rows as an index tensor.
            positions: [n, m] of the new tokens.

        Returns:
            The number of positions that attention sees.
        """
        visible = int(positions.max()) + 1
        if visible > self._capacity:
            self._capacity = -(-max(visible, 2 * self._capacity) // _GRANULE) * _GRANULE
        self._target = (slots, rows, positions, visible)
        return visible

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Store a layer's new [n, heads, m, head_dim] keys and values; return [n, heads, visible, head_dim] of each.

        Called by each attention layer.

        Raises:
            RuntimeError: ``point_at`` was not called before.
        """
        if self._target is None:
            raise RuntimeError("call point_at before the forward pass")
        slots, rows, positions, visible = self._target
        if layer_idx == len(self._keys):
            self._keys.append(key_states.new_zeros((0, key_states.shape[1], 0, key_states.shape[3])))
            self._values.append(value_states.new_zeros((0, value_states.shape[1], 0, value_states.shape[3])))
        keys = self._keys[layer_idx] = self._grown(self._keys[layer_idx])
        values = self._values[layer_idx] = self._grown(self._values[layer_idx])
        keys[rows, :, positions] = key_states.transpose(1, 2)
        values[rows, :, positions] = value_states.transpose(1, 2)
        return keys[slots, :, :visible], values[slots, :, :visible]

    def _grown(self, block: Tensor) -> Tensor:
        num_slots, num_heads, capacity, head_dim = block.shape
        if num_slots >= len(self.token_ids) and capacity >= self._capacity:
            return block
        # Zeros, not empty memory: a masked NaN times an attention weight of 0 is still NaN.
        shape = (max(num_slots, len(self.token_ids)), num_heads, max(capacity, self._capacity), head_dim)
        grown = torch.zeros(shape, dtype=block.dtype, device=block.device)
        grown[:num_slots, :, :capacity] = block
        return grown
