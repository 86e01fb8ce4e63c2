"""The memory plan against CUDA's own count, for the update of a model that fills some gigabytes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import Qwen2Config, Qwen2ForCausalLM

from megatron_sdsearch.config import RunConfig, load_config
from megatron_sdsearch.logging import PhaseTimer
from megatron_sdsearch.parallel.groups import ParallelState
from megatron_sdsearch.records import TrainingSample
from megatron_sdsearch.training.policy import Policy
from megatron_sdsearch.training.updates import pack_samples, run_updates
from tests.distributed.launch import run_distributed
from tests.e2e.conftest import ENVIRONMENT

pytestmark = pytest.mark.timeout(900)
TOLERANCE = 0.15
LENGTH, NUM_SAMPLES, PROMPT = 2048, 8, 32
VOCAB = 32_000
SIZES: dict[str, dict[str, Any]] = {
    "tp2": {"tensor_model_parallel_size": 2},
    "tp2 sequence": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "dp2": {},
    "dp2 distributed optimizer": {"distributed_optimizer": True},
}


def write_config(folder: Path, layout: dict[str, Any], recompute: str) -> Path:
    """A run without distillation and reference: one row of policy tokens is all that a step computes."""
    content = {
        "run_dir": str(folder / "run"),
        "model": {"hf_dir": str(folder / "model"), "dtype": "bfloat16", "recompute": recompute},
        "parallel": layout,
        "data": {"train": "unused", "questions_per_step": NUM_SAMPLES},
        "retrieval": {"corpus": "unused"},
        "rollout": {"engine": "sglang", "max_total_tokens": LENGTH, "max_prompt_tokens": 1024, "group_size": 2},
        "objective": {"alpha": 0.0, "kl_coef": 0.0},
        "train": {"max_tokens_per_microbatch": LENGTH * NUM_SAMPLES, "trajectories_per_minibatch": None},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def make_model(folder: Path) -> None:
    """0.3 billion parameters."""
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder / "model")


def samples(num: int) -> list[TrainingSample]:
    """Rows whose every token but a short prompt is the policy's."""
    random = np.random.default_rng(0)
    mask = np.arange(LENGTH) >= PROMPT - 1
    mask[-1] = False
    return [
        TrainingSample(
            sample_id=str(index),
            token_ids=(ids := random.integers(0, VOCAB, LENGTH)),
            labels=np.append(ids[1:], 0),
            loss_mask=mask,
            distill_mask=np.zeros(LENGTH, dtype=np.bool_),
            rollout_logprobs=np.where(mask, -10.0, 0.0),
            advantage=1.0 if index % 2 else -1.0,
            prompt_length=PROMPT,
            teacher_prompts=(),
        )
        for index in range(num)
    ]


def peak_of_updates(_rank: int, _world_size: int, config: RunConfig) -> int:
    """Bytes that tensors took at most, from the second update on: the first one makes Adam's moments."""
    parallel = ParallelState.initialize(config.parallel, seed=1)
    policy = Policy(config, parallel)
    batch = pack_samples(samples(NUM_SAMPLES * parallel.dp_size), config, parallel)
    for step in range(3):
        if step == 1:
            torch.cuda.reset_peak_memory_stats()
        run_updates(policy, None, batch, config.objective, config.objective.alpha_at(step), PhaseTimer())
    return torch.cuda.max_memory_allocated()


def planned_peak(root: Path, path: Path) -> int:
    """Standing parts and the update, without what CUDA takes beside tensors."""
    command = [sys.executable, "-m", "megatron_sdsearch", "plan", str(path), "--gpus-per-node", "4", "--json"]
    attached = ["rollout.sglang.num_servers=2"]  # on the GPUs that the two trainers leave
    done = subprocess.run([*command, *attached], cwd=root, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    memory = json.loads(done.stdout)["given"]["memory"]
    standing = sum(size for name, size in memory["standing"].items() if name != "framework")
    update = [parts for parts in memory["moments"].values() if "server weights" not in parts]
    return int(standing + max(sum(parts.values()) for parts in update))


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("name", SIZES)
def test_the_plan_is_near_what_an_update_takes(tmp_path: Path, root: Path, name: str, recompute: str) -> None:
    make_model(tmp_path)
    path = write_config(tmp_path, SIZES[name], recompute)
    measured = max(run_distributed(peak_of_updates, 2, load_config(path), timeout_s=600))
    planned = planned_peak(root, path)
    assert abs(planned / measured - 1) < TOLERANCE, f"planned {planned / 2**30:.2f} GiB, took {measured / 2**30:.2f}"
