"""The command line as a shell sees it: exit codes, and what is said where."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml
from rich.console import Console
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from typer.testing import CliRunner, Result

from megatron_sdsearch import cli
from megatron_sdsearch.config import RunConfig, parse_config
from megatron_sdsearch.errors import TrainingError
from megatron_sdsearch.logging import MetricsLog, ProgressDisplay
from megatron_sdsearch.training.loop import Outcome

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
    ("arguments", "expected"),
    [
        (("train", "nowhere.yaml"), "nowhere.yaml does not exist"),
        (("train", "config.yaml"), "model holds no config.json"),
        (("evaluate", "config.yaml", "seed=x", "--model", "hf"), "seed: 'x'"),
        (("plan", "config.yaml"), "model holds no config.json"),
    ],
)
def test_other_mistakes_exit_2_as_well(config: Path, arguments: tuple[str, ...], expected: str) -> None:
    assert_refused(sdsearch(config.parent, *arguments), expected)


def test_a_rank_that_is_not_the_first_speaks_when_no_other_did(config: Path) -> None:
    start = time.monotonic()
    assert_refused(sdsearch(config.parent, "train", str(config), "seed=x", rank=1), "seed")
    assert time.monotonic() - start > 5, "the first rank has the time to speak"


def test_evaluate_without_a_model_folder_exits_2(config: Path) -> None:
    done = sdsearch(config.parent, "evaluate", str(config), "--model", "nothing/here")
    assert_refused(done, "--model", "nothing/here holds no config.json", "give a Hugging Face model folder")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), ("train", "evaluate", "plan")),
        (("train",), ("CONFIG", "KEY=VALUE")),
        (("evaluate",), ("CONFIG", "--model")),
        (("plan",), ("CONFIG", "--hardware", "--json")),
    ],
)
def test_help_names_commands_and_arguments(
    tmp_path: Path, arguments: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    done = sdsearch(tmp_path, *arguments, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    for part in expected:
        assert part in done.stdout


@pytest.mark.parametrize("arguments", [("train",), ("evaluate", "config.yaml"), ("sing",), ("train", "--loud")])
def test_a_wrong_command_line_exits_2_with_its_usage(config: Path, arguments: tuple[str, ...]) -> None:
    done = sdsearch(config.parent, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Usage: ")


def raised(error: BaseException) -> BaseException:
    """With a traceback."""
    try:
        raise error
    except BaseException as caught:  # noqa: BLE001
        return caught


class Left(Exception):
    """Stands for the end of the process."""


@pytest.fixture
def fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ProcessFailure]:
    """A rank under torchrun whose work raises; what torchrun then knows of it."""

    def leave(code: int) -> NoReturn:
        raise Left(code)

    def failure(rank: int, error: BaseException, *, is_first: bool = True) -> ProcessFailure:
        path = tmp_path / f"error_{rank}.json"
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
        monkeypatch.setattr(cli, "_exit", leave)
        monkeypatch.setattr(cli, "_is_first_to_fail", lambda: is_first)
        with pytest.raises(Left) as left:
            cli._fail(raised(error), failure=1)
        return ProcessFailure(local_rank=rank, pid=1, exitcode=left.value.args[0], error_file=str(path))

    return failure


def test_torchruns_report_ends_with_the_message_of_the_rank_that_failed_first(
    fail: Callable[..., ProcessFailure], capsys: pytest.CaptureFixture[str]
) -> None:
    cause = fail(1, TrainingError("not finite: loss=nan"))
    follower = fail(0, RuntimeError("[pair.cc:534] Connection closed by peer [127.0.0.1]:1"), is_first=False)
    said = capsys.readouterr().err
    assert said == "TrainingError: not finite: loss=nan\n", "said once, and not as a traceback"
    report = ChildFailedError("run", {0: follower, 1: cause}).format_msg().splitlines()
    assert report[-2] == "  traceback : TrainingError: not finite: loss=nan"


def test_a_rank_that_was_killed_is_the_cause_and_not_the_peer_that_lost_it(
    fail: Callable[..., ProcessFailure], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peer = fail(0, RuntimeError("[pair.cc:534] Connection closed by peer [127.0.0.1]:1"))
    assert "Traceback" not in capsys.readouterr().err
    killed = ProcessFailure(local_rank=1, pid=7, exitcode=-9, error_file=str(tmp_path / "nothing"))
    report = ChildFailedError("run", {0: peer, 1: killed}).format_msg().splitlines()
    assert report[-2] == "  traceback : Signal 9 (SIGKILL) received by PID 7"


def test_a_fault_of_ours_comes_with_its_traceback_to_torchrun_as_well(fail: Callable[..., ProcessFailure]) -> None:
    message = fail(0, ZeroDivisionError("x")).message
    assert message["extraInfo"]["py_callstack"].startswith("Traceback")  # type: ignore[index]
    assert message["extraInfo"]["py_callstack"].endswith("ZeroDivisionError: x")  # type: ignore[index]


def test_ctrl_c_with_nothing_to_save_is_one_line(
    fail: Callable[..., ProcessFailure], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert fail(0, KeyboardInterrupt()).exitcode == 130
    assert capsys.readouterr().err == "interrupted, with nothing to save at this point\n"


def of_run(run_dir: Path, **sections: Any) -> RunConfig:
    return parse_config({**RIGHT, "run_dir": str(run_dir)} | sections)


def test_the_first_line_names_what_is_known_before_torch_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    loaded = of_run(Path("runs/x"), parallel={"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2})
    line = cli._first_line(Path("c.yaml"), loaded)
    assert line == "sdsearch train: c.yaml -> runs/x; 8 ranks: TP 2 x PP 2 x DP 2"


def test_the_last_lines_name_what_is_there_and_the_next_command(tmp_path: Path) -> None:
    for name in ("report.html", "config.yaml", "hf", "checkpoints/step_000004"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "config.yaml").rmdir()
    (tmp_path / "config.yaml").write_text(
        "# Written by `sdsearch train` at every start: all settings, defaults included.\n"
    )
    rows = [{"step": n, "time/step": 1.0, "train/share_without_advantage": 1.0} for n in range(1, 6)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = cli._last_lines(of_run(tmp_path), Outcome(step=4, summary={"steps": 4}))
    contrast, gradient, *paths = lines
    assert contrast.startswith("WARNING: no group had contrast for 5 steps")
    assert gradient.startswith("WARNING: the gradient was exactly 0")
    assert [line.split(maxsplit=1) for line in paths] == [
        ["page:", f"{tmp_path}/report.html"],
        ["model:", f"{tmp_path}/hf"],
        ["checkpoint:", f"{tmp_path}/checkpoints/step_000004"],
        ["next:", f"sdsearch evaluate {tmp_path}/config.yaml --model {tmp_path}/hf"],
    ]
    again = cli._last_lines(of_run(tmp_path), Outcome(step=4))
    assert again == ["finished at step 4: raise train.num_steps to continue", *paths]


def test_a_stopped_run_says_what_is_saved(tmp_path: Path) -> None:
    def lines(step: int) -> list[str]:
        return cli._last_lines(of_run(tmp_path), Outcome(step=step, stopped_by="SIGINT"))

    assert lines(7) == ["saved and stopped at step 7 (SIGINT); the same command continues from here"]
    assert lines(0)[0].startswith("stopped before the first step, with nothing to save (SIGINT)")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_warning_goes_above_the_progress_bar_and_not_into_it(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, errors = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stderr", errors)
    handler = cli._StandardError()
    record = logging.LogRecord("x", logging.WARNING, "", 0, "no group had contrast", (), None)
    with closing(ProgressDisplay(3, console=Console(file=drawn, force_terminal=True, width=80))):
        handler.emit(record)
    assert "no group had contrast\n" in drawn.getvalue(), "drawn with the bar, which is drawn anew below it"
    assert errors.getvalue() == ""
    handler.emit(record)
    assert errors.getvalue() == "no group had contrast\n"


# --- report: in process, for it loads no torch ----------------------------------------------------------------------


def report(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Result:
    monkeypatch.setattr("os._exit", sys.exit)  # the test's process goes on
    return CliRunner().invoke(cli.app, ["report", *arguments])


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
    ("arguments", "expected"),
    [
        (("~/nowhere",), "nowhere/metrics.jsonl does not exist; give the folder of a run (its run_dir)"),
        (("~/run/metrics.jsonl",), "metrics.jsonl/metrics.jsonl does not exist"),
        (("~/run", "--out", "~/no/folder/page.html"), "page.html cannot be written (No such file or directory)"),
        (("~/run", "--out", "~/run"), "run cannot be written: it is a folder; give the name of a file"),
    ],
)
def test_report_refuses_what_is_no_run_and_no_place_for_a_page(
    arguments: tuple[str, ...], expected: str, killed_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = report(monkeypatch, *arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(("DataError: ", "StorageError: "))
    assert expected in line
