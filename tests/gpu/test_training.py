"""Three updates over NCCL on every layout, and with the distributed optimizer: as on the CPU, by a fused Adam."""

from __future__ import annotations

from tests.distributed.test_training import (
    folder,
    single,
    test_the_distributed_optimizer_gives_the_weights_of_the_plain_one,
    test_three_steps_give_the_same_weights_on_every_layout,
)

__all__ = [
    "folder",
    "single",
    "test_the_distributed_optimizer_gives_the_weights_of_the_plain_one",
    "test_three_steps_give_the_same_weights_on_every_layout",
]
