"""The divergences per entry: the JSD, and the three that the paper's ablation puts in its place.

Every divergence here is a sum ``J = sum_e f(p_e, q_e)`` over entries ``e``, where ``p`` is the teacher and ``q`` the
student. An entry is a vocabulary id, or everything outside the top-k taken together. With ``h_e = q_e df/dq_e``,

    dJ/dz_i = h_i - q_i sum_e h_e        for an entry that is one id

so that once ``sum_e h_e`` is known everywhere, each rank finishes its own columns alone. ``h`` and not ``df/dq`` is
what the code carries: for the forward KL ``h = -p``, whereas ``df/dq = -p/q`` overflows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from megatron_sdsearch.loss.logprobs import times_log

DivergenceName = Literal["jsd", "forward_kl", "reverse_kl", "mse"]


@dataclass(frozen=True, slots=True)
class Divergence:
    """One divergence as ``f(p, q)`` per entry, together with ``h = q df/dq``.

    Attributes:
        name: which.
        beta: the teacher's weight in the JSD's mixture; inside (0, 1).
    """

    name: DivergenceName
    beta: float

    def __post_init__(self) -> None:
        check_choice("divergence", self.name, DivergenceName)
        if not 0 < self.beta < 1:
            raise ValueError(f"beta must lie inside (0, 1), got {self.beta}")

    def terms(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """``f`` and ``h`` of each entry. At -inf, no mass, it is the limit, not a NaN."""
        if self.name == "jsd":
            # log m is taken relative to the larger of p and q. Unlike logaddexp, this is exact at p = q, where the loss
            # and its gradient have to vanish, and keeps its relative precision near it.
            gap = log_q - log_p
            # Not where(.., 1 - beta, beta): of two Python numbers torch makes fp32, whatever the type of the others.
            weight_of_smaller = torch.full_like(gap, self.beta).masked_fill_(gap <= 0, 1 - self.beta)
            log_m_over_larger = torch.log1p(weight_of_smaller * torch.expm1(-gap.abs()))
            log_p_over_m = -gap.clamp(min=0) - log_m_over_larger
            log_q_over_m = gap.clamp(max=0) - log_m_over_larger
            gradient = (1 - self.beta) * times_log(log_q.exp(), log_q_over_m)
            return self.beta * times_log(log_p.exp(), log_p_over_m) + gradient, gradient
        p, q = log_p.exp(), log_q.exp()
        if self.name == "forward_kl":
            return times_log(p, log_p - log_q), -p
        if self.name == "reverse_kl":
            value = times_log(q, log_q - log_p)
            return value, value + q
        return (p - q).square(), 2 * q * (q - p)

    def summed(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """For entries that are all at hand: ``J`` [Q], and ``h_e - q_e sum h`` [Q, entries], its gradient by log q."""
        value, gradient = self.terms(log_p, log_q)
        return value.sum(-1), gradient - log_q.exp() * gradient.sum(-1, keepdim=True)


def check_choice(name: str, value: str, literal: Any) -> None:
    """Raise ValueError unless ``value`` is one of ``literal``'s."""
    if value not in get_args(literal):
        raise ValueError(f"{name} must be one of {', '.join(get_args(literal))}, got {value!r}")
