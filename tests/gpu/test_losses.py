"""The sharded losses over NCCL, against the oracle of tests/distributed: the very same cases."""

from __future__ import annotations

from tests.distributed.test_vocab_parallel import launched, test_sharded_loss_equals_the_oracle

__all__ = ["launched", "test_sharded_loss_equals_the_oracle"]
