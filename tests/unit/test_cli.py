"""The command line as a shell sees it: exit codes, and what is said where."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from megatron_sdsearch.cli import app
from megatron_sdsearch.telemetry import MetricsLog

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
        (("train", "config.yaml"), "model/config.json does not exist"),
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
    assert_refused(done, "--model", "nothing/here holds no config.json", "give a Hugging Face folder")


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


# --- report: in process, for it loads no torch ----------------------------------------------------------------------


def report(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Result:
    monkeypatch.setattr("os._exit", sys.exit)  # the test's process goes on
    return CliRunner().invoke(app, ["report", *arguments])


@pytest.fixture
def killed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    log = MetricsLog(tmp_path / "run", tensorboard=False)
    log.log(3, {"train/reward": 0.5})
    log.close()
    return tmp_path / "run"


def test_report_writes_the_page_of_a_killed_run_and_prints_its_path(
    killed_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = report(monkeypatch, "~/run")
    assert (done.exit_code, done.stdout) == (0, f"{killed_run}/report.html\n")
    assert "killed after step 3" in (killed_run / "report.html").read_text()


def test_report_writes_to_another_file_on_request(killed_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = report(monkeypatch, str(killed_run), "--out", "~/page.html")
    assert (done.exit_code, done.stdout) == (0, f"{killed_run.parent}/page.html\n")
    assert not (killed_run / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("~/nowhere",), "nowhere/metrics.jsonl does not exist; give the folder of a run (its run_dir)"),
        (("~/run/metrics.jsonl",), "metrics.jsonl/metrics.jsonl does not exist"),
        (("~/run", "--out", "~/no/folder/page.html"), "No such file or directory; the run must be readable, and --out"),
        (("~/run", "--out", "~/run"), "Is a directory; the run must be readable, and --out"),
    ],
)
def test_report_refuses_what_is_no_run_and_no_place_for_a_page(
    arguments: tuple[str, ...], told: str, killed_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = report(monkeypatch, *arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("DataError: ")
    assert told in line
