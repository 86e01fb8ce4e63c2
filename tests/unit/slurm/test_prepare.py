"""What a job finds out before its GPUs work: which node does what, and whether it has got on since its last start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_sdsearch.config import RunConfig, parse_config
from megatron_sdsearch.errors import ConfigError, TrainingError
from slurm.prepare import Allocation, Roles, assign_roles, count_start


def config(*, dtype: str = "bfloat16", tensor: int = 1, pipeline: int = 1, **sglang: Any) -> RunConfig:
    """Samples from SGLang when something is said of it."""
    engine = "sglang" if sglang else "embedded"
    return parse_config(
        {
            "run_dir": "runs/x",
            "model": {"hf_dir": "model", "dtype": dtype},
            "parallel": {"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline},
            "data": {"train": "train.jsonl"},
            "rollout": {"engine": engine, "sglang": sglang},
            "retrieval": {"corpus": "corpus.jsonl"},
        }
    )


def nodes(count: int, *, gpus: int = 8, serve: int = 0, ranks: int | None = None) -> Allocation:
    return Allocation(num_nodes=count, num_gpus=gpus, num_sglang_nodes=serve, ranks_per_node=ranks)


@pytest.mark.parametrize(
    ("settings", "given", "expected"),
    [
        ({}, nodes(4), Roles(train=4, serve=0, ranks=8)),
        ({"tensor": 8, "pipeline": 2}, nodes(4), Roles(train=4, serve=0, ranks=8)),
        ({"num_servers": 1}, nodes(4, serve=1), Roles(train=3, serve=1, ranks=8)),
        ({"colocated": True}, nodes(2), Roles(train=2, serve=2, ranks=8)),
        ({"urls": ["http://a:1"]}, nodes(2), Roles(train=2, serve=0, ranks=8)),
        ({"num_servers": 2, "tensor": 2, "sglang_tensor": 2}, nodes(1), Roles(train=1, serve=0, ranks=4)),
        ({}, nodes(2, ranks=4), Roles(train=2, serve=0, ranks=4)),
        ({"dtype": "float32"}, nodes(2, gpus=0), Roles(train=2, serve=0, ranks=1)),
        ({"dtype": "float32"}, nodes(2, gpus=0, ranks=2), Roles(train=2, serve=0, ranks=2)),
    ],
)
def test_roles(settings: dict[str, Any], given: Allocation, expected: Roles) -> None:
    assert assign_roles(_with_server_tensor(settings), given) == expected


@pytest.mark.parametrize(
    ("settings", "given", "field"),
    [
        ({"num_servers": 1}, nodes(2, serve=2), "SDSEARCH_SGLANG_NODES"),
        ({"num_servers": 1}, nodes(2, serve=3), "SDSEARCH_SGLANG_NODES"),
        ({"num_servers": 1}, nodes(2), "SDSEARCH_SGLANG_NODES"),
        ({}, nodes(2, serve=1), "SDSEARCH_SGLANG_NODES"),
        ({"urls": ["http://a:1"]}, nodes(2, serve=1), "SDSEARCH_SGLANG_NODES"),
        ({"colocated": True}, nodes(2, serve=1), "SDSEARCH_SGLANG_NODES"),
        ({"sglang_tensor": 16}, nodes(2, serve=1), "rollout.sglang.tp_size"),
        ({"num_servers": 8}, nodes(1), "SDSEARCH_RANKS_PER_NODE"),
        ({}, nodes(2, ranks=9), "SDSEARCH_RANKS_PER_NODE"),
        ({"tensor": 8, "pipeline": 3}, nodes(4), "parallel.tensor_model_parallel_size"),
        ({}, nodes(2, gpus=0), "model.dtype"),
    ],
)
def test_roles_that_do_not_fit(settings: dict[str, Any], given: Allocation, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        assign_roles(_with_server_tensor(settings), given)
    assert caught.value.field == field


def _with_server_tensor(settings: dict[str, Any]) -> RunConfig:
    """``tensor`` is the trainer's, ``sglang_tensor`` each server's."""
    size = settings.get("sglang_tensor")
    rest = {name: value for name, value in settings.items() if name != "sglang_tensor"}
    if size is None:
        return config(**rest)
    first = config(**{"num_servers": 1, **rest})
    sglang = first.rollout.sglang.model_copy(update={"tp_size": size})
    return first.model_copy(update={"rollout": first.rollout.model_copy(update={"sglang": sglang})})


def saved(run_dir: Path, step: int) -> None:
    (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    (run_dir / "checkpoints" / "latest").write_text(f"step_{step:06d}")


def test_starts_that_get_nowhere_are_counted_until_one_is_too_many(tmp_path: Path) -> None:
    assert [count_start(tmp_path, 7, restart, 2) for restart in (0, 1)] == [0, 0]
    with pytest.raises(TrainingError, match="job 7 has begun 2 times at step 0"):
        count_start(tmp_path, 7, 2, 2)


def test_a_start_that_has_got_on_begins_the_count_anew(tmp_path: Path) -> None:
    steps = [0, 0, 40, 40, 60]
    for restart, step in enumerate(steps):
        saved(tmp_path, step)
        assert count_start(tmp_path, 7, restart, 2) == step


def test_a_job_of_ones_own_submits_the_count_anew(tmp_path: Path) -> None:
    for job in (7, 8, 9):
        assert count_start(tmp_path, job, 0, 1) == 0
