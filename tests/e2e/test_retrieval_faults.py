"""Training on a cluster that fails: no query is forgotten, and an engine that is down stops the run, which resumes."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import DEMO_LIMIT_S, Demo, Start, read_rows
from tests.loopback.fake_elastic import ALIAS, FakeElastic, Fault, running_in_thread

LIMIT_S = 180
DOWN_S = 3.0
# Any of these may be the first to ask for the demo.
pytestmark = pytest.mark.timeout(DEMO_LIMIT_S + 3 * LIMIT_S)


@pytest.fixture
def fake(demo: Demo) -> Iterator[FakeElastic]:
    """A scripted node with some of the demo's passages."""
    rows = read_rows(demo.out / "world" / "corpus.jsonl")[:200]
    with running_in_thread(FakeElastic({row["id"]: row["contents"] for row in rows})) as fake:
        yield fake


def settings_of(fake: FakeElastic, **changes: Any) -> list[str]:
    settings: dict[str, Any] = {"urls": f"[{fake.url}]", "index": ALIAS, "down_timeout_s": DOWN_S, **changes}
    return ["retrieval.engine=elasticsearch", *(f"retrieval.elasticsearch.{k}={v}" for k, v in settings.items())]


def searches_of(row: dict[str, Any]) -> tuple[int, int]:
    """(searches, observations after a search) of one trajectory."""
    spans = row["spans"]
    searches = [number for number, span in enumerate(spans) if span.get("action") == "search"]
    answered = [n for n in searches if n + 1 < len(spans) and spans[n + 1]["kind"] == "observation"]
    return len(searches), len(answered)


def test_with_a_fifth_of_all_answers_failing_a_step_loses_only_what_it_counts(
    fake: FakeElastic, start: Start, tmp_path: Path
) -> None:
    """Requests break in every way, which is fixed by repetition, and one in five is refused, which is not."""
    kinds: list[Fault] = ["429", "503", "drop", "half", "timed_out", "shard", "garbage"]
    fake.fault_of = lambda number: kinds[number // 5 % len(kinds)] if number % 5 == 0 else None
    numbers = itertools.count(1)
    fake.refuses = lambda query: next(numbers) % 5 == 0  # not the first two, the samples of two ranks
    run_dir = tmp_path / "faults"
    run = start(
        run_dir,
        *settings_of(fake, batch_queries=4),
        "train.num_steps=1",
        "optimizer.warmup_steps=0",
        "rollout.max_failed_search_share=1",
    )
    assert run.wait(LIMIT_S) == [0, 0], run.output[-4000:]

    (metrics,) = read_rows(run_dir / "metrics.jsonl")
    rows = read_rows(run_dir / "trajectories" / "step_000001.jsonl")
    lost = [row for row in rows if row["status"] == "retrieval_failed"]
    assert 0 < len(lost) < len(rows) == 16
    assert metrics["train/num_retrieval_failed"] == len(lost)
    assert any(searches_of(row)[1] for row in rows), "some were answered"
    for row in rows:
        num_searches, num_answered = searches_of(row)
        if row["status"] != "truncated":  # whose last observation may not have fitted
            assert num_answered == num_searches - (row["status"] == "retrieval_failed")


def test_a_cluster_that_goes_down_ends_the_run_in_time_and_it_resumes(
    fake: FakeElastic, start: Start, tmp_path: Path
) -> None:
    run_dir = tmp_path / "outage"
    overrides = [*settings_of(fake), "train.num_steps=3"]
    run = start(run_dir, *overrides)
    pointer = run_dir / "checkpoints" / "latest"
    assert run.wait_until(lambda: pointer.is_file() and pointer.read_text() == "step_000001")
    fake.is_dead = True
    down_at = time.monotonic()
    assert run.wait(LIMIT_S) == [1, 1], run.output[-4000:]
    assert time.monotonic() - down_at < DOWN_S + 60, "the rest is rollouts"
    assert run.output.count("RetrievalDownError: ") == 1
    assert f"nothing was answered for {DOWN_S:g} s" in run.output
    assert "Traceback" not in run.output.split("RetrievalDownError: ")[0]
    last = pointer.read_text()
    assert last in ("step_000001", "step_000002"), "a step without its searches is no step"

    again = start(tmp_path / "other", *overrides, "train.num_steps=1", "optimizer.warmup_steps=0")
    assert again.wait(LIMIT_S) == [1, 1]
    assert "RetrievalError: http://127.0.0.1" in again.output, "down at the start"
    assert "start the cluster" in again.output

    fake.is_dead = False
    resumed = start(run_dir, *overrides)
    assert resumed.wait(LIMIT_S) == [0, 0], resumed.output[-4000:]
    assert [row["step"] for row in read_rows(run_dir / "metrics.jsonl")] == [1, 2, 3]
    assert json.loads((run_dir / "summary.json").read_text())["steps"] == 3
