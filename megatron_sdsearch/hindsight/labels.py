"""The label that each attempt is shown with: how it ended, or in an ablation something else.

Owns outcomes and what takes their place. Which of them a block shows is ``block.py``'s.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from megatron_sdsearch.config import HindsightConfig
from megatron_sdsearch.records import RolloutGroup, TrajectoryId


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How one trainable trajectory ended: its answer's F1 is above ``hindsight.rho``, or not."""

    trajectory_id: TrajectoryId
    is_correct: bool


def outcomes_of(groups: Sequence[RolloutGroup], rho: float) -> list[Outcome]:
    """Of all trainable trajectories, group after group."""
    return [
        Outcome(trajectory_id=trajectory.trajectory_id, is_correct=score.f1 > rho)
        for group in groups
        for trajectory, score in zip(group.trajectories, group.scores, strict=True)
        if trajectory.is_trainable
    ]


def shown_labels(outcomes: Sequence[Outcome], config: HindsightConfig, *, seed: int) -> dict[TrajectoryId, bool]:
    """Whether each trajectory is shown as CORRECT.

    Args:
        outcomes: of whole groups, siblings side by side; for ``labels=shuffled`` of ALL groups of one step, whichever
            process rolled them out.
        config: ``labels`` decides.
        seed: of the run.
    """
    if config.labels == "shuffled":
        return _shuffled(outcomes, seed)
    if config.labels == "permuted":
        return dict(_permuted(outcomes, seed))
    return {outcome.trajectory_id: outcome.is_correct for outcome in outcomes}


def _shuffled(outcomes: Sequence[Outcome], seed: int) -> dict[TrajectoryId, bool]:
    """As many CORRECT labels as the step has right answers, dealt out without a look at any outcome.

    The trajectories whose hashes are lowest get them. A hash knows seed, step, question and sibling, so a label depends
    neither on the own outcome nor on the order of groups nor on the processes that rolled them out.
    """
    ids = (outcome.trajectory_id for outcome in outcomes)
    order = sorted(ids, key=lambda i: _digest(seed, f"{i.step}/{i.question_id}/{i.sibling}"))
    num_correct = sum(outcome.is_correct for outcome in outcomes)
    return {trajectory_id: place < num_correct for place, trajectory_id in enumerate(order)}


def _digest(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"hindsight/{seed}/{name}".encode()).digest()


def _permuted(outcomes: Sequence[Outcome], seed: int) -> Iterator[tuple[TrajectoryId, bool]]:
    """Each group's own labels in another order, by seed, step and question."""
    for (step, question_id), siblings in groupby(
        outcomes, key=lambda outcome: (outcome.trajectory_id.step, outcome.trajectory_id.question_id)
    ):
        group = list(siblings)
        key = int.from_bytes(_digest(seed, f"{step}/{question_id}"), "big")
        order = np.random.default_rng(key).permutation(len(group))
        for outcome, place in zip(group, order, strict=True):
            yield outcome.trajectory_id, group[place].is_correct
