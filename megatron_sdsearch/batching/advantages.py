"""Group-relative advantages. Rewards and group classes are computed in ``data/scoring.py``."""

from __future__ import annotations

import statistics

from megatron_sdsearch.records import RolloutGroup

STD_EPSILON = 1e-6
"""Added to the standard deviation, as Search-R1 and AutoRefine do."""


def group_advantages(group: RolloutGroup, normalize_std: bool) -> list[float]:
    """Compute (reward - mean) / (unbiased standard deviation + 1e-6) over the group's trainable trajectories.

    Equal rewards are detected by comparing them, not by a standard deviation of 0: the deviation of equal floats may
    differ from 0, and dividing its rounding error by 1e-6 would train on noise.

    Args:
        group: one question's trajectories with their scores.
        normalize_std: False only subtracts the mean.

    Returns:
        One advantage per trajectory, in order; exactly 0 for trajectories that are not trained on, for a single
        trainable one, and for all of a group if its trainable rewards are equal.
    """
    pairs = list(zip(group.trajectories, group.scores, strict=True))
    rewards = [score.reward for trajectory, score in pairs if trajectory.is_trainable]
    if len(set(rewards)) < 2:
        return [0.0] * len(pairs)
    mean = statistics.fmean(rewards)
    scale = statistics.stdev(rewards) + STD_EPSILON if normalize_std else 1.0
    return [(score.reward - mean) / scale if trajectory.is_trainable else 0.0 for trajectory, score in pairs]
