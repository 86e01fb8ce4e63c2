"""How far the engine that sampled is from the trainer, and what the surrogate does about it.

Engine and trainer hold the same weights and still disagree: other kernels, another precision, another batch. Owns the
per-token ratio between them, its statistics and its use as a weight; where the weight goes is ``grpo.py``'s.
Elementwise torch, no communication.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from megatron_sdsearch.loss.grpo import k3

Correction = Literal["none", "truncate", "mask"]

LARGE_GAP = 0.1
"""Nats: a token's probability differs by about a tenth between engine and trainer (``rollout_gap_share``)."""


def importance_weights(
    old_logprobs: Tensor, rollout_logprobs: Tensor, correction: Correction, cap: float
) -> tuple[Tensor | None, Tensor]:
    """Weights that turn what the engine sampled into a sample of the trainer's policy, bounded.

    With ``r = exp(old - rollout)``: ``truncate`` gives ``min(r, cap)``, truncated importance sampling (Yao et al.,
    "Your efficient RL framework secretly brings you off-policy RL training", 2025): no token is lost, and what the cap
    cuts is its bias. ``mask`` gives ``r`` inside ``[1 / cap, cap]`` and 0 outside (as IcePop does, Ling Team 2025):
    where the two disagree that much, a fault is likelier than a rare event.

    Args:
        old_logprobs: [N] nats, of the trainer before the step's first update; a constant.
        rollout_logprobs: [N] nats, of the engine.
        correction: which weights.
        cap: more than 1.

    Returns:
        [N] weights without gradient, None for ``none``; and [N] whether a token was truncated or masked.
    """
    log_ratio = old_logprobs.detach() - rollout_logprobs
    if correction == "none":
        return None, torch.zeros_like(log_ratio, dtype=torch.bool)
    ratio, limit = log_ratio.exp(), math.log(cap)
    if correction == "truncate":
        return ratio.clamp(max=cap), log_ratio > limit
    is_outside = log_ratio.abs() > limit
    return ratio.masked_fill(is_outside, 0.0), is_outside


def agreement(old_logprobs: Tensor, rollout_logprobs: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Statistics of ``old - rollout`` (nats) over this microbatch's tokens.

    Args:
        old_logprobs: [N] of the trainer.
        rollout_logprobs: [N] of the engine.
        weights: [N]; sum to 1 over the global minibatch.

    Returns:
        Parts of global weighted means, to be summed over microbatches and ranks: ``rollout_gap`` (its absolute value),
        ``rollout_gap_share`` (tokens beyond ``LARGE_GAP``) and ``rollout_k3`` (k3 estimate of KL(engine || trainer));
        and ``rollout_gap_max``, of which the maximum is to be taken.
    """
    gap = old_logprobs.detach() - rollout_logprobs
    return {
        "rollout_gap": (weights * gap.abs()).sum(),
        "rollout_gap_max": gap.abs().max() if len(gap) else gap.new_zeros(()),
        "rollout_gap_share": (weights * (gap.abs() > LARGE_GAP)).sum(),
        "rollout_k3": (weights * k3(gap)).sum(),
    }
