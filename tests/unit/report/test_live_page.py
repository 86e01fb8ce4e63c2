"""The page of a run that is still going: written when asked, and never the run's end."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from megatron_sdsearch.errors import ConfigError, TrainingError
from megatron_sdsearch.logging import MetricsLog, names
from megatron_sdsearch.report.page import live_page
from megatron_sdsearch.training.run_lock import lock_run_dir


def log_step(run_dir: Path, step: int) -> None:
    log = MetricsLog(run_dir, tensorboard=False, resume_step=step)
    log.log(step, {names.REWARD: 0.5})
    log.close()


def test_the_page_follows_the_run_from_its_first_evaluation_to_the_stop(tmp_path: Path) -> None:
    page_file = tmp_path / "report.html"
    with lock_run_dir(tmp_path), live_page(tmp_path) as refresh:
        MetricsLog(tmp_path, tensorboard=False).close()
        refresh()
        assert "Running: no step is done yet." in page_file.read_text()
        log_step(tmp_path, 3)
        refresh()
        assert "Running: step 3 is done." in page_file.read_text()
        (tmp_path / "stopped.json").write_text(json.dumps({"signal": "SIGTERM", "step": 3}))
        refresh()
        assert "Stopped after step 3 (SIGTERM) and saved" in page_file.read_text()


def test_a_failure_is_on_the_page_and_goes_on_upwards(tmp_path: Path) -> None:
    log_step(tmp_path, 2)
    with pytest.raises(TrainingError), live_page(tmp_path), lock_run_dir(tmp_path):
        raise TrainingError("loss/jsd is nan")
    assert "Failed or was killed after step 2" in (tmp_path / "report.html").read_text()


def test_a_refused_start_leaves_the_page_of_the_run_before_as_it_was(tmp_path: Path) -> None:
    log_step(tmp_path, 2)
    with pytest.raises(ConfigError), live_page(tmp_path), lock_run_dir(tmp_path), lock_run_dir(tmp_path):
        pass
    assert not (tmp_path / "report.html").exists()


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    log_step(tmp_path, 2)
    with live_page(tmp_path, is_writer=False) as refresh:
        refresh()
    with pytest.raises(TrainingError), live_page(tmp_path, is_writer=False):
        raise TrainingError("lost")
    assert not (tmp_path / "report.html").exists()


def test_what_spoils_the_page_is_one_warning_and_the_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log_step(tmp_path, 2)
    page_file = tmp_path / "report.html"
    page_file.mkdir()  # as good as a full disk: the file cannot be replaced
    with caplog.at_level(logging.WARNING), live_page(tmp_path) as refresh:
        refresh()
        refresh()
        (message,) = caplog.messages
        assert message.startswith(f"{page_file} is not up to date: StorageError: ")
        page_file.rmdir()
        refresh()
    assert "step 2 is done" in page_file.read_text(), "tried again each time"
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []
