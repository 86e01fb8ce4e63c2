"""Lost trajectories: counted by cause, logged once, added up, and held to the limit."""

from __future__ import annotations

from collections import Counter

import pytest

from megatron_sdsearch.errors import EngineError, RetrievalError
from megatron_sdsearch.records import TrajectoryStatus
from megatron_sdsearch.rollout.lost import LostTrajectories

ANSWERED, FAILED, ABORTED = TrajectoryStatus.ANSWERED, TrajectoryStatus.RETRIEVAL_FAILED, TrajectoryStatus.ABORTED


def test_causes_are_counted_and_the_most_frequent_ones_logged(caplog: pytest.LogCaptureFixture) -> None:
    lost = LostTrajectories()
    lost.log_failed_searches()
    for number in range(12):
        cause = ("a", "b", "b", "", "d")[min(number, 4)]
        lost.count(FAILED, RetrievalError(f"query {number} failed", cause=cause))
        if number == 0:
            lost.log_failed_searches()
    lost.count(ANSWERED, None)
    assert [record.getMessage() for record in caplog.records] == [
        "a search failed: query 0 failed; further failures are reported at the end of the step"
    ]
    lost.log_failed_searches()
    assert caplog.records[-1].getMessage() == "12 searches failed: 8 x d; 2 x b; 1 x a; 1 other causes"
    assert (lost.failed_searches.total(), lost.num_ended, lost.first_error) == (12, 13, "query 0 failed")


def test_counts_add_up_and_the_share_is_that_of_all() -> None:
    failed = LostTrajectories(num_ended=8, failed_searches=Counter(x=3), first_error="a")
    total = sum([LostTrajectories(num_ended=8), failed, LostTrajectories()], LostTrajectories())
    assert total == LostTrajectories(num_ended=16, failed_searches=Counter(x=3), first_error="a")
    total.check(0.2)
    with pytest.raises(RetrievalError):
        failed.check(0.2)
    LostTrajectories().check(0.0)


def test_what_the_engine_gave_up_on_is_lost_as_well() -> None:
    lost = LostTrajectories()
    lost.count(ABORTED, None)
    lost.count(ANSWERED, None)
    with pytest.raises(EngineError, match=r"the rollout engine aborted 1 of 2 trajectories \(50%\), more than"):
        lost.check(0.2)
    lost.count(FAILED, RetrievalError("no route to 'book'"))
    lost.check(0.7)
    with pytest.raises(RetrievalError, match=r"2 of 3 .* failed searches or aborted by the rollout engine \(1\)"):
        lost.check(0.5)
