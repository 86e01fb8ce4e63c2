"""The policy-gradient loss: GRPO's clipped surrogate, token by token, with an optional KL and entropy term.

Owns the per-token formula, its correction for an engine that samples from slightly other probabilities than the
trainer's, and the diagnostics of both. Leaves to others: advantages (``batching/advantages.py``), the
denominators, which arrive as ``weights`` and so decide between a mean over tokens and a mean over sequences
(``objective.py``), and the sum over ranks. Elementwise torch, no communication: ``logprobs.py`` has already done it.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Correction = Literal["none", "truncate", "mask"]

LARGE_GAP = 0.1
"""Nats: a token's probability differs by about a tenth between engine and trainer (``rollout_gap_share``)."""

# e^20 = 4.9e8: far beyond any honest ratio, and its square is still finite in fp32, where exp overflows from 88.7 on.
# Only the upper side is clamped: exp of a very negative number is a harmless 0, and clamping there would cut the k3
# term's gradient, which is 1 and the only thing that brings a runaway policy back to the reference.
_MAX_LOG_RATIO = 20.0


def grpo_loss(  # noqa: PLR0913 (each term of the loss is optional)
    policy_logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    importance_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum over tokens of ``weight * (-w min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + c_kl k3 - c_ent H)``.

    The importance weight w stands at the surrogate alone: that is an expectation over the trainer's policy which the
    engine sampled, and w makes good for it. Entropy, and the divergence of ``objective.py``, are taken over the whole
    distribution at a position; no sampled token enters them. The k3 term does hold the sampled token and is left alone
    all the same: a token that w masks has gone astray, and must still be pulled to the reference.

    w changes no denominator: ``weights`` stay what they were, so that a masked token counts as 0, and the same batch
    gives the same loss however it is cut into microbatches and ranks.

    Args:
        policy_logprobs: [N] nats, with gradient.
        old_logprobs: [N] nats, of the trainer's policy before the update; a constant.
        advantages: [N]; a constant.
        weights: [N], at least 0; they sum to 1 over all tokens of the global minibatch, hence to less than 1 here.
        clip_low: the ratio ``r`` is clipped below at ``1 - clip_low``; in [0, 1).
        clip_high: and above at ``1 + clip_high``; at least 0.
        ref_logprobs: [N] nats, of the reference policy; a constant.
        kl_coef: weight of the k3 term; needs ``ref_logprobs`` unless 0.
        entropy: [N] nats, with gradient if it is to have an effect.
        entropy_coef: weight of the entropy bonus; needs ``entropy`` unless 0.
        importance_weights: [N], at least 0, a constant; None is 1 everywhere (``importance_weights``).

    Returns:
        The loss ``policy_loss + kl_coef * kl - entropy_coef * entropy``, a 0-dim tensor with gradient, and 0-dim
        diagnostics without one. All are sums over this rank's tokens, to be summed over ranks; since the weights sum to
        1 over the global minibatch, those sums are weighted means there. In fp32, or float64 if the policy's
        log-probabilities are. N = 0 gives zeros, with a gradient path. The diagnostics:

        - ``policy_loss``: the clipped surrogate, negated; with importance weights where there are any.
        - ``kl``: k3 estimate of KL(policy || reference), nats; 0 without a reference.
        - ``entropy``: mean entropy of the policy, nats; 0 without entropies.
        - ``clip_fraction``: share of tokens whose gradient the clip has cut.
        - ``old_kl``: k3 estimate of KL(old || policy), nats: how far this update has moved the policy.

    Raises:
        ValueError: a shape differs from [N], or an option is out of range or lacks its input.

    Source: GRPO, arXiv 2402.03300, section 4.1, with the separate clip bounds of DAPO, arXiv 2503.14476; the k3
    estimator ``exp(d) - d - 1``, ``d = ref - policy``, of J. Schulman, "Approximating KL divergence" (2020).
    """
    if policy_logprobs.dim() != 1:
        raise ValueError(f"policy_logprobs must be [N], got {list(policy_logprobs.shape)}")
    others = {
        "old_logprobs": old_logprobs,
        "advantages": advantages,
        "weights": weights,
        "ref_logprobs": ref_logprobs,
        "entropy": entropy,
        "importance_weights": importance_weights,
    }
    for name, tensor in others.items():
        # Broadcasting would turn [N] * [N, 1] into a loss over N^2 pairs without a word.
        if tensor is not None and tensor.shape != policy_logprobs.shape:
            raise ValueError(f"{name} must be {list(policy_logprobs.shape)}, got {list(tensor.shape)}")
    if not 0 <= clip_low < 1:
        raise ValueError(f"clip_low must be in [0, 1), got {clip_low}")
    if not clip_high >= 0:
        raise ValueError(f"clip_high must be at least 0, got {clip_high}")
    for name, coefficient, needed in (("kl_coef", kl_coef, "ref_logprobs"), ("entropy_coef", entropy_coef, "entropy")):
        if coefficient != 0 and others[needed] is None:
            raise ValueError(f"{name} is {coefficient}, which needs {needed}")

    policy = policy_logprobs.to(torch.promote_types(policy_logprobs.dtype, torch.float32))
    log_ratio = policy - old_logprobs.detach()
    # A token beyond the limit gets no gradient rather than one that drowns all others.
    ratio = log_ratio.clamp(max=_MAX_LOG_RATIO).exp()
    surrogate = ratio * advantages
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages

    surrogate_weights = weights if importance_weights is None else weights * importance_weights.detach()
    policy_loss = -(surrogate_weights * torch.minimum(surrogate, clipped)).sum()
    kl = (weights * k3(ref_logprobs.detach() - policy)).sum() if ref_logprobs is not None else policy.new_zeros(())
    mean_entropy = (weights * entropy).sum() if entropy is not None else policy.new_zeros(())
    loss = policy_loss + kl_coef * kl - entropy_coef * mean_entropy
    return loss, {
        "policy_loss": policy_loss.detach(),
        "kl": kl.detach(),
        "entropy": mean_entropy.detach(),
        "clip_fraction": (weights * (clipped < surrogate)).sum(),
        "old_kl": (weights * k3(log_ratio.detach())).sum(),
    }


def importance_weights(
    old_logprobs: Tensor, rollout_logprobs: Tensor, correction: Correction, cap: float
) -> tuple[Tensor | None, Tensor]:
    """Weights that turn what the engine sampled into a sample of the trainer's policy, bounded.

    With ``r = exp(old - rollout)``: ``truncate`` gives ``min(r, cap)``, truncated importance sampling (Yao et al.,
    "Your efficient RL framework secretly brings you off-policy RL training", 2025): no token is lost, and what the cap
    cuts is its bias. ``mask`` gives ``r`` inside ``[1 / cap, cap]`` and 0 outside (as IcePop does, Ling Team 2025):
    where the two disagree that much, a fault is likelier than a rare event.

    Engine and trainer hold the same weights and still disagree: other kernels, another precision, another batch.

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


def k3(log_ratio: Tensor) -> Tensor:
    """``exp(d) - d - 1`` with d = log(other / sampled): at least 0, unbiased for KL(sampled || other)."""
    limited = log_ratio.clamp(max=_MAX_LOG_RATIO)
    return torch.expm1(limited) - limited
