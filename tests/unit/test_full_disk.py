"""A disk that fills up under a run: one error with the path and the room, and what was written before is whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_sdsearch.errors import StorageError
from megatron_sdsearch.files import replacing_folder, write_file
from megatron_sdsearch.logging import MetricsLog, TrajectoryLog
from megatron_sdsearch.logging.metrics import read_metrics
from megatron_sdsearch.logging.trajectories import step_files
from megatron_sdsearch.records import (
    ContextSpan,
    HindsightBlock,
    Question,
    RolloutGroup,
    Score,
    Trajectory,
    TrajectoryId,
    TrajectoryStatus,
)
from megatron_sdsearch.report.page import write_page
from megatron_sdsearch.training.stop_request import write_stopped
from tests.unit.full_disk import full_disk

SAYS_WHAT_TO_DO = r"cannot be written \(File too large\): .*are free on /.*; make room or fix the permissions"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def log_trajectories(run_dir: Path, step: int, resume_step: int = 0) -> None:
    group = RolloutGroup(
        question=Question(question_id="q", text="Q?", gold_answers=("x",)),
        trajectories=(
            Trajectory(
                trajectory_id=TrajectoryId(step=step, question_id="q", sibling=0),
                spans=(ContextSpan(kind="prompt", token_ids=(81,) * 100),),
                status=TrajectoryStatus.NO_ANSWER,
            ),
        ),
        scores=(Score(f1=0.0, em=0.0, reward=0.0, is_correct=False),),
    )
    block = HindsightBlock(text="", teacher_prompt_ids=(1,), sources=(), dropped=(), leaks=())
    log = TrajectoryLog(run_dir, lambda ids: "".join(map(chr, ids)), resume_step=resume_step)
    log.write(step, [group], [[0.0]], [[block]])


def test_trajectories_that_do_not_fit_leave_neither_a_file_nor_a_part_of_one(tmp_path: Path) -> None:
    log_trajectories(tmp_path, 1)
    whole = (tmp_path / "trajectories/step_000001.jsonl").read_bytes()
    with full_disk(200), pytest.raises(StorageError, match=rf"step_000002\.jsonl {SAYS_WHAT_TO_DO}") as caught:
        log_trajectories(tmp_path, 2, resume_step=1)
    assert f"it needs {len(whole) / 1e3:.1f} kB, " in str(caught.value)
    assert names(tmp_path / "trajectories") == ["step_000001.jsonl"]
    assert (tmp_path / "trajectories/step_000001.jsonl").read_bytes() == whole


def test_what_a_process_left_that_was_killed_while_it_wrote_is_no_step_and_goes(tmp_path: Path) -> None:
    log_trajectories(tmp_path, 1)
    (tmp_path / "trajectories/.step_000009.jsonl.tmp").write_text("{")
    assert [path.name for path in step_files(tmp_path)] == ["step_000001.jsonl"]
    log_trajectories(tmp_path, 2, resume_step=1)
    assert names(tmp_path / "trajectories") == ["step_000001.jsonl", "step_000002.jsonl"]


@pytest.mark.parametrize("step", [1, 2], ids=["more of the last step", "the next step"])
def test_metrics_that_do_not_fit_leave_the_lines_before_them(tmp_path: Path, step: int) -> None:
    log = MetricsLog(tmp_path, tensorboard=False)
    log.log(1, {"train/em": 0.5})
    size = (tmp_path / "metrics.jsonl").stat().st_size
    with full_disk(size + 5), pytest.raises(StorageError, match=rf"metrics\.jsonl {SAYS_WHAT_TO_DO}"):
        log.log(step, {"eval/em": 0.123456789, "eval/f1": 0.987654321})
    log.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "train/em": 0.5}\n'
    assert read_metrics(tmp_path) == [{"step": 1, "train/em": 0.5}]


def test_tensorboard_that_does_not_fit_is_the_same_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = MetricsLog(tmp_path, tensorboard=True)
    (events,) = (tmp_path / "tensorboard").iterdir()
    (tmp_path / "metrics.jsonl").unlink()  # it is to be the events that do not fit
    with full_disk(events.stat().st_size + 10), pytest.raises(StorageError, match=rf"tensorboard {SAYS_WHAT_TO_DO}"):
        log.log(1, {"a": 1})
    log.close()
    assert capfd.readouterr().err == ""


def page(run_dir: Path) -> None:
    (run_dir / "metrics.jsonl").write_text('{"step": 1}\n')
    write_page(run_dir)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "stopped.json": lambda run_dir: write_stopped(run_dir, "SIGTERM", 3),
    "report.html": page,
    "small": lambda run_dir: write_file(run_dir / "small", json.dumps({"a": "b" * 100})),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_is_replaced_whole_or_stays_as_it_was(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("before")
    with full_disk(20), pytest.raises(StorageError, match=rf"{name} {SAYS_WHAT_TO_DO}"):
        WRITERS[name](tmp_path)
    assert (tmp_path / name).read_text() == "before"
    assert not list(tmp_path.glob("*.tmp"))
    WRITERS[name](tmp_path)
    assert (tmp_path / name).read_text() != "before"


def test_a_file_in_a_folder_that_is_not_there_is_the_same_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"nowhere/file cannot be written \(No such file or directory\)"):
        write_file(tmp_path / "nowhere/file", "x")


def test_a_folder_is_replaced_whole_or_stays_as_it_was(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    (tmp_path / ".old_folder").mkdir()  # left by a process that was killed
    for content in ("first", "second"):
        with replacing_folder(target) as partial:
            partial.mkdir()
            (partial / content).touch()
        assert names(target) == [content]
    with pytest.raises(FileNotFoundError), replacing_folder(target) as partial:
        (partial / "below").mkdir()
    with pytest.raises(FileNotFoundError), replacing_folder(target):
        pass  # there is nothing to put in its position
    assert names(target) == ["second"]
    assert names(tmp_path) == ["folder"]
