"""SIGKILL at any moment, start again with the same command: everything that follows is what it would have been.

On the smallest run there is: a random model, two ranks at tp=2, two questions a step. The model learns (an entropy
bonus moves every weight at every step) and samples at random. ``test_resume.py`` does it once on a model that searches.
"""

from __future__ import annotations

import io
import itertools
import json
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from examples.tiny.build_world import build
from tests.e2e.conftest import TORCHRUN_TRAIN, Run, read_rows
from tests.e2e.ranks import ROOT, Ranks

NUM_STEPS = 6
NUM_KILLS = 12
LIMIT_S = 100.0
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    build(folder, seed=3, num_demonstrations=8)
    return folder


def arguments(world: Path, run_dir: Path, *overrides: str) -> list[str]:
    return [
        str(ROOT / "examples/tiny/config.yaml"),
        f"run_dir={run_dir}",
        f"model.hf_dir={world / 'model'}",
        f"data.train={world / 'train.jsonl'}",
        f"data.heldout={world / 'heldout.jsonl'}",
        f"retrieval.corpus={world / 'corpus.jsonl'}",
        "data.questions_per_step=2",
        "rollout.group_size=2",
        "rollout.max_turns=1",
        "rollout.max_response_tokens=6",
        "train.trajectories_per_minibatch=2",
        f"train.num_steps={NUM_STEPS}",
        "objective.entropy_coef=0.1",
        "optimizer.lr=1e-3",
        "optimizer.schedule=cosine",
        "optimizer.warmup_steps=2",
        "evaluation.every=2",
        "evaluation.num_questions=2",
        "checkpoint.every=1",
        "checkpoint.keep_every=3",
        "telemetry.query_probe=false",
        "telemetry.progress=true",
        *overrides,
    ]


def everything(run_dir: Path) -> dict[str, Any]:
    """What a run leaves, without wall-clock times: metrics ``time/*``, and when TensorBoard's events were written.

    TensorBoard's scalars are those that it shows: earlier files may hold steps that were done again.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = [
        {name: value for name, value in row.items() if not name.startswith("time/")}
        for row in read_rows(run_dir / "metrics.jsonl")
    ]
    board = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    scalars = [
        (event.step, tag, event.value)
        for tag in board.Tags()["scalars"]
        for event in board.Scalars(tag)
        if not tag.startswith("time/")
    ]
    folders = sorted((run_dir / "checkpoints").glob("step_*"))
    return {
        "metrics": rows,
        "board": sorted(scalars),
        "trajectories": {p.name: p.read_bytes() for p in (run_dir / "trajectories").glob("*.jsonl")},
        "checkpoints": {folder.name: state_in(folder) for folder in folders},
        "pointers": {name: (run_dir / "checkpoints" / name).read_text() for name in ("latest", "best")},
        "leftovers": sorted(p.name for p in (run_dir / "checkpoints").glob(".*")),
        "weights": {
            name: tensor.numpy().tobytes() for name, tensor in load_file(run_dir / "hf/model.safetensors").items()
        },
    }


def state_in(folder: Path) -> dict[str, Any]:
    """Weights, moments, RNG of every rank, schedule, scores: by content, for equal objects need not pickle alike."""
    content: dict[str, Any] = {}
    _load_state_dict(content, FileSystemReader(folder), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    content["common"] = torch.load(folder / "common.pt", weights_only=True)
    content["scores"] = json.loads((folder / "manifest.json").read_text())["state"]["scores"]
    return {name: comparable(value) for name, value in content.items()}


def comparable(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return {name: comparable(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [comparable(item) for item in value]
    return value.getvalue() if isinstance(value, io.BytesIO) else value


@pytest.fixture(scope="module")
def uninterrupted(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    with Ranks(arguments(world, folder / "run"), folder / "log") as ranks:
        assert ranks.wait(LIMIT_S) == [0, 0], ranks.output[-4000:]
    return folder / "run"


def assert_same(run_dir: Path, uninterrupted: Path) -> None:
    ours, theirs = everything(run_dir), everything(uninterrupted)
    for part, expected in theirs.items():
        assert ours[part] == expected, part


def test_what_is_compared_would_show_a_difference(uninterrupted: Path, world: Path) -> None:
    content = everything(uninterrupted)
    assert {"step_000003", "step_000005", "step_000006"} <= content["checkpoints"].keys()
    assert content["pointers"]["best"] in content["checkpoints"]
    assert content["leftovers"] == []
    assert [row["step"] for row in content["metrics"]] == list(range(NUM_STEPS + 1))
    assert all(row["loss/grad_norm"] > 0 for row in content["metrics"] if row["step"] > 0)
    start = load_file(world / "model" / "model.safetensors")
    end = load_file(uninterrupted / "hf" / "model.safetensors")
    assert [name for name in end if torch.equal(start[name], end[name])] == []
    third, last = content["checkpoints"]["step_000003"], content["checkpoints"]["step_000006"]
    moments = [name for name in third if "exp_avg" in name]
    assert moments
    assert [name for name in moments if third[name] == last[name]] == []
    assert [name for name in third if name.startswith("rng")], sorted(third)


def test_a_finished_run_that_is_started_again_says_so_and_does_nothing(
    world: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    def content() -> dict[Path, bytes]:
        files = (path for path in uninterrupted.rglob("*") if path.is_file() and path.name != "run.lock")
        return {path: path.read_bytes() for path in files}

    before = content()
    with Ranks(arguments(world, uninterrupted, "optimizer.lr=0.5"), tmp_path / "log") as ranks:
        assert ranks.wait(LIMIT_S) == [0, 0], ranks.output[-4000:]
    assert f"finished at step {NUM_STEPS}: raise train.num_steps to continue\n" in ranks.output
    assert content() == before


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_kills_at_random_moments_change_nothing(seed: int, world: Path, uninterrupted: Path, tmp_path: Path) -> None:
    chance = random.Random(seed)
    run_dir, log = tmp_path / "run", tmp_path / "log"
    overrides = ["checkpoint.async_save=false"] if seed == 3 else []
    checkpoints, reached = run_dir / "checkpoints", set()
    num_killed = 0
    for number in itertools.count():
        if num_killed == NUM_KILLS:
            break
        kind = ("file", "partial", "delay")[number % 3]
        victims = chance.choice([[0], [1], [0, 1], [0, 1]])
        # On rank 0 a start takes 30 such calls, and a step 24; on rank 1 a step takes two.
        dies_at = (victims[0], chance.randint(1, 110 if victims[0] == 0 else 6)) if kind == "file" else None
        with Ranks(arguments(world, run_dir, *overrides), log, dies_at=dies_at) as ranks:
            if kind == "partial":
                ranks.wait_until(lambda: any(checkpoints.glob(".partial_*")))
                time.sleep(chance.choice([0.0, 0.01, 0.05]))
            elif kind == "delay":
                ranks.wait_until(lambda: (run_dir / "metrics.jsonl").exists())
                time.sleep(chance.uniform(0.0, 3.0))
            else:
                ranks.wait_until(lambda: False, LIMIT_S)
            ranks.kill(victims)
            ranks.end_like_torchrun()
        is_killed = -signal.SIGKILL in ranks.exit_codes
        assert is_killed or ranks.exit_codes == [0, 0], ranks.output[-4000:]
        num_killed += is_killed
        pointer = checkpoints / "latest"
        reached.add(pointer.read_text() if pointer.exists() else "nothing")
        if not is_killed:  # how far a run comes between two kills depends on the machine: begin another
            assert_same(run_dir, uninterrupted)
            shutil.rmtree(run_dir)
    assert len(reached) >= 3, f"{num_killed} kills should fall on different steps: {reached}"
    with Ranks(arguments(world, run_dir, *overrides), log) as ranks:
        assert ranks.wait(LIMIT_S) == [0, 0], ranks.output[-4000:]
    assert_same(run_dir, uninterrupted)


@pytest.mark.parametrize(("number", "victim"), [(signal.SIGTERM, 1), (signal.SIGUSR1, 0)])
def test_a_signal_saves_first(number: int, victim: int, world: Path, uninterrupted: Path, tmp_path: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    command = arguments(world, run_dir, "checkpoint.every=4")
    metrics = run_dir / "metrics.jsonl"
    with Ranks(command, log) as ranks:
        assert ranks.wait_until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 3)
        ranks.kill([victim], number)
        assert ranks.wait(LIMIT_S) == [0, 0], ranks.output[-4000:]
    assert "saved and stopped" in ranks.output
    stopped = json.loads((run_dir / "stopped.json").read_text())
    assert stopped["signal"] == signal.Signals(number).name
    assert f"Stopped after step {stopped['step']} ({stopped['signal']})" in (run_dir / "report.html").read_text()
    assert 2 <= stopped["step"] < 4, "no step is repeated, and none is waited for"
    assert (run_dir / "checkpoints" / "latest").read_text() == f"step_{stopped['step']:06d}"
    assert not (run_dir / "summary.json").exists()
    manifest_file = run_dir / "checkpoints" / f"step_{stopped['step']:06d}" / "manifest.json"
    manifest = json.loads(manifest_file.read_text())
    assert 0 < manifest["state"]["wall_s"] < LIMIT_S
    manifest["state"]["wall_s"] = 5000.0
    manifest_file.write_text(json.dumps(manifest))
    with Ranks(command, log) as ranks:
        assert ranks.wait(LIMIT_S) == [0, 0], ranks.output[-4000:]
    assert not (run_dir / "stopped.json").exists()
    assert f"continues from step {stopped['step']} of {NUM_STEPS}\n" in ranks.output, "and nothing has changed"
    assert len(json.loads((run_dir / "environment.json").read_text())) == 2
    wall_s = json.loads((run_dir / "summary.json").read_text())["rl_wall_s"]
    assert 5000 < wall_s < 5000 + LIMIT_S, "time adds up over processes"
    ours, theirs = everything(run_dir), everything(uninterrupted)
    for part in ("metrics", "board", "trajectories", "weights"):
        assert ours[part] == theirs[part], part
    assert ours["checkpoints"]["step_000006"] == theirs["checkpoints"]["step_000006"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_ranks_save_and_leave_when_torchrun_does(number: int, world: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    settings = arguments(world, run_dir, "train.num_steps=1000", "checkpoint.every=0", "evaluation.every=0")
    run = Run([sys.executable, *TORCHRUN_TRAIN, *settings], tmp_path / "log")
    try:
        metrics = run_dir / "metrics.jsonl"
        run.wait_until(lambda: metrics.exists() and metrics.stat().st_size > 0)
        ranks = list(run.ranks().values())
        run.signal(number)
        _, alive = psutil.wait_procs(ranks, timeout=60)
        assert alive == []
    finally:
        run.kill()
    stopped = json.loads((run_dir / "stopped.json").read_text())
    assert stopped["signal"] == ("SIGINT" if number == signal.SIGINT else "launcher gone")
    is_said = "SIGINT: stopping at the next boundary" in run.output
    assert is_said == (number == signal.SIGINT), "torchrun hands a Ctrl-C on"
    assert (run_dir / "checkpoints" / "latest").read_text() == f"step_{stopped['step']:06d}"


def test_a_full_disk_is_said_and_leaves_the_last_checkpoint(world: Path, uninterrupted: Path, tmp_path: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    with Ranks(arguments(world, run_dir), log) as ranks:
        assert ranks.wait_until(lambda: (run_dir / "checkpoints" / "latest").exists())
        ranks.kill([0, 1])
    latest = (run_dir / "checkpoints" / "latest").read_text()
    with Ranks(arguments(world, run_dir), log, max_file_bytes=60_000) as ranks:
        assert ranks.wait(LIMIT_S) == [1, 1], ranks.output[-4000:]
    assert f"step {int(latest.removeprefix('step_'))}'s is unharmed" in ranks.output
    assert "File too large" in ranks.output
    assert (run_dir / "checkpoints" / "latest").read_text() == latest
    with Ranks(arguments(world, run_dir), log) as ranks:
        assert ranks.wait(LIMIT_S) == [0, 0], ranks.output[-4000:]
    assert_same(run_dir, uninterrupted)


def test_a_second_run_in_a_live_folder_is_refused_and_a_killed_one_leaves_it_free(world: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    command = arguments(world, run_dir, "train.num_steps=1000", "checkpoint.keep_every=0", "evaluation.every=0")
    metrics = run_dir / "metrics.jsonl"

    def num_lines() -> int:
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    with Ranks(command, tmp_path / "first") as first:
        assert first.wait_until(lambda: num_lines() >= 2)
        holder = first.processes[0].pid
        with Ranks(command, tmp_path / "second") as second:
            second.wait_until(lambda: False)  # its second rank waits for the first, as long as no torchrun ends it
            assert second.exit_codes[0] == 2
        assert second.output.count(f"ConfigError: run_dir: {run_dir} is in use by process {holder} on") == 1
        reached = num_lines()
        assert first.wait_until(lambda: num_lines() >= reached + 2)
    latest = int((run_dir / "checkpoints" / "latest").read_text().removeprefix("step_"))
    with Ranks(command, tmp_path / "third") as third:
        assert third.wait_until(lambda: num_lines() > latest + 1)
    steps = [row["step"] for row in read_rows(metrics)]
    assert steps == list(range(1, steps[-1] + 1)), "it went on from where the first was killed"
