"""A Slurm of two nodes and a tiny world for all tests; what is compared between runs.

Nothing here skips: a Slurm that does not start is an error of every test, with the ends of its logs in the message.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from examples.tiny.build_world import build
from tests.integration.slurm.cluster import Cluster

NUM_STEPS = 30
LIMIT_S = 400.0
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "COLUMNS": "300"}


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("slurm") / "cluster") as cluster:
        yield cluster


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's, with a random model of two layers: a pipeline of two stages needs an even number."""
    folder = tmp_path_factory.mktemp("world")
    build(folder, seed=3, num_demonstrations=8)
    config = AutoConfig.from_pretrained(folder / "model")
    config.num_hidden_layers, config.layer_types = 2, config.layer_types[:2]
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    return folder


def arguments(world: Path, run_dir: Path, *overrides: str) -> list[str]:
    """Of train.sh: a model that learns at every step (an entropy bonus) and samples at random, a pipeline of two."""
    return [
        "examples/tiny/config.yaml",
        f"run_dir={run_dir}",
        f"model.hf_dir={world / 'model'}",
        f"data.train={world / 'train.jsonl'}",
        f"data.heldout={world / 'heldout.jsonl'}",
        f"retrieval.corpus={world / 'corpus.jsonl'}",
        "parallel.tensor_model_parallel_size=1",
        "parallel.pipeline_model_parallel_size=2",
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
        "evaluation.every=0",
        "checkpoint.every=5",
        "telemetry.query_probe=false",
        *overrides,
    ]


@pytest.fixture(scope="session")
def uninterrupted(cluster: Cluster, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a job that nobody disturbed."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    job = cluster.submit(folder / "log", arguments(world, folder / "run"), flags=["--nodes=2"], **ENVIRONMENT)
    assert job.wait(LIMIT_S) == 0, job.output[-6000:]
    return folder / "run"


def num_rows(run_dir: Path) -> int:
    """Steps that the run has logged."""
    path = run_dir / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All rows, without wall-clock times."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in rows]


def weights(run_dir: Path) -> dict[str, bytes]:
    """The exported policy, bit by bit."""
    tensors = load_file(run_dir / "hf" / "model.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def assert_same(run_dir: Path, uninterrupted: Path) -> None:
    assert [row["step"] for row in metrics(run_dir)] == list(range(1, NUM_STEPS + 1))
    assert metrics(run_dir) == metrics(uninterrupted)
    assert weights(run_dir) == weights(uninterrupted)
