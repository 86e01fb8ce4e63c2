"""Average a set of rollouts: answer quality, searches, hits and how trajectories ended.

Owns the averages, and the check that there is something to average. Every mean is over trajectories (micro), so that
data sets count by their size in the overall row. Trajectories that a failed search or the engine has ended are in none
of them: an outage is not a wrong answer. Their count is given beside the means. A single score is made in
``data/scoring.py``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
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
class RolloutStats:
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
        mean_response_tokens: sampled tokens per trajectory, observations not counted.
        status_shares: share of all trajectories by how they ended; the shares sum to 1, absent ones are 0.
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
    mean_response_tokens: float | None
    status_shares: dict[TrajectoryStatus, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, unknown ones left out."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSummary:
    """Metrics over everything, and per data set in alphabetical order."""

    overall: RolloutStats
    by_dataset: dict[str, RolloutStats]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        by_dataset = {name: stats.to_dict() for name, stats in self.by_dataset.items()}
        return {"overall": self.overall.to_dict(), "by_dataset": by_dataset}


def summarize(groups: Sequence[RolloutGroup]) -> EvaluationSummary:
    """Average over all groups, and over those of each data set. No groups give counts of 0 and no means."""
    names = sorted({group.question.dataset for group in groups})
    by_dataset = {name: _stats([g for g in groups if g.question.dataset == name]) for name in names}
    return EvaluationSummary(overall=_stats(groups), by_dataset=by_dataset)


def require_sampled(groups: Sequence[RolloutGroup], what: str) -> None:
    """Check that some trajectory was not lost and has sampled tokens: else there is nothing to learn from or to judge.

    Args:
        groups: of all ranks.
        what: the message begins with, e.g. ``step 3``.

    Raises:
        TrainingError: there is none; with the counts by status, and what most likely helps.
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


def _stats(groups: Sequence[RolloutGroup]) -> RolloutStats:
    rollouts: list[tuple[Question, Trajectory, Score]] = [
        (group.question, trajectory, score)
        for group in groups
        for trajectory, score in zip(group.trajectories, group.scores, strict=True)
    ]
    statuses = Counter(trajectory.status for _, trajectory, _ in rollouts)
    kept = [rollout for rollout in rollouts if not rollout[1].status.is_lost]
    return RolloutStats(
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
