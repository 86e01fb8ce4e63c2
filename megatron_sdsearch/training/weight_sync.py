"""Publishing the policy's weights to the rollout engine: after it, the engine samples from exactly that version."""

from __future__ import annotations

from megatron_sdsearch.rollout.embedded import EmbeddedEngine
from megatron_sdsearch.training.policy import Policy


def publish(policy: Policy, engine: EmbeddedEngine, *, version: int) -> None:
    """Copy whole tensors into this rank's embedded engine, one at a time. A collective over all ranks."""
    engine.load_weights(policy.hf_weights(), version)
