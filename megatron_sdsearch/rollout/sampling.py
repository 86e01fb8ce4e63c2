"""Samples the next token of many rows at once, each row from its own random stream.

Random numbers are keyed by (seed, trajectory) and indexed by absolute position, and a row's sample depends on that row
only, not on the rest of the batch. The model's logits however change by a few float ulps with the shape of the batch: a
sample changes only if a random number falls within that distance of a boundary.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from megatron_sdsearch.records import FloatArray, IntArray, TrajectoryId


def uniforms(seed: int, trajectory_id: TrajectoryId, start: int, stop: int) -> FloatArray:
    """Return [stop - start] numbers in [0, 1) for the tokens at absolute positions ``start`` to ``stop``.

    Philox is counter-based, and numpy guarantees that its raw 64-bit output never changes.
    """
    name = f"{seed}\0{trajectory_id.step}\0{trajectory_id.sibling}\0{trajectory_id.question_id}"
    key = np.frombuffer(hashlib.blake2b(name.encode(), digest_size=16).digest(), dtype="<u8")
    raw = np.asarray(np.random.Philox(key=key).random_raw(stop))[start:]
    return np.asarray((raw >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def sample_tokens(
    logits: Tensor, temperature: FloatArray, top_p: FloatArray, uniform: FloatArray
) -> tuple[IntArray, FloatArray]:
    """Sample one id per row by inverse CDF in float64.

    Args:
        logits: [n, V], any float type; not modified.
        temperature: [n], 0 is greedy.
        top_p: [n] in (0, 1]; keeps the smallest set of most probable ids with at least this mass.
        uniform: [n] in [0, 1); unused by greedy rows.

    Returns:
        ids [n], and their log-probabilities [n] in nats at the row's temperature before top-p (greedy rows: at 1).
    """
    is_greedy = temperature == 0.0
    scaled = logits.float()
    if not np.all(is_greedy | (temperature == 1.0)):
        divisor = torch.from_numpy(np.where(is_greedy, 1.0, temperature)).to(scaled)
        scaled = scaled / divisor[:, None]
    logprobs = torch.log_softmax(scaled, dim=-1)
    if is_greedy.all():
        ids = scaled.argmax(dim=-1)
    else:
        ids = _inverse_cdf(_nucleus(logprobs.exp(), top_p), uniform)
        if is_greedy.any():
            ids = torch.where(torch.from_numpy(is_greedy).to(ids.device), scaled.argmax(dim=-1), ids)
    chosen = logprobs.gather(1, ids[:, None])[:, 0]
    return ids.cpu().numpy(), chosen.cpu().numpy().astype(np.float64)


def _nucleus(probs: Tensor, top_p: FloatArray) -> Tensor:
    """Return [n, V] probabilities, 0 outside the nucleus and not normalised again."""
    if np.all(top_p >= 1.0):
        return probs
    ordered, order = probs.sort(dim=-1, descending=True, stable=True)
    mass_before = ordered.cumsum(dim=-1, dtype=torch.float64) - ordered
    # A bound above 1 keeps every id of rows with top_p = 1, regardless of rounding in their sum.
    bound = torch.from_numpy(np.where(top_p >= 1.0, 2.0, top_p)).to(probs.device)
    return torch.zeros_like(probs).scatter_(1, order, ordered.masked_fill(mass_before >= bound[:, None], 0.0))


def _inverse_cdf(weights: Tensor, uniform: FloatArray) -> Tensor:
    """Return the [n] first ids with cumulative weight above ``uniform`` times the row's total, never of weight 0."""
    cdf = weights.cumsum(dim=-1, dtype=torch.float64)
    total = cdf[:, -1:]
    target = torch.from_numpy(uniform).to(total.device)[:, None] * total
    target = torch.minimum(
        target, torch.nextafter(total, torch.zeros_like(total))
    )  # the product may round up to the total
    return torch.searchsorted(cdf, target, right=True)[:, 0]
