"""Counts trajectories lost to an outage, and limits their share in a step or an evaluation."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field

from megatron_sdsearch.errors import EngineError, RetrievalError
from megatron_sdsearch.records import TrajectoryStatus

_log = logging.getLogger(__name__)

_SHOWN_CAUSES, _CAUSE_LENGTH = 3, 120


@dataclass(slots=True, kw_only=True)
class LostTrajectories:
    """Counts of trajectories lost to the rollout or search engine rather than to the policy; add up over ranks.

    Attributes:
        num_ended: all trajectories that have ended, including those of discarded groups.
        num_aborted: of them, aborted by the rollout engine.
        failed_searches: of them, lost to a failed search, by cause.
        first_error: message of the first failed search; "" without one.
    """

    num_ended: int = 0
    num_aborted: int = 0
    failed_searches: Counter[str] = field(default_factory=Counter)
    first_error: str = ""

    def __add__(self, other: LostTrajectories) -> LostTrajectories:
        return LostTrajectories(
            num_ended=self.num_ended + other.num_ended,
            num_aborted=self.num_aborted + other.num_aborted,
            failed_searches=self.failed_searches + other.failed_searches,
            first_error=self.first_error or other.first_error,
        )

    def count(self, status: TrajectoryStatus, error: RetrievalError | None) -> None:
        """Count one ended trajectory and its failed search; log the first failure."""
        self.num_ended += 1
        self.num_aborted += status is TrajectoryStatus.ABORTED
        if error is None:
            return
        if not self.failed_searches:
            self.first_error = str(error)
            _log.warning("a search failed: %s; further failures are reported at the end of the step", error)
        cause = error.cause or "unknown cause"
        self.failed_searches[cause if len(cause) <= _CAUSE_LENGTH else f"{cause[:_CAUSE_LENGTH]}..."] += 1

    def log_failed_searches(self) -> None:
        """Log the most frequent causes in one line if several searches failed: an outage fails thousands."""
        if (num_failed := self.failed_searches.total()) < 2:
            return
        shown = [f"{count} x {cause}" for cause, count in self.failed_searches.most_common(_SHOWN_CAUSES)]
        if (num_others := len(self.failed_searches) - len(shown)) > 0:
            shown.append(f"{num_others} other causes")
        _log.warning("%d searches failed: %s", num_failed, "; ".join(shown))

    def check(self, limit: float) -> None:
        """Check that the share of lost trajectories is at most ``limit`` (``rollout.max_failed_search_share``).

        Raises:
            RetrievalError: it is larger, and some were lost to failed searches.
            EngineError: it is larger, and the rollout engine aborted all of them.
        """
        num_failed = self.failed_searches.total()
        num_lost = num_failed + self.num_aborted
        if num_lost <= limit * self.num_ended:
            return
        share = f"{num_lost} of {self.num_ended} trajectories ({num_lost / self.num_ended:.0%})"
        more = f"more than rollout.max_failed_search_share = {limit:.0%}"
        if not num_failed:
            raise EngineError(f"the rollout engine aborted {share}, {more}")
        aborted = f" or aborted by the rollout engine ({self.num_aborted})" if self.num_aborted else ""
        raise RetrievalError(
            f"{share} were lost to failed searches{aborted}, {more}; first cause: {self.first_error}",
            cause=self.first_error,
        )
