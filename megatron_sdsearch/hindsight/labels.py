"""The label of each attempt in a hindsight block: its outcome, or in ablations a shuffled or permuted one.

``block.py`` chooses the attempts that a block shows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

import numpy as np

from megatron_sdsearch.records import RolloutGroup, TrajectoryId


def shown_labels(
    groups: Sequence[RolloutGroup], labels: Literal["outcome", "none", "shuffled", "permuted"], *, seed: int
) -> dict[TrajectoryId, bool]:
    """Choose the label of each trainable trajectory: True is shown as CORRECT.

    ``shuffled``: the trajectories with the lowest hashes are labelled CORRECT, as many as the step has right answers. A
    hash depends on seed, step, question and sibling, so a label depends neither on the trajectory's own outcome nor on
    the order of groups or the processes that rolled them out. ``permuted``: the labels of each group in another order.

    Args:
        groups: ALL groups of one step, from all processes.
        labels: the setting ``hindsight.labels``; ``outcome`` and ``none`` give the true outcomes.
        seed: of the run.
    """
    by_group = [
        {t.trajectory_id: score.is_correct for t, score in zip(g.trajectories, g.scores, strict=True) if t.is_trainable}
        for g in groups
    ]
    shown = {trajectory_id: label for outcomes in by_group for trajectory_id, label in outcomes.items()}
    if labels == "shuffled":
        order = sorted(shown, key=lambda t: _digest(f"{seed}/{t.step}/{t.question_id}/{t.sibling}"))
        num_correct = sum(shown.values())
        return {trajectory_id: rank < num_correct for rank, trajectory_id in enumerate(order)}
    if labels == "permuted":
        for outcomes in by_group:
            ids, own = list(outcomes), list(outcomes.values())
            if ids:
                key = int.from_bytes(_digest(f"{seed}/{ids[0].step}/{ids[0].question_id}"), "big")
                dealt = np.random.default_rng(key).permutation(len(ids))
                shown |= {trajectory_id: own[index] for trajectory_id, index in zip(ids, dealt, strict=True)}
    return shown


def _digest(key: str) -> bytes:
    return hashlib.sha256(f"hindsight/{key}".encode()).digest()
