"""A run that is killed and started again ends as one that was not, and no rank outlives another."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import torch
from safetensors.torch import load_file

from tests.e2e.conftest import DEMO_LIMIT_S, TORCHRUN_TRAIN, Demo, Run, Start, read_rows, train_arguments
from tests.e2e.ranks import Ranks

NUM_STEPS = 4
KILLED_AFTER = 2
LIMIT_S = 180  # of one short run; 15 to 25 s on two quiet cores
# Any of these may be the first to ask for the demo.
pytestmark = pytest.mark.timeout(DEMO_LIMIT_S + 3 * LIMIT_S)


def without_times(run_dir: Path) -> list[dict[str, Any]]:
    """Nor ``replay/*``, which tells whether a search was answered from the store."""
    rows = read_rows(run_dir / "metrics.jsonl")
    return [{name: row[name] for name in row if not name.startswith(("time/", "replay/"))} for row in rows]


def replay(mode: str, store: Path) -> list[str]:
    return [f"retrieval.replay.mode={mode}", f"retrieval.replay.store={store}"]


def trajectory_files(run_dir: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (run_dir / "trajectories").iterdir()}


def sampled_ids(run_dir: Path, step: int) -> dict[tuple[str, int], list[list[int]]]:
    rows = read_rows(run_dir / "trajectories" / f"step_{step:06d}.jsonl")
    return {(row["question_id"], row["sibling"]): [span["token_ids"] for span in row["spans"]] for row in rows}


@pytest.fixture(scope="module")
def uninterrupted(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps at tp=2 that nobody disturbed; its searches are recorded."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    recorded = replay("cache", folder / "searches")
    with Ranks(train_arguments(demo, folder / "run", f"train.num_steps={NUM_STEPS}", *recorded), folder / "log") as run:
        assert run.wait(LIMIT_S) == [0, 0], run.output[-4000:]
    return folder / "run"


@pytest.mark.parametrize("is_replayed", [False, True])
def test_kill_and_resume_change_nothing(is_replayed: bool, uninterrupted: Path, start: Start, tmp_path: Path) -> None:
    run_dir = tmp_path / "killed"
    searches = replay("only", uninterrupted.parent / "searches") if is_replayed else []
    overrides = [f"train.num_steps={NUM_STEPS}", *searches]
    first = start(run_dir, *overrides)
    pointer = run_dir / "checkpoints" / "latest"
    assert first.wait_until(lambda: pointer.is_file() and pointer.read_text() == f"step_{KILLED_AFTER:06d}")
    first.kill([0, 1])
    assert first.wait(10) == [-signal.SIGKILL] * 2
    assert not (run_dir / "summary.json").exists(), "killed before the end"
    assert pointer.read_text() == f"step_{KILLED_AFTER:06d}"
    before = without_times(run_dir)

    second = start(run_dir, *overrides)
    assert second.wait(LIMIT_S) == [0, 0], second.output[-4000:]

    assert f"step {KILLED_AFTER + 1}/{NUM_STEPS}" in second.output
    assert second.output.count("step 1/") == 1, "the second start repeats no finished step"
    rows = without_times(run_dir)
    assert [row["step"] for row in rows] == list(range(1, NUM_STEPS + 1))
    assert rows[:KILLED_AFTER] == before[:KILLED_AFTER]
    assert rows == without_times(uninterrupted)
    assert trajectory_files(run_dir) == trajectory_files(uninterrupted)
    ours, theirs = (load_file(folder / "hf" / "model.safetensors") for folder in (run_dir, uninterrupted))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_the_steps_of_the_comparison_learn_and_distil(uninterrupted: Path, demo: Demo) -> None:
    rows = without_times(uninterrupted)
    assert len({row["optimizer/learning_rate"] for row in rows}) == NUM_STEPS, "a lost schedule would show"
    assert [row["step"] for row in rows if "loss/jsd" in row] == list(range(2, NUM_STEPS + 1))
    assert all(row["loss/grad_norm"] > 0 for row in rows)
    logs = [(uninterrupted / "trajectories" / f"step_{step:06d}.jsonl").read_text().splitlines() for step in (1, 2)]
    is_shown = [any(json.loads(line)["hindsight"]["text"] for line in log) for log in logs]
    assert is_shown == [False, True], "no hindsight is built while alpha is 0"
    start = load_file(demo.out / "warm_start" / "hf" / "model.safetensors")
    end = load_file(uninterrupted / "hf" / "model.safetensors")
    assert [name for name in end if torch.equal(start[name], end[name])] == []


def test_a_rank_that_is_killed_takes_the_others_along(demo: Demo, tmp_path: Path) -> None:
    run_dir = tmp_path / "one_dies"
    arguments = train_arguments(demo, run_dir, "train.num_steps=1000", "checkpoint.every=0")
    run = Run([sys.executable, *TORCHRUN_TRAIN, *arguments], tmp_path / "log")
    try:
        metrics = run_dir / "metrics.jsonl"
        run.wait_until(lambda: metrics.is_file() and metrics.stat().st_size > 0)
        ranks = run.ranks()
        assert sorted(ranks) == [0, 1]
        ranks[1].kill()
        killed_at = time.monotonic()
        assert run.wait(60) != 0
        _, alive = psutil.wait_procs(list(ranks.values()), timeout=20)
        assert time.monotonic() - killed_at < 20
        assert alive == []
        assert not (run_dir / "summary.json").exists()
    finally:
        run.kill()


def test_two_replicas_sample_what_two_shards_sample(uninterrupted: Path, start: Start, tmp_path: Path) -> None:
    run_dir = tmp_path / "replicas"
    run = start(run_dir, "parallel.tensor_model_parallel_size=1", "train.num_steps=1", "optimizer.warmup_steps=0")
    assert run.wait(LIMIT_S) == [0, 0], run.output[-4000:]
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["tp"], summary["dp"]) == (1, 2)
    ours = sampled_ids(run_dir, 1)
    assert len(ours) == 16
    assert ours == sampled_ids(uninterrupted, 1)
