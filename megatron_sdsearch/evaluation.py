"""What a set of rollouts amounts to: answer quality, searches, hits and how trajectories ended.

Owns the averages. Every mean is over trajectories (micro), so that data sets count by their size in the overall row.
Single scores are ``data/scoring.py``'s.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_sdsearch.records import Question, RolloutGroup, Score, Trajectory, TrajectoryStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """Means over the trajectories of one set; None where there is nothing to average.

    Attributes:
        num_questions: groups.
        num_trajectories: over all groups.
        em: exact match in [0, 1].
        f1: token F1 in [0, 1].
        hit: share of trajectories that were shown their question's last gold passage (the one that holds the answer),
            among questions that know it.
        searches_per_question: searches asked for, per trajectory, whether or not they found anything.
        status_shares: share of trajectories by how they ended; the shares sum to 1, absent ones are 0.
        mean_response_tokens: sampled tokens per trajectory, observations not counted.
    """

    num_questions: int
    num_trajectories: int
    em: float | None
    f1: float | None
    hit: float | None
    searches_per_question: float | None
    status_shares: dict[TrajectoryStatus, float]
    mean_response_tokens: float | None

    def to_dict(self) -> dict[str, Any]:
        """For JSON: plain values, unknown ones left out."""
        values = {name: getattr(self, name) for name in self.__slots__ if name != "status_shares"}
        known = {name: value for name, value in values.items() if value is not None}
        return known | {"status_shares": {status.value: share for status, share in self.status_shares.items()}}


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSummary:
    """Metrics over everything, and per data set in alphabetical order."""

    overall: Metrics
    by_dataset: dict[str, Metrics]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        by_dataset = {name: metrics.to_dict() for name, metrics in self.by_dataset.items()}
        return {"overall": self.overall.to_dict(), "by_dataset": by_dataset}


def summarize(groups: Sequence[RolloutGroup]) -> EvaluationSummary:
    """Average over all groups, and over those of each data set. No groups give counts of 0 and no means."""
    names = sorted({group.question.dataset for group in groups})
    by_dataset = {name: _metrics([g for g in groups if g.question.dataset == name]) for name in names}
    return EvaluationSummary(overall=_metrics(groups), by_dataset=by_dataset)


def _metrics(groups: Sequence[RolloutGroup]) -> Metrics:
    rollouts: list[tuple[Question, Trajectory, Score]] = [
        (group.question, trajectory, score)
        for group in groups
        for trajectory, score in zip(group.trajectories, group.scores, strict=True)
    ]
    statuses = Counter(trajectory.status for _, trajectory, _ in rollouts)
    return Metrics(
        num_questions=len(groups),
        num_trajectories=len(rollouts),
        em=_mean([score.em for _, _, score in rollouts]),
        f1=_mean([score.f1 for _, _, score in rollouts]),
        hit=_mean([q.gold_passage_ids[-1] in t.retrieved_passage_ids for q, t, _ in rollouts if q.gold_passage_ids]),
        searches_per_question=_mean([len(trajectory.queries) for _, trajectory, _ in rollouts]),
        status_shares={status: statuses[status] / len(rollouts) for status in TrajectoryStatus if statuses[status]},
        mean_response_tokens=_mean([int(trajectory.loss_mask.sum()) for _, trajectory, _ in rollouts]),
    )


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None
