"""Whole runs on two trainer GPUs: the embedded engine, and real SGLang servers that get their weights in every way.

Each publish proves by log-probabilities that the servers hold the policy (``verify_every`` is 1), or the run ends. The
model is as small as the kernels allow, and has learned from few demonstrations: it searches, and is mostly wrong.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from examples.tiny.build_world import build
from tests.e2e.conftest import ENVIRONMENT, read_rows

RUN_LIMIT_S = 1500.0  # a server compiles and captures at its first start
pytestmark = pytest.mark.timeout(2 * RUN_LIMIT_S)
NUM_STEPS = 3
# Engine and trainer differ by rounding alone: nats, mean and largest of a token, in bf16.
GAP, GAP_MAX = 0.05, 1.0
SGLANG = ["rollout.engine=sglang", "rollout.sglang.command=[python3,-m,sglang.launch_server]"]
SMALL = "rollout.sglang.arguments=[--mem-fraction-static,'0.3']"
RUNS = {
    "embedded": [],
    "embedded, plain optimizer": ["parallel.distributed_optimizer=false"],
    "disk": [*SGLANG, "rollout.sglang.weight_sync=disk", "rollout.sglang.num_servers=2"],
    "tensor": [*SGLANG, "rollout.sglang.weight_sync=tensor"],
    "distributed": [*SGLANG, "rollout.sglang.weight_sync=distributed", "rollout.sglang.num_servers=2"],
    "distributed, servers of two GPUs": [*SGLANG, "rollout.sglang.weight_sync=distributed", "rollout.sglang.tp_size=2"],
    "colocated": [*SGLANG, SMALL, "rollout.sglang.colocated=true", "rollout.sglang.num_servers=2"],
    "colocated, tensor": [*SGLANG, SMALL, "rollout.sglang.colocated=true", "rollout.sglang.weight_sync=tensor"],
}


ON_GPUS = [
    "model.dtype=bfloat16",
    "parallel.tensor_model_parallel_size=2",
    "parallel.sequence_parallel=true",
    "parallel.distributed_optimizer=true",
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """The demo's questions and corpus, and a model that was warmed up for them on two GPUs."""
    world = tmp_path_factory.mktemp("world")
    build(world, seed=2, num_demonstrations=6_000)
    make_model(world)
    warm_up(world, root, *ON_GPUS)
    return world


def make_model(world: Path) -> None:
    """The demo's tokenizer, and random weights with heads of 64."""
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen2ForCausalLM(config).save_pretrained(world / "wide")
    tokenizer.save_pretrained(world / "wide")


def warm_up(world: Path, root: Path, *overrides: str) -> None:
    """From random weights to ``world/warm/hf``."""
    settings = [
        str(root / "examples/tiny/warm_start.yaml"),
        f"run_dir={world / 'warm'}",
        f"model.hf_dir={world / 'wide'}",
        f"train.demonstrations={world / 'demonstrations.jsonl'}",
        "train.num_steps=200",
        "optimizer.lr=2e-3",
    ]
    launch(root, *settings, *overrides)


def train(world: Path, run_dir: Path, root: Path, *overrides: str) -> list[dict[str, Any]]:
    """The metrics of all steps so far."""
    settings = [
        str(root / "examples/tiny/config.yaml"),
        f"run_dir={run_dir}",
        f"model.hf_dir={world / 'warm/hf'}",
        f"data.train={world / 'train.jsonl'}",
        f"data.heldout={world / 'heldout.jsonl'}",
        f"retrieval.corpus={world / 'corpus.jsonl'}",
        f"train.num_steps={NUM_STEPS}",
        "evaluation.every=0",
        "telemetry.query_probe=false",
    ]
    launch(root, *settings, *overrides)
    assert json.loads((run_dir / "summary.json").read_text())
    return read_rows(run_dir / "metrics.jsonl")


def launch(root: Path, *settings: str) -> None:
    """Two ranks, to the end."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launcher, "-m", "megatron_sdsearch", "train", *settings]
    done = subprocess.run(command, cwd=root, env=ENVIRONMENT, capture_output=True, text=True, timeout=RUN_LIMIT_S)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


@pytest.mark.parametrize("name", RUNS)
def test_a_run_trains_publishes_saves_and_goes_on(world: Path, tmp_path: Path, root: Path, name: str) -> None:
    settings = [*ON_GPUS, *RUNS[name]]
    train(world, tmp_path / "run", root, *settings)
    rows = train(world, tmp_path / "run", root, *settings, f"train.num_steps={NUM_STEPS + 1}")
    assert [row["step"] for row in rows] == list(range(1, NUM_STEPS + 2)), "the second run went on from the first"
    assert max(row["loss/grad_norm"] for row in rows) > 1e-3, "something was learned"
    for row in rows:
        assert math.isfinite(row["loss/grad_norm"])
        assert row["loss/rollout_gap"] < GAP
        assert row["loss/rollout_gap_max"] < GAP_MAX
        if name not in ("embedded", "embedded, plain optimizer"):
            assert row["engine/num_wrong_version"] == 0
            assert row["engine/num_restarts"] == 0
