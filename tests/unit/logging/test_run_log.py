"""What a run says of itself while it goes, and when a start has nothing left to do."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from megatron_sdsearch.config import RunConfig, parse_config
from megatron_sdsearch.errors import CheckpointError, ConfigError
from megatron_sdsearch.logging import MetricsLog, names
from megatron_sdsearch.logging.metrics import read_metrics
from megatron_sdsearch.logging.run_log import RunLog
from megatron_sdsearch.logging.summary import write_summary
from megatron_sdsearch.training.run_record import is_finished


class OnlyRank:
    """Stands for ParallelState."""

    is_main = True
    tp_size = pp_size = dp_size = 1


RANK: Any = OnlyRank()
NO_RENDERER: Any = None


def config(run_dir: Path, **sections: Any) -> RunConfig:
    tree: dict[str, Any] = {
        "run_dir": str(run_dir),
        "model": {"hf_dir": "m"},
        "data": {"train": "t", "heldout": "h"},
        "retrieval": {"corpus": "c"},
        "train": {"num_steps": 4},
        "evaluation": {"every": 2},
        "telemetry": {"tensorboard": False, "trajectories": False, "progress": False},
    }
    return parse_config(tree | sections)


@pytest.fixture
def done(tmp_path: Path) -> Path:
    """The folder of a run of 4 steps that has come to its end."""
    newest = tmp_path / "checkpoints" / "step_000004"
    newest.mkdir(parents=True)
    manifest = {"step": 4, "config": config(tmp_path).model_dump(mode="json"), "layout": {}, "files": {}}
    (newest / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "checkpoints" / "latest").write_text("step_000004")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    (tmp_path / "summary.json").write_text("{}")
    log = MetricsLog(tmp_path, tensorboard=False)
    log.log(4, {names.EVAL_EM: 0.5})
    log.close()
    return tmp_path


def test_a_run_that_has_all_that_is_asked_for_is_finished(done: Path) -> None:
    assert is_finished(config(done))
    assert not is_finished(config(done, train={"num_steps": 5}))
    assert is_finished(config(done, optimizer={"lr": 1e-4}))


@pytest.mark.parametrize("missing", ["summary.json", "hf/config.json", "metrics.jsonl", "checkpoints/latest"])
def test_a_run_that_was_killed_before_its_very_end_is_not(missing: str, done: Path) -> None:
    (done / missing).unlink()
    assert is_finished(config(done)) == (missing == "checkpoints/latest"), "without it the newest one counts"


def test_what_was_not_asked_for_before_is_still_to_be_done(done: Path) -> None:
    (done / "hf" / "config.json").unlink()
    (done / "metrics.jsonl").unlink()
    assert is_finished(config(done, evaluation={"every": 0}, checkpoint={"export_hf": False}))
    assert not is_finished(config(done, checkpoint={"export_hf": False}))


def test_another_run_in_the_folder_of_a_finished_one_is_refused_and_its_summary_stays(done: Path) -> None:
    with pytest.raises(CheckpointError, match=r"trained with objective.alpha = 0.001, this run has 0.0"):
        is_finished(config(done, objective={"alpha": 0}))
    assert (done / "summary.json").exists()


def test_without_progress_nothing_is_shown_and_metrics_are_written(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with RunLog(config(tmp_path), RANK, 0, NO_RENDERER) as log, log.timer.phase("update"):
        log.step(1, {names.REWARD: 0.5}, 10)
    assert capfd.readouterr().out == ""
    assert [row[names.REWARD] for row in read_metrics(tmp_path)] == [0.5]


def values(share: float) -> dict[str, float]:
    return {names.SHARE_WITHOUT_ADVANTAGE: share, names.GRAD_NORM: 0.25}


def test_steps_without_contrast_are_counted_over_starts_and_come_into_the_summary(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = config(tmp_path, evaluation={"every": 0}, train={"num_steps": 6})

    def run(steps: range, first_step: int, share: float = 1.0) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING), RunLog(settings, RANK, first_step, NO_RENDERER) as log:
            for step in steps:
                with log.timer.phase("update"):
                    log.step(step, values(share), 10)
        return [record.getMessage() for record in caplog.records]

    assert run(range(1, 5), 0) == []
    assert run(range(3, 5), 2) == [], "steps beyond the checkpoint are done again, and count once"
    (line,) = run(range(5, 6), 4)
    assert line.startswith("no group had contrast for 5 steps (1 to 5)")
    assert run(range(6, 7), 5, share=0.5) == []
    summary = write_summary(settings, RANK, 1.0)
    assert (summary["steps_without_contrast"], summary["steps_without_gradient"]) == (5, 0)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert len(read_metrics(tmp_path)) == 6


def test_a_finished_run_without_its_checkpoints_is_not_begun_anew(tmp_path: Path) -> None:
    """It would cut its metrics and trajectories off, and take its summary away."""
    assert not is_finished(config(tmp_path))
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds a finished run without checkpoints"):
        is_finished(config(tmp_path))
