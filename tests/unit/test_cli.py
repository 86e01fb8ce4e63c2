"""The command line as a shell sees it: exit codes, and what is said where."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
RIGHT = {
    "run_dir": "run",
    "model": {"hf_dir": "model"},
    "data": {"train": "train.jsonl", "heldout": "heldout.jsonl"},
    "retrieval": {"corpus": "corpus.jsonl"},
}


def sdsearch(folder: Path, *arguments: str, rank: int | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "120", "NO_COLOR": "1"}
    environment.pop("RANK", None)
    if rank is not None:
        environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    command = [sys.executable, "-m", "megatron_sdsearch", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(RIGHT))
    return path


def assert_refused(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert done.returncode == 2
    assert done.stdout == ""
    first = done.stderr.split("\n")[0]
    assert first.startswith("ConfigError: ")
    for part in parts:
        assert part in first
    assert "Traceback" not in done.stderr


def test_a_wrong_setting_exits_2_with_the_message_first_and_soon(config: Path) -> None:
    start = time.monotonic()
    done = sdsearch(config.parent, "train", str(config), "objective.alpa=1")
    assert time.monotonic() - start < 20  # 1.4 s on a quiet machine
    assert_refused(done, "objective.alpa", "did you mean alpha?")
    assert len(done.stderr.splitlines()) == 1
    assert not (config.parent / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("train", "nowhere.yaml"), "nowhere.yaml does not exist"),
        (("train", "config.yaml"), "model holds no config.json"),
        (("evaluate", "config.yaml", "seed=x", "--model", "hf"), "seed: 'x'"),
        (("plan", "config.yaml"), "model holds no config.json"),
    ],
)
def test_other_mistakes_exit_2_as_well(config: Path, arguments: tuple[str, ...], told: str) -> None:
    assert_refused(sdsearch(config.parent, *arguments), told)


def test_a_rank_that_is_not_the_first_speaks_when_nobody_else_did(config: Path) -> None:
    start = time.monotonic()
    assert_refused(sdsearch(config.parent, "train", str(config), "seed=x", rank=1), "seed")
    assert time.monotonic() - start > 5, "the first rank has the time to speak"


def test_evaluate_without_a_model_folder_exits_2(config: Path) -> None:
    done = sdsearch(config.parent, "evaluate", str(config), "--model", "nothing/here")
    assert_refused(done, "--model", "nothing/here holds no config.json", "give a Hugging Face model folder")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), ("train", "evaluate", "plan")),
        (("train",), ("CONFIG", "KEY=VALUE")),
        (("evaluate",), ("CONFIG", "--model")),
        (("plan",), ("CONFIG", "--hardware", "--json")),
    ],
)
def test_help_names_commands_and_arguments(tmp_path: Path, arguments: tuple[str, ...], told: tuple[str, ...]) -> None:
    done = sdsearch(tmp_path, *arguments, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    for part in told:
        assert part in done.stdout


@pytest.mark.parametrize("arguments", [("train",), ("evaluate", "config.yaml"), ("sing",), ("train", "--loud")])
def test_a_wrong_command_line_exits_2_with_its_usage(config: Path, arguments: tuple[str, ...]) -> None:
    done = sdsearch(config.parent, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Usage: ")
