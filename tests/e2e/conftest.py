"""One run of the demo for all end-to-end tests, and runs that can be started, watched and killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from tests.e2e.ranks import ROOT, Ranks

DEMO_SEED = 2
DEMO_LIMIT_S = 1200  # 4 to 5 minutes on two quiet cores
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONPATH": str(ROOT),
    "COLUMNS": "300",  # no line of the output is broken
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Demo:
    """A finished demo.

    Attributes:
        out: its folder.
        output: what it said on the terminal.
    """

    out: Path
    output: str

    @property
    def summary(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.out / "summary.json").read_text())
        return content

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return read_rows(self.out / "metrics.jsonl")


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """``python -m examples.tiny.run`` from nothing, as a user calls it."""
    out = tmp_path_factory.mktemp("demo") / "out"
    command = [sys.executable, "-m", "examples.tiny.run", "--out", str(out), "--seed", str(DEMO_SEED)]
    run = Run(command, out.with_suffix(".log"))
    try:
        code = run.wait(DEMO_LIMIT_S)
        assert code == 0, f"the demo ended with exit code {code}:\n{run.output[-4000:]}"
    finally:
        run.kill()
    return Demo(out=out, output=run.output)


class Run:
    """A command with all processes that it starts; ``kill`` spares none and nobody else."""

    def __init__(self, command: list[str], log: Path) -> None:
        self._log = log
        with log.open("ab") as stream:
            self._process = subprocess.Popen(
                command, cwd=ROOT, env=ENVIRONMENT, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
            )
        self._root = psutil.Process(self._process.pid)

    @property
    def output(self) -> str:
        """What the processes have said so far."""
        return self._log.read_text(errors="replace")

    def ranks(self) -> dict[int, Any]:
        """The workers that torchrun started, as psutil processes by rank."""
        by_rank = {}
        for process in self.descendants():
            try:
                rank = process.environ().get("RANK")
            except psutil.Error:  # it ended meanwhile
                continue
            if rank is not None and process.ppid() == self._process.pid:
                by_rank[int(rank)] = process
        return by_rank

    def wait(self, limit_s: float) -> int:
        """The exit code; fails with what the run has said when the limit is over."""
        try:
            return self._process.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"no end after {limit_s} s:\n{self.output[-4000:]}") from None

    def wait_until(self, is_reached: Callable[[], bool], limit_s: float = 180.0) -> None:
        """Until the run has come so far; fails when it ends before, or the limit is over."""
        deadline = time.monotonic() + limit_s
        while not is_reached():
            assert self._process.poll() is None, f"ended early with {self._process.returncode}:\n{self.output[-4000:]}"
            assert time.monotonic() < deadline, f"not reached after {limit_s} s:\n{self.output[-4000:]}"
            time.sleep(0.02)

    def signal(self, number: int) -> None:
        """To the launcher alone."""
        self._process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL to the group, and to each worker's group: torchrun gives every worker a session of its own."""
        members = self.descendants()
        for leader in (self._process.pid, *(process.pid for process in members)):
            try:
                if os.getpgid(leader) == leader:
                    os.killpg(leader, signal.SIGKILL)
            except ProcessLookupError:
                continue
        psutil.wait_procs(members, timeout=10)
        self._process.wait(10)

    def interrupt(self) -> None:
        """Ctrl-C at the terminal: SIGINT to the group of torchrun."""
        os.killpg(self._process.pid, signal.SIGINT)

    def descendants(self) -> list[Any]:
        """All that run now, below torchrun."""
        try:
            return list(self._root.children(recursive=True))
        except psutil.NoSuchProcess:
            return []


Start = Callable[..., Ranks]


@pytest.fixture
def start(demo: Demo, tmp_path: Path) -> Iterator[Start]:
    """Start ``sdsearch train`` on two ranks with the demo's world and warm-started model; ended with the test."""
    with ExitStack() as stack:

        def begin(run_dir: Path, *overrides: str) -> Ranks:
            ranks = Ranks(train_arguments(demo, run_dir, *overrides), tmp_path / f"{run_dir.name}.log")
            return stack.enter_context(ranks)

        yield begin


TORCHRUN_TRAIN = "-m torch.distributed.run --standalone --nproc-per-node=2 -m megatron_sdsearch train".split()


def train_arguments(demo: Demo, run_dir: Path, *overrides: str) -> list[str]:
    """Two ranks on a small share of the demo's questions, with whatever a resume could get wrong switched on."""
    world = demo.out / "world"
    return [
        str(ROOT / "examples/tiny/config.yaml"),
        f"run_dir={run_dir}",
        f"seed={DEMO_SEED}",
        f"model.hf_dir={demo.out / 'warm_start' / 'hf'}",
        f"data.train={world / 'train.jsonl'}",
        f"data.heldout={world / 'heldout.jsonl'}",
        f"retrieval.corpus={world / 'corpus.jsonl'}",
        "data.questions_per_step=4",
        "rollout.group_size=4",
        "train.trajectories_per_minibatch=8",  # two updates a step: old log-probabilities take part
        "objective.alpha_warmup_steps=1",
        "optimizer.schedule=cosine",  # the learning rate depends on the scheduler's state
        "optimizer.warmup_steps=3",
        "checkpoint.every=1",
        "evaluation.every=0",
        "telemetry.query_probe=false",
        *overrides,
    ]


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
