"""Whole runs with real servers: `sdsearch train` with rollout.engine=sglang, undisturbed and with servers killed.

A run starts its own servers, which takes most of its time; one run serves many assertions.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from examples.tiny.build_world import build
from tests.e2e.conftest import ENVIRONMENT, Run, read_rows
from tests.e2e.ranks import ROOT
from tests.integration.sglang.conftest import Servers, segments_of, weight_version

START_LIMIT_S = 400.0  # two servers and two trainers on two cores that may have other work
RUN_LIMIT_S = 900.0
pytestmark = pytest.mark.timeout(START_LIMIT_S + RUN_LIMIT_S)
TRAIN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "megatron_sdsearch", "train"]
QUESTIONS, SIBLINGS = 12, 4
NUM_STEPS = 14
KILLED_AFTER = 2


class SGLangRun(Run):
    """A run that has servers of its own.

    Attributes:
        run_dir: of the run.
    """

    def __init__(self, run_dir: Path, settings: list[str]) -> None:
        self.run_dir = run_dir
        run_dir.mkdir()
        super().__init__([sys.executable, *TRAIN, *settings, f"run_dir={run_dir}"], run_dir.with_suffix(".log"))

    @property
    def metrics(self) -> list[dict[str, Any]]:
        path = self.run_dir / "metrics.jsonl"
        return read_rows(path) if path.is_file() else []

    def log(self, index: int) -> str:
        """What a server, and its supervisor, have said."""
        path = self.run_dir / "logs" / f"server_{index}.log"
        return path.read_text(errors="replace") if path.is_file() else ""

    def url(self, index: int) -> str:
        match = re.search(r"--port (\d+)", self.log(index))
        assert match is not None
        return f"http://127.0.0.1:{match[1]}"

    def main_process(self, index: int) -> Any:
        """The one that answers HTTP."""
        port = self.url(index).rsplit(":", 1)[1]
        for process in self.descendants():
            try:
                words = process.cmdline()
            except psutil.Error:
                continue
            if words[1:2] == ["tools/sglang_cpu/launch.py"] and port in words:
                return process
        raise AssertionError(f"server {index} is not running")

    def wait_until_sampling(self, index: int, *, after_steps: int) -> None:
        """Until a server has answered within the step that follows so many finished ones."""
        self.wait_until(lambda: len(self.metrics) >= after_steps, START_LIMIT_S + RUN_LIMIT_S)
        before = self.log(index).count("POST /generate HTTP")
        self.wait_until(lambda: self.log(index).count("POST /generate HTTP") > before + 2)


class Remains:
    """What runs below a command now, and must not later."""

    def __init__(self, run: SGLangRun, num_servers: int) -> None:
        self.processes = run.descendants()
        self.segments = segments_of(self.processes)
        assert len(self.processes) >= 2 + 4 * num_servers  # ranks; guardian, main process, scheduler, detokenizer
        assert len(self.segments) >= 2 * num_servers  # load snapshots, semaphores

    def assert_gone(self, within_s: float) -> None:
        deadline = time.monotonic() + within_s
        while left := [p for p in self.processes if _is_alive(p)] + [s for s in self.segments if s.exists()]:
            assert time.monotonic() < deadline, f"still there after {within_s} s: {left}"
            time.sleep(0.1)


def _is_alive(process: Any) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's world, and a model that has learned from few demonstrations: it searches, and is mostly wrong."""
    world = tmp_path_factory.mktemp("world")
    build(world, seed=2, num_demonstrations=6_000)
    settings = [
        f"run_dir={world / 'warm_start'}",
        f"model.hf_dir={world / 'model'}",
        f"train.demonstrations={world / 'demonstrations.jsonl'}",
        "train.num_steps=160",
        "telemetry.progress=false",
    ]
    command = [sys.executable, *TRAIN, str(ROOT / "examples/tiny/warm_start.yaml"), *settings]
    subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True, timeout=START_LIMIT_S)
    return world


def settings_of(world: Path) -> list[str]:
    """The demo's config, its files and sizes, and the one setting that brings servers."""
    return [
        str(ROOT / "examples/tiny/config.yaml"),
        f"model.hf_dir={world / 'warm_start' / 'hf'}",
        f"data.train={world / 'train.jsonl'}",
        f"data.heldout={world / 'heldout.jsonl'}",
        f"retrieval.corpus={world / 'corpus.jsonl'}",
        f"data.questions_per_step={QUESTIONS}",
        f"rollout.group_size={SIBLINGS}",
        f"train.num_steps={NUM_STEPS}",
        "evaluation.every=0",
        "checkpoint.every=0",
        "telemetry.query_probe=false",
        "rollout.engine=sglang",
    ]


Start = Callable[..., SGLangRun]


@pytest.fixture
def start(world: Path, tmp_path: Path) -> Iterator[Start]:
    """Begin a run in a folder of the test; it ends with the test."""
    runs: list[SGLangRun] = []

    def begin(*overrides: str) -> SGLangRun:
        runs.append(SGLangRun(tmp_path / f"run_{len(runs)}", [*settings_of(world), *overrides]))
        return runs[-1]

    yield begin
    for run in runs:
        run.kill()


def assert_steps_are_whole(run_dir: Path, num_steps: int) -> None:
    """Every group of every step has all of its trajectories, once each, all sampled from the step's policy."""
    rows = read_rows(run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, num_steps + 1))
    for step, metrics in enumerate(rows, 1):
        trajectories = read_rows(run_dir / "trajectories" / f"step_{step:06d}.jsonl")
        ids = Counter((row["question_id"], row["sibling"]) for row in trajectories)
        questions = {question for question, _ in ids}
        assert len(questions) == QUESTIONS
        assert ids == Counter((question, sibling) for question in questions for sibling in range(SIBLINGS))
        sampled = [span for row in trajectories for span in row["spans"] if span["kind"] == "sampled"]
        assert {span["policy_version"] for span in sampled} == {step - 1}
        assert 0 <= metrics["loss/rollout_k3"] < 1e-3
        assert metrics["loss/rollout_gap_max"] < 1e-2
        assert metrics["engine/num_wrong_version"] == 0
        assert metrics["train/num_trajectories"] == QUESTIONS * SIBLINGS


def test_a_run_survives_the_death_of_a_server_in_mid_step(start: Start) -> None:
    run = start()
    run.wait_until_sampling(1, after_steps=KILLED_AFTER)
    remains = Remains(run, 2)
    assert len(run.metrics) == KILLED_AFTER, "in the step that follows"
    run.main_process(1).kill()
    run.wait_until(lambda: "restart 1 of 3" in run.log(1), 60.0)
    run.wait_until(lambda: len(run.metrics) > KILLED_AFTER + 1, RUN_LIMIT_S)  # it goes on with the other one
    # A start takes longer than the steps that are left; the supervisor is a thread of the first rank.
    run.ranks()[1].suspend()
    run.wait_until(lambda: "supervisor: loaded version" in run.log(1), RUN_LIMIT_S)
    restarted = Remains(run, 2)
    num_done, held = len(run.metrics), weight_version(run.url(1))
    assert num_done <= NUM_STEPS - 4, "it has steps left to be of use in"
    assert held is not None
    assert int(held) in (num_done - 1, num_done), "the last one published"
    run.ranks()[1].resume()
    assert run.wait(RUN_LIMIT_S) == 0, run.output[-4000:]
    remains.assert_gone(20.0)
    restarted.assert_gone(20.0)

    assert_steps_are_whole(run.run_dir, NUM_STEPS)
    rows = run.metrics
    for name in ("engine/num_retries", "engine/num_moved", "engine/num_restarts"):
        assert [row[name] for row in rows[:KILLED_AFTER]] == [0] * KILLED_AFTER
        assert sum(row[name] for row in rows[KILLED_AFTER:]) >= 1
    assert rows[-1]["engine/num_restarts"] == 1
    assert any(row["train/num_searches"] > 0 for row in rows), "trajectories have several turns"
    assert any(row["engine/num_cached_tokens"] > 0 for row in rows), "which share their prefix"
    assert f"{run.url(1)} is back with weight version" in run.output
    assert run.log(1).split("supervisor: loaded version")[-1].count("POST /generate HTTP") > 0, "it samples again"
    assert run.log(1).count("supervisor: start, restart") == 2
    assert run.log(0).count("supervisor: start, restart") == 1


def test_without_servers_a_run_ends_soon_and_says_which_failed(start: Start) -> None:
    run = start("rollout.sglang.max_restarts=0", "rollout.sglang.down_timeout_s=5")
    run.wait_until_sampling(0, after_steps=1)
    remains = Remains(run, 2)
    mains = [run.main_process(index) for index in (0, 1)]
    for process in mains:
        process.kill()
    killed_at = time.monotonic()
    assert run.wait(60.0) != 0
    assert time.monotonic() - killed_at < 45.0
    remains.assert_gone(20.0)
    said = run.output.partition("megatron_sdsearch FAILED")[0]  # torchrun's report has it once more
    assert said.count("EngineError: ") == 1, run.output[-8000:]
    message = run.output[run.output.index("EngineError: ") :]
    for index in (0, 1):
        assert f"SGLang server {index} ({run.url(index)}) ended with exit code 137 (restarts: 0)" in message
        assert f"server_{index}.log ends with:" in message
    assert not (run.run_dir / "summary.json").exists()


def test_ctrl_c_leaves_nothing_running(start: Start) -> None:
    run = start("rollout.sglang.num_servers=1")
    run.wait_until_sampling(0, after_steps=0)
    remains = Remains(run, 1)
    run.interrupt()
    assert run.wait(60.0) != 0
    remains.assert_gone(20.0)


def test_servers_of_somebody_else_serve_a_run_and_outlive_it(
    start: Start, untied_models: tuple[Path, Path], untied_servers: Servers
) -> None:
    overrides = [
        "rollout.sglang.weight_sync=distributed",
        "parallel.tensor_model_parallel_size=1",
        "parallel.pipeline_model_parallel_size=2",
    ]
    overrides += [f"model.hf_dir={untied_models[0]}", f"rollout.sglang.urls=[{untied_servers.urls[0]}/]"]
    overrides += ["rollout.max_prompt_tokens=256", "rollout.max_total_tokens=600"]  # its tokenizer knows no long words
    run = start(*overrides, "train.num_steps=2")
    assert run.wait(RUN_LIMIT_S) == 0, run.output[-4000:]
    assert_steps_are_whole(run.run_dir, 2)
    assert weight_version(untied_servers.urls[0]) == "2"
    assert not (run.run_dir / "logs").exists()
