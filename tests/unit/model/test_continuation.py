"""A setting that changed in mid-run: the refusal says how to go on from the weights all the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_sdsearch.config import RunConfig, parse_config
from megatron_sdsearch.model.checkpoint_folder import continuation_problems

FOLDER = Path("runs/mine/checkpoints/step_000007")


def config(**changes: Any) -> RunConfig:
    tree: dict[str, Any] = {
        "run_dir": "runs/mine",
        "model": {"hf_dir": "models/small"},
        "data": {"train": "t.jsonl"},
        "retrieval": {"corpus": "c.jsonl"},
    }
    for name, value in changes.items():
        tree[name] = tree.get(name, {}) | value if isinstance(value, dict) else value
    return parse_config(tree)


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"rollout": {"group_size": 8}}, "rollout.group_size = 5, this run has 8"),
        ({"seed": 2}, "seed = 1, this run has 2"),
        ({"data": {"train": "u.jsonl"}}, "data.train = t.jsonl, this run has u.jsonl"),
    ],
)
def test_a_changed_setting_can_be_taken_to_another_run(changes: dict[str, Any], difference: str) -> None:
    manifest = {"step": 7, "config": config().model_dump(mode="json")}
    (problem,) = continuation_problems(FOLDER, manifest, config(**changes))
    assert str(problem) == (
        f"{FOLDER} was trained with {difference}: set it back, or take another run_dir, where "
        f"model.megatron_dir={FOLDER} starts from these weights"
    )


def test_of_another_network_no_weights_can_be_taken() -> None:
    manifest = {"step": 7, "config": config().model_dump(mode="json")}
    (problem,) = continuation_problems(FOLDER, manifest, config(model={"hf_dir": "models/large"}))
    assert "model.megatron_dir" not in str(problem)
    assert str(problem).endswith("this run has large: set it back, or take another run_dir")
