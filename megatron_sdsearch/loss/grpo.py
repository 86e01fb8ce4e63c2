"""The policy-gradient loss: GRPO's clipped surrogate per token, with optional KL and entropy terms.

Also holds the correction for the mismatch between the engine's and the trainer's probabilities, and the diagnostics of
both. Advantages come from ``batching/advantages.py``. Denominators arrive as ``weights`` (``batching/packing.py``),
which therefore decide between a mean over tokens and a mean over sequences. Everything here is elementwise: the
communication has been done in ``logprobs.py``, and the caller sums over ranks.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Correction = Literal["none", "truncate", "mask"]

LARGE_GAP = 0.1
"""Nats; a probability then differs by about 10 % between engine and trainer (see ``rollout_gap_share``)."""

# e^20 = 4.9e8 is far beyond any meaningful ratio, and its square is still finite in fp32, where exp overflows at 88.7.
# Only the upper side is clamped: exp of a very negative number is a harmless 0, and clamping it would remove the k3
# term's gradient, which is 1 there and the only force that pulls a runaway policy back to the reference.
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
    """Compute GRPO's clipped policy loss, summed over N sampled tokens.

    With the ratio ``r = exp(policy - old)``, advantage ``A``, weight ``v`` and importance weight ``w`` of each token::

        loss = sum(v * (-w * min(r * A, clip(r, 1 - clip_low, 1 + clip_high) * A) + kl_coef * k3 - entropy_coef * H))

    ``w`` applies to the surrogate only, which is an expectation over the trainer's policy estimated from the engine's
    samples. The entropy ``H`` is taken over the whole distribution, so no sampled token enters it. The k3 term does
    depend on the sampled token and is not weighted on purpose: a token that ``w`` masks must still be pulled towards
    the reference. ``w`` does not change the denominators either, so a masked token counts as 0, and a batch gives the
    same loss however it is split into microbatches and ranks.

    Source: GRPO, arXiv 2402.03300, section 4.1, with the separate clip bounds of DAPO, arXiv 2503.14476; the k3
    estimator ``exp(d) - d - 1``, ``d = ref - policy``, of J. Schulman, "Approximating KL divergence" (2020).

    Args:
        policy_logprobs: [N] nats, with gradient.
        old_logprobs: [N] nats, of the trainer's policy before the step's first update; a constant.
        advantages: [N]; a constant.
        weights: [N], at least 0. They sum to 1 over all tokens of the global minibatch, so to less than 1 on one rank.
        clip_low: ``r`` is clipped below at ``1 - clip_low``; in [0, 1).
        clip_high: ``r`` is clipped above at ``1 + clip_high``; at least 0.
        ref_logprobs: [N] nats, of the reference policy; a constant.
        kl_coef: weight of the k3 term; requires ``ref_logprobs`` unless 0.
        entropy: [N] nats; carries a gradient if the bonus is to have an effect.
        entropy_coef: weight of the entropy bonus; requires ``entropy`` unless 0.
        importance_weights: [N], at least 0, a constant; None means 1 everywhere. See ``importance_weights``.

    Returns:
        The loss, a 0-dim tensor with gradient, and 0-dim diagnostics without gradient. All are sums over this rank's
        tokens, to be summed over ranks; because the weights sum to 1 over the global minibatch, the totals are weighted
        means. Computed in fp32, or in float64 if ``policy_logprobs`` is. N = 0 gives zeros that still have a gradient
        path. The diagnostics:

        - ``policy_loss``: the clipped surrogate, negated, importance weights included.
        - ``kl``: k3 estimate of KL(policy || reference), nats; 0 without a reference.
        - ``entropy``: mean entropy of the policy, nats; 0 without entropies.
        - ``clip_fraction``: share of tokens that get no surrogate gradient because they are clipped.
        - ``old_kl``: k3 estimate of KL(old || policy), nats: how far this update has moved the policy.

    Raises:
        ValueError: a shape differs from [N], or an option is out of range or lacks its input.

    Examples:
        Two tokens of one trajectory with advantage 1; the second one's probability has grown by half, beyond 1.2:

        >>> old = torch.tensor([-1.0, -1.0])
        >>> policy = (old + torch.tensor([1.0, 1.5]).log()).requires_grad_()
        >>> loss, diagnostics = grpo_loss(policy, old, torch.ones(2), torch.full((2,), 0.5))
        >>> round(loss.item(), 4)  # -(0.5 * 1.0 + 0.5 * 1.2)
        -1.1
        >>> diagnostics["clip_fraction"].item()
        0.5
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
        # Broadcasting would silently turn [N] * [N, 1] into a loss over N^2 pairs.
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
    # A token beyond the limit gets no gradient, where it would otherwise drown out all others.
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
    """Compute bounded importance weights from the engine's policy to the trainer's.

    The two hold the same weights and still give different probabilities: their kernels, precisions and batches differ.
    With ``r = exp(old - rollout)``, ``truncate`` gives ``min(r, cap)``, truncated importance sampling (Yao et al.,
    "Your efficient RL framework secretly brings you off-policy RL training", 2025): every token is kept, at the cost of
    a bias. ``mask`` gives ``r`` inside ``[1 / cap, cap]`` and 0 outside (IcePop, Ling Team 2025): so large a
    disagreement is more likely a fault than a rare event.

    Args:
        old_logprobs: [N] nats, of the trainer before the step's first update; a constant.
        rollout_logprobs: [N] nats, of the engine.
        correction: which weights.
        cap: above 1.

    Returns:
        [N] weights without gradient, or None for ``none``; and [N] bool, True where a token was truncated or masked.
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
    """Measure how far the engine's log-probabilities are from the trainer's, over this microbatch's tokens.

    Args:
        old_logprobs: [N] nats, of the trainer.
        rollout_logprobs: [N] nats, of the engine.
        weights: [N]; they sum to 1 over the global minibatch.

    Returns:
        Parts of global weighted means, to be summed over microbatches and ranks: ``rollout_gap`` (|old - rollout|),
        ``rollout_gap_share`` (tokens beyond ``LARGE_GAP``) and ``rollout_k3`` (k3 estimate of KL(engine || trainer));
        and ``rollout_gap_max``, to be combined by maximum.
    """
    gap = old_logprobs.detach() - rollout_logprobs
    return {
        "rollout_gap": (weights * gap.abs()).sum(),
        "rollout_gap_max": gap.abs().max() if len(gap) else gap.new_zeros(()),
        "rollout_gap_share": (weights * (gap.abs() > LARGE_GAP)).sum(),
        "rollout_k3": (weights * k3(gap)).sum(),
    }


def k3(log_ratio: Tensor) -> Tensor:
    """Estimate KL(sampled || other) by ``exp(d) - d - 1``, ``d = log(other / sampled)``: unbiased and at least 0."""
    limited = log_ratio.clamp(max=_MAX_LOG_RATIO)
    return torch.expm1(limited) - limited
