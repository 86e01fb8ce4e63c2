"""A job with a real SGLang on one node, the trainer on the other: a server dies, SIGUSR1 comes, the run ends whole."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

import psutil  # type: ignore[import-untyped]
import pytest

from tests.integration.slurm.cluster import ROOT, Cluster
from tests.integration.slurm.conftest import ENVIRONMENT, LIMIT_S, arguments, metrics, num_rows

NUM_STEPS = 40  # of half a second: enough for a signal to come in time
SERVER_LIMIT_S = 600.0  # two starts of a server, 40 s each on two quiet cores
pytestmark = pytest.mark.timeout(2400)


def settings(world: Path, run_dir: Path) -> list[str]:
    return arguments(
        world,
        run_dir,
        "parallel.pipeline_model_parallel_size=1",
        f"train.num_steps={NUM_STEPS}",
        "checkpoint.every=0",
        "rollout.engine=sglang",
        "rollout.sglang.num_servers=1",
        "rollout.sglang.down_timeout_s=400",
    )


def server_process(cluster: Cluster, url: str) -> psutil.Process:
    """The one that answers HTTP."""
    port = str(urlsplit(url).port)
    return next(
        p for p in cluster.processes("n1") if p.cmdline()[1:2] == ["tools/sglang_cpu/launch.py"] and port in p.cmdline()
    )


def test_a_sglang_node_serves_a_job_through_deaths_and_requeues(cluster: Cluster, world: Path, tmp_path: Path) -> None:
    assert (ROOT / ".sglang/.installed").exists(), "`make test-slurm` installs SGLang"
    run_dir = tmp_path / "run"
    environment = ENVIRONMENT | {"SDSEARCH_SGLANG_NODES": "1"}
    job = cluster.submit(tmp_path / "log", settings(world, run_dir), flags=["--nodes=2"], **environment)
    logs = run_dir / "logs" / f"job_{job.number}.0"
    job.wait_for(lambda: num_rows(run_dir) >= 2, SERVER_LIMIT_S)
    assert [rank.environ()["RANK"] for rank in cluster.ranks("n0")] == ["0"]
    assert cluster.ranks("n1") == []
    (url,) = (logs / "urls.0").read_text().split()

    server_process(cluster, url).kill()
    server_log = logs / "sglang_n1" / "server_0.log"
    job.wait_for(lambda: "supervisor: loaded version" in server_log.read_text(), SERVER_LIMIT_S)
    num_before = num_rows(run_dir)
    job.wait_for(lambda: num_rows(run_dir) > num_before, SERVER_LIMIT_S)  # the same run goes on with it
    job.signal("--signal=USR1")  # to the servers, too

    assert job.wait(2 * SERVER_LIMIT_S) == 0, job.output[-6000:]
    assert job.show("Restarts") == "1"
    assert "exit code 138" not in server_log.read_text(), "SIGUSR1 ends no server"
    rows = metrics(run_dir)
    assert [row["step"] for row in rows] == list(range(1, NUM_STEPS + 1))
    assert {row["engine/num_wrong_version"] for row in rows} == {0}
    assert all(row["loss/rollout_gap_max"] < 1e-2 for row in rows)
    for step in range(1, NUM_STEPS + 1):
        trajectories = [
            json.loads(line) for line in (run_dir / "trajectories" / f"step_{step:06d}.jsonl").read_text().splitlines()
        ]
        assert set(Counter(row["question_id"] for row in trajectories).values()) == {2}
        versions = {s["policy_version"] for row in trajectories for s in row["spans"] if s["kind"] == "sampled"}
        assert versions == {step - 1}
    assert list(run_dir.glob("logs/*/urls.*")) == []
    assert cluster.processes("n0") + cluster.processes("n1") == []


def test_a_server_that_does_not_start_ends_the_job_with_its_words(
    cluster: Cluster, world: Path, tmp_path: Path
) -> None:
    command = [*settings(world, tmp_path / "run"), "rollout.sglang.arguments=[--frobnicate]"]
    environment = ENVIRONMENT | {"SDSEARCH_SGLANG_NODES": "1"}
    job = cluster.submit(tmp_path / "log", command, flags=["--nodes=2"], **environment)
    assert job.wait(LIMIT_S) == 1
    (last,) = [line for line in job.output.splitlines() if line.startswith("train.sh: SGLang did not start")]
    assert "node n1: EngineError: SGLang server 0" in last
    assert "unrecognized arguments: --frobnicate" in job.output
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_sglang_node_that_gives_up_ends_the_job(cluster: Cluster, world: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    limits = ["rollout.sglang.max_restarts=0", "rollout.sglang.down_timeout_s=5"]
    environment = ENVIRONMENT | {"SDSEARCH_SGLANG_NODES": "1"}
    job = cluster.submit(tmp_path / "log", [*settings(world, run_dir), *limits], flags=["--nodes=2"], **environment)
    job.wait_for(lambda: num_rows(run_dir) >= 1, SERVER_LIMIT_S)
    (url,) = (run_dir / "logs" / f"job_{job.number}.0" / "urls.0").read_text().split()
    server_process(cluster, url).kill()
    assert job.wait(LIMIT_S) == 1
    (last,) = [line for line in job.output.splitlines() if line.startswith("train.sh: SGLang failed: ")]
    assert f"node n1: EngineError: SGLang server 0 ({url}) ended with exit code 137 (restarts: 0)" in last
    assert cluster.processes("n0") + cluster.processes("n1") == []
