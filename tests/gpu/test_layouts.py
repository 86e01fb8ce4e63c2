"""Every layout's loss and gradient over NCCL, in float32 with torch's layers: the very same cases as on the CPU."""

from __future__ import annotations

from tests.distributed.test_layouts import folder, test_every_layout_gives_the_oracle_s_loss_and_gradient

__all__ = ["folder", "test_every_layout_gives_the_oracle_s_loss_and_gradient"]
