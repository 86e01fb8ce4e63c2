"""``sbatch slurm/train.sh`` on a real Slurm: across nodes, interrupted in all ways that Slurm has, with wrong input."""

from __future__ import annotations

import json
import re
import signal
import socket
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.integration.slurm.cluster import Cluster, Job
from tests.integration.slurm.conftest import (
    ENVIRONMENT,
    LIMIT_S,
    NUM_STEPS,
    arguments,
    assert_same,
    num_rows,
    weights,
)

pytestmark = pytest.mark.timeout(1200)


def latest_step(run_dir: Path) -> int:
    return int((run_dir / "checkpoints" / "latest").read_text().strip().removeprefix("step_"))


def first_steps(job: Job) -> list[int]:
    """From which step each of the job's starts began."""
    return [int(step) for step in re.findall(r"train\.sh: from step (\d+)", job.output)]


def test_a_job_trains_across_nodes(uninterrupted: Path, world: Path) -> None:
    summary = json.loads((uninterrupted / "summary.json").read_text())
    assert (summary["steps"], summary["tp"], summary["pp"], summary["dp"]) == (NUM_STEPS, 1, 2, 1)
    start = load_file(world / "model" / "model.safetensors")
    end = weights(uninterrupted)
    assert [name for name, tensor in start.items() if tensor.numpy().tobytes() == end[name]] == [], "it learns"
    (logs,) = (uninterrupted / "logs").iterdir()
    ranks = sorted(path.relative_to(logs).parts[0] for path in logs.glob("ranks_*/*/attempt_0/0/stdout.log"))
    assert ranks == ["ranks_n0", "ranks_n1"]
    assert f"step {NUM_STEPS}/{NUM_STEPS}" in next(logs.glob("ranks_n0/*/attempt_0/0/stdout.log")).read_text()


def test_tensor_parallel_within_nodes_and_data_parallel_across(cluster: Cluster, world: Path, tmp_path: Path) -> None:
    settings = [
        "parallel.tensor_model_parallel_size=2",
        "parallel.pipeline_model_parallel_size=1",
        "train.num_steps=2",
        "optimizer.warmup_steps=0",
    ]
    environment = ENVIRONMENT | {"SDSEARCH_RANKS_PER_NODE": "2"}
    command = arguments(world, tmp_path / "run", *settings)
    job = cluster.submit(tmp_path / "log", command, flags=["--nodes=2"], **environment)
    assert job.wait(LIMIT_S) == 0, job.output[-6000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["steps"], summary["tp"], summary["pp"], summary["dp"]) == (2, 2, 1, 2)


# Without --batch Slurm signals the steps' processes; with it the batch script alone, as `--signal=B:USR1@...` does.
@pytest.mark.parametrize("flags", [["--signal=USR1"], ["--signal=USR1", "--batch"]], ids=["steps", "batch"])
def test_usr1_saves_requeues_and_goes_on(
    flags: list[str], cluster: Cluster, world: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    command = arguments(world, run_dir, "checkpoint.every=0")
    job = cluster.submit(tmp_path / "log", command, flags=["--nodes=2"], **ENVIRONMENT)
    job.wait_for(lambda: num_rows(run_dir) >= 3, LIMIT_S)
    job.signal(*flags)
    assert job.wait(2 * LIMIT_S) == 0, job.output[-6000:]
    first, second = first_steps(job)
    assert (first, job.show("Restarts")) == (0, "1")
    assert 3 <= second < NUM_STEPS, "it was saved where it was"
    assert f"stopped on SIGUSR1; newest checkpoint: step_{second:06d}; requeueing" in job.output
    assert not (run_dir / "stopped.json").exists()
    assert_same(run_dir, uninterrupted)


def test_slurm_requeues_when_a_node_does_not_answer(
    cluster: Cluster, world: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    job = cluster.submit(tmp_path / "log", arguments(world, run_dir), flags=["--nodes=2"], **ENVIRONMENT)
    job.wait_for(lambda: num_rows(run_dir) >= 8, LIMIT_S)
    cluster.freeze_node("n1")
    job.wait_for(lambda: job.show("Restarts") == "1", LIMIT_S)
    saved = latest_step(run_dir)
    cluster.kill_node("n1")
    cluster.start_node("n1")
    assert job.wait(2 * LIMIT_S) == 0, job.output[-6000:]
    assert first_steps(job) == [0, saved]
    assert 5 <= saved < NUM_STEPS
    assert_same(run_dir, uninterrupted)


def test_a_failure_names_its_node_and_the_same_command_or_a_requeue_goes_on(
    cluster: Cluster, world: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    job = cluster.submit(tmp_path / "log", arguments(world, run_dir), flags=["--nodes=2"], **ENVIRONMENT)
    job.wait_for(lambda: num_rows(run_dir) >= 8, LIMIT_S)
    (rank,) = cluster.ranks("n1")
    rank.send_signal(signal.SIGKILL)
    assert job.wait(LIMIT_S) == 1
    (last,) = [line for line in job.output.splitlines() if line.startswith("train.sh: failed: ")]
    assert "node n1: " in last
    assert "exitcode: -9" in last
    first_saved = latest_step(run_dir)
    assert f"newest checkpoint: step_{first_saved:06d}" in last
    assert job.show("Restarts") == "0"
    assert cluster.processes("n0") + cluster.processes("n1") == []

    environment = ENVIRONMENT | {"SDSEARCH_REQUEUE": "failure"}
    again = cluster.submit(tmp_path / "log_2", arguments(world, run_dir), flags=["--nodes=2"], **environment)
    again.wait_for(lambda: num_rows(run_dir) >= first_saved + 7, LIMIT_S)
    cluster.kill_node("n1")
    again.wait_for(lambda: "; requeueing" in again.output, LIMIT_S)
    second_saved = latest_step(run_dir)
    cluster.start_node("n1")
    assert again.wait(2 * LIMIT_S) == 0, again.output[-6000:]
    assert re.search(r"failed: srun: error: n1: .*; newest checkpoint: .*; requeueing", again.output)
    assert first_steps(again) == [first_saved, second_saved]
    assert first_saved < second_saved < NUM_STEPS
    assert_same(run_dir, uninterrupted)


def test_a_job_that_gets_nowhere_is_not_requeued_for_ever(cluster: Cluster, world: Path, tmp_path: Path) -> None:
    environment = ENVIRONMENT | {"SDSEARCH_MAX_STALLED_STARTS": "1"}
    job = cluster.submit(tmp_path / "log", arguments(world, tmp_path / "run"), flags=["--nodes=2"], **environment)
    job.wait_for(lambda: "on n0 n1" in job.output, LIMIT_S)
    job.signal("--signal=USR1", "--batch")  # before anything was saved
    assert job.wait(2 * LIMIT_S) == 1, job.output[-6000:]
    assert job.show("Restarts") == "1"
    assert f"job {job.number} has started 1 times at step 0 and saved nothing after it" in job.output


def test_scancel_saves_and_does_not_requeue(cluster: Cluster, world: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    settings = ["train.num_steps=5000", "checkpoint.every=0"]
    command = arguments(world, run_dir, *settings)
    job = cluster.submit(tmp_path / "log", command, flags=["--nodes=2"], **ENVIRONMENT)
    job.wait_for(lambda: num_rows(run_dir) >= 2, LIMIT_S)
    job.signal()
    job.wait(LIMIT_S)
    assert (job.state, job.show("Restarts")) == ("CANCELLED", "0")
    stopped = json.loads((run_dir / "stopped.json").read_text())
    assert stopped["signal"] == "SIGTERM"
    assert latest_step(run_dir) == stopped["step"] >= 2


def wrong_inputs(world: Path, run_dir: Path) -> dict[str, tuple[list[str], dict[str, str], str]]:
    """Arguments, environment, and what the one line about them says."""
    right = arguments(world, run_dir)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{probe.getsockname()[1]}/retrieve"
    down = ["retrieval.engine=http", f"retrieval.http.url={closed}", "retrieval.http.max_attempts=1"]
    return {
        "no config": ([], {}, "train.sh: no CONFIG: sbatch slurm/train.sh CONFIG"),
        "config missing": (["examples/none.yaml"], {}, "ConfigError: CONFIG: examples/none.yaml does not exist"),
        "wrong key": ([*right, "train.steps=3"], {}, "ConfigError: train.steps: unknown key"),
        "all nodes serve": (
            [*right, "rollout.engine=sglang"],
            {"SDSEARCH_SGLANG_NODES": "2"},
            "ConfigError: SDSEARCH_SGLANG_NODES: 2 of 2 nodes leave none to train on",
        ),
        "no node serves": (
            [*right, "rollout.engine=sglang", f"rollout.sglang.command=[{world / 'model/config.json'}]"],
            {},
            "ConfigError: ",
        ),
        "sizes": (
            [*right, "parallel.pipeline_model_parallel_size=3"],
            {},
            "ConfigError: parallel.tensor_model_parallel_size: tensor 1 x pipeline 3 = 3 does not divide the 2 ",
        ),
        "retriever down": ([*right, *down], {}, "check: error: retrieval.http: "),
        "no number": (right, {"SDSEARCH_SGLANG_NODES": "two"}, "train.sh: SDSEARCH_SGLANG_NODES: two is not a number"),
    }


def test_wrong_input_is_one_line_before_anything_starts(cluster: Cluster, world: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    cases = wrong_inputs(world, run_dir)
    jobs = {
        name: cluster.submit(tmp_path / name, command, flags=["--nodes=2"], **(ENVIRONMENT | environment))
        for name, (command, environment, _) in cases.items()
    }
    for name, job in jobs.items():
        assert job.wait(LIMIT_S) == 2, f"{name}: {job.output}"
        told = [line for line in job.output.splitlines() if cases[name][2] in line]
        assert len(told) == 1, f"{name}: {job.output}"
        assert "Traceback" not in job.output
    assert not (run_dir / "logs").exists()
