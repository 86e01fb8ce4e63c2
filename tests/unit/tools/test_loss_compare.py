"""Two runs that computed the same, and runs that did not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tools.loss_compare import compare_runs

METRICS = [{"step": 1, "loss/total": 0.25, "time/step": 1.0}, {"step": 2, "loss/total": float("nan")}]
TRAJECTORY = {"question_id": "q", "sibling": 0, "spans": [{"token_ids": [1, 2], "logprobs": [-0.5, -0.25]}]}


def write_run(folder: Path, metrics: list[dict[str, Any]], trajectory: dict[str, Any], weight: float) -> Path:
    (folder / "trajectories").mkdir(parents=True)
    (folder / "hf").mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    (folder / "trajectories" / "step_000001.jsonl").write_text(json.dumps(trajectory) + "\n")
    save_file({"w": torch.tensor([1.0, weight])}, folder / "hf" / "model.safetensors")
    return folder


def test_equal_runs_differ_in_seconds_alone(tmp_path: Path) -> None:
    before = write_run(tmp_path / "a", METRICS, TRAJECTORY, 2.0)
    after = write_run(tmp_path / "b", [METRICS[0] | {"time/step": 9.0}, METRICS[1]], TRAJECTORY, 2.0)
    report = compare_runs(before, after, 0.0, ["time/*"])
    assert report["equal"]
    assert (report["num_metric_rows"], report["num_trajectory_files"], report["num_tensors"]) == (2, 1, 1)


@pytest.mark.parametrize(
    ("metrics", "trajectory", "weight", "place"),
    [
        ([METRICS[0] | {"loss/total": 0.25 + 2**-53}, METRICS[1]], TRAJECTORY, 2.0, "metrics[0].loss/total"),
        (METRICS[:1], TRAJECTORY, 2.0, "metrics: 2 entries before, 1 after"),
        ([METRICS[0] | {"loss/kl": 0.0}, METRICS[1]], TRAJECTORY, 2.0, "metrics[0].loss/kl: only after"),
        (METRICS, TRAJECTORY | {"spans": [{"token_ids": [1, 3], "logprobs": [-0.5, -0.25]}]}, 2.0, "token_ids[1]"),
        (METRICS, TRAJECTORY, 2.0 + 2**-22, "hf/w: differs by up to 2.38e-07"),
    ],
)
def test_each_difference_is_named(
    tmp_path: Path, metrics: list[dict[str, Any]], trajectory: dict[str, Any], weight: float, place: str
) -> None:
    before = write_run(tmp_path / "a", METRICS, TRAJECTORY, 2.0)
    report = compare_runs(before, write_run(tmp_path / "b", metrics, trajectory, weight), 0.0, ["time/*"])
    assert not report["equal"]
    assert report["num_differences"] == 1
    assert place in report["differences"][0]


def test_a_tolerance_is_relative_to_the_tensor(tmp_path: Path) -> None:
    before = write_run(tmp_path / "a", METRICS, TRAJECTORY, 2.0)
    after = write_run(tmp_path / "b", METRICS, TRAJECTORY, 2.0 + 2**-22)
    assert compare_runs(before, after, 1e-6, [])["equal"]
    assert not compare_runs(before, after, 1e-8, [])["equal"]
