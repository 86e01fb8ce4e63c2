"""What a set of rollouts amounts to: answer quality, searches, hits and how trajectories ended.

Owns the averages, and that there is something to average. Every mean is over trajectories (micro), so that data sets
count by their size in the overall row. Trajectories that a failed search or the engine has ended are in none of them:
an outage is no wrong answer. Their count stands beside the means. Single scores are ``data/scoring.py``'s.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_sdsearch.errors import TrainingError
from megatron_sdsearch.records import Question, RolloutGroup, Score, Trajectory, TrajectoryStatus

_ADVICE = {
    TrajectoryStatus.PROMPT_TOO_LONG: "raise rollout.max_prompt_tokens, `check` says how long prompts are",
    TrajectoryStatus.RETRIEVAL_FAILED: "see why searches fail, above; the search engine may be down",
    TrajectoryStatus.ABORTED: "see why the rollout engine gives up, in its log",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """Means over the trajectories of one set that were not lost; None where there is nothing to average.

    Attributes:
        num_questions: groups.
        num_trajectories: over all groups, lost ones included.
        num_lost: of them, those that a failed search or the engine has ended.
        num_prompt_too_long: of them, those whose prompt exceeds ``rollout.max_prompt_tokens``: wrong answers without a
            token, which are in the means.
        num_eos_without_action: generations that ended with EOS and asked for nothing, lost trajectories included.
        em: exact match in [0, 1].
        f1: token F1 in [0, 1].
        hit: share of trajectories that were shown their question's last gold passage (the one that holds the answer),
            among questions that know it.
        searches_per_question: searches asked for, per trajectory, whether or not they found anything.
        status_shares: share of all trajectories by how they ended; the shares sum to 1, absent ones are 0.
        mean_response_tokens: sampled tokens per trajectory, observations not counted.
    """

    num_questions: int
    num_trajectories: int
    num_lost: int
    num_prompt_too_long: int
    num_eos_without_action: int
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


def require_sampled(groups: Sequence[RolloutGroup], what: str) -> None:
    """Of all trajectories at least one was not lost and has sampled tokens: else nothing can be learned, or judged.

    Args:
        groups: of all processes.
        what: they are, at the beginning of the message.

    Raises:
        TrainingError: with the counts by status, and what most likely helps.
    """
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    if any(trajectory.is_trainable for trajectory in trajectories):
        return
    statuses = Counter(trajectory.status for trajectory in trajectories)
    counts = ", ".join(f"{number} {status.value}" for status, number in statuses.most_common())
    advice = next((_ADVICE[status] for status, _ in statuses.most_common() if status in _ADVICE), "ask more questions")
    raise TrainingError(
        f"{what}: none of its {len(trajectories)} trajectories ({counts}) has a token to learn from or to judge; "
        f"{advice}"
    )


def _metrics(groups: Sequence[RolloutGroup]) -> Metrics:
    rollouts: list[tuple[Question, Trajectory, Score]] = [
        (group.question, trajectory, score)
        for group in groups
        for trajectory, score in zip(group.trajectories, group.scores, strict=True)
    ]
    statuses = Counter(trajectory.status for _, trajectory, _ in rollouts)
    kept = [rollout for rollout in rollouts if not rollout[1].status.is_lost]
    return Metrics(
        num_questions=len(groups),
        num_trajectories=len(rollouts),
        num_lost=len(rollouts) - len(kept),
        num_prompt_too_long=statuses[TrajectoryStatus.PROMPT_TOO_LONG],
        num_eos_without_action=sum(trajectory.num_eos_without_action for _, trajectory, _ in rollouts),
        em=_mean([score.em for _, _, score in kept]),
        f1=_mean([score.f1 for _, _, score in kept]),
        hit=_mean([q.gold_passage_ids[-1] in t.retrieved_passage_ids for q, t, _ in kept if q.gold_passage_ids]),
        searches_per_question=_mean([len(trajectory.queries) for _, trajectory, _ in kept]),
        status_shares={status: statuses[status] / len(rollouts) for status in TrajectoryStatus if statuses[status]},
        mean_response_tokens=_mean([int(trajectory.loss_mask.sum()) for _, trajectory, _ in kept]),
    )


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None
