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
    TrajectoryStatus.PROMPT_TOO_LONG: "raise rollout.max_prompt_tokens; `check` reports the lengths of prompts",
    TrajectoryStatus.RETRIEVAL_FAILED: "the messages above say why searches fail; the search engine may be down",
    TrajectoryStatus.ABORTED: "the log of the rollout engine says why it gives up",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutStats:
    """Counts of trajectories, and means over those that were not lost; None without anything to average.

    Attributes:
        num_questions: groups.
        num_trajectories: over all groups, including lost ones.
        num_lost: of them, ended by a failed search or by the engine.
        num_prompt_too_long: of them, with a prompt longer than ``rollout.max_prompt_tokens``: wrong answers without a
            token, included in the means.
        num_eos_without_action: generations that ended with EOS and no action, including lost trajectories.
        em: exact match in [0, 1].
        f1: token F1 in [0, 1].
        hit: share of trajectories that were shown their question's last gold passage (the one that holds the answer),
            among questions with gold passages.
        searches_per_question: searches per trajectory, including those without results.
        mean_response_tokens: sampled tokens per trajectory, without observations.
        status_shares: share of all trajectories by status; the shares sum to 1, absent ones are 0.
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
        """Return plain values for JSON, without those that are None."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def summarize_datasets(groups: Sequence[RolloutGroup]) -> dict[str, Any]:
    """Average over all groups and over those of each data set, as plain values for JSON."""
    datasets = sorted({group.question.dataset for group in groups})
    by_dataset = {name: summarize([g for g in groups if g.question.dataset == name]).to_dict() for name in datasets}
    return {"overall": summarize(groups).to_dict(), "by_dataset": by_dataset}


def require_sampled(groups: Sequence[RolloutGroup], what: str) -> None:
    """Check that at least one trajectory was not lost and has sampled tokens.

    Args:
        groups: of all ranks.
        what: begins the message, e.g. ``step 3``.

    Raises:
        TrainingError: there is none; with the counts by status and the likely fix.
    """
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    if any(trajectory.is_trainable for trajectory in trajectories):
        return
    statuses = Counter(trajectory.status for trajectory in trajectories)
    counts = ", ".join(f"{number} {status.value}" for status, number in statuses.most_common())
    advice = next((_ADVICE[status] for status, _ in statuses.most_common() if status in _ADVICE), "use more questions")
    raise TrainingError(
        f"{what}: none of its {len(trajectories)} trajectories ({counts}) has a token to learn from or to score; "
        f"{advice}"
    )


def summarize(groups: Sequence[RolloutGroup]) -> RolloutStats:
    """Average over all groups; no groups give counts of 0 and no means."""
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
