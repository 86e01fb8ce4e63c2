"""Converted models compute what transformers computes, start runs on any layout, and come back bit by bit."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[attr-defined]  # exported, but not declared so
from transformers import AutoModelForCausalLM

from megatron_sdsearch.config import ParallelConfig, RunConfig
from megatron_sdsearch.errors import CheckpointError, VerificationError
from megatron_sdsearch.model.checkpoint import CheckpointStore, TrainingState
from megatron_sdsearch.model.checkpoint_folder import read_manifest
from megatron_sdsearch.model.convert import to_hf, to_megatron
from megatron_sdsearch.model.logits_check import check_same_logits, megatron_logits
from megatron_sdsearch.model.megatron_folder import find_checkpoint, find_hf_dir
from megatron_sdsearch.parallel.groups import ParallelState
from megatron_sdsearch.training.policy import Network, Policy
from tests.distributed.launch import run_distributed
from tests.distributed.oracle import CONFIGS, VOCAB_SIZE, make_config, make_model

MODELS = [(family, is_tied) for family in CONFIGS for is_tied in (True, False)]
LAYOUTS: dict[int, list[dict[str, object]]] = {
    1: [{}],
    2: [{"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}],
    4: [{"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, {"tensor_model_parallel_size": 4}],
}
Weights = dict[str, Tensor]


def model_dir(folder: Path, family: str, is_tied: bool) -> Path:
    return folder / f"{family}-{'tied' if is_tied else 'untied'}"


def converted(hf_dir: Path) -> Path:
    return hf_dir.with_name(f"{hf_dir.name}-tp2-pp2")


def run_config(hf_dir: Path, source: Path, run_dir: Path, layout: dict[str, object]) -> RunConfig:
    config = make_config(hf_dir, run_dir, {}, parallel=layout)
    return config.model_copy(update={"model": config.model.model_copy(update={"megatron_dir": source})})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every model, and what it becomes for TP=2 and PP=2. The vocabulary is padded by one row."""
    folder = tmp_path_factory.mktemp("models")
    for family, is_tied in MODELS:
        hf_dir = make_model(model_dir(folder, family, is_tied), family, is_tied=is_tied, num_groups=4)
        to_megatron(hf_dir, converted(hf_dir), tensor=2, pipeline=2)
    return folder


def logits_of_each(rank: int, world_size: int, hf_dirs: list[Path], ids: Tensor) -> list[Tensor]:
    parallel = ParallelState.initialize(ParallelConfig(), seed=1)
    return [megatron_logits(hf_dir, converted(hf_dir), ids, parallel) for hf_dir in hf_dirs]


@torch.no_grad()
def test_megatron_core_reads_the_checkpoints_and_gives_transformers_logits(folder: Path) -> None:
    """Through megatron's own dist_checkpointing, which knows nothing of our writer."""
    hf_dirs = [model_dir(folder, *model) for model in MODELS]
    ids = torch.randint(VOCAB_SIZE, (1, 96), generator=torch.Generator().manual_seed(1))
    (results,) = run_distributed(logits_of_each, 1, hf_dirs, ids)
    for hf_dir, logits in zip(hf_dirs, results, strict=True):
        expected = AutoModelForCausalLM.from_pretrained(hf_dir)(ids).logits[0]
        assert expected.abs().max() > 0.1, hf_dir.name
        assert logits.shape == expected.shape, hf_dir.name
        assert float((logits - expected).abs().max()) < 1e-4, hf_dir.name


def _models(world_size: int) -> list[tuple[str, bool]]:
    return MODELS if world_size < 4 else MODELS[::3]  # four processes on two cores are slow


def start_from_checkpoints(rank: int, world_size: int, folder: Path) -> dict[str, Weights]:
    """What a trainer holds after it has started from a checkpoint for TP=2 and PP=2."""
    results = {}
    for layout in LAYOUTS[world_size]:
        for family, is_tied in _models(world_size):
            hf_dir = model_dir(folder, family, is_tied)
            config = run_config(hf_dir, converted(hf_dir), folder / "run", layout)
            parallel = ParallelState.initialize(config.parallel, seed=1)
            network = Network(config, parallel)
            results[f"{hf_dir.name} {layout}"] = {name: tensor.clone() for name, tensor in network.hf_weights()}
            parallel_state.destroy_model_parallel()
    return results


@pytest.mark.parametrize("world_size", list(LAYOUTS))
def test_a_run_starts_from_a_checkpoint_on_its_layout_and_on_others(folder: Path, world_size: int) -> None:
    for results in run_distributed(start_from_checkpoints, world_size, folder):
        assert len(results) == len(LAYOUTS[world_size]) * len(_models(world_size))
        for name, weights in results.items():
            expected = load_file(folder / name.split()[0] / "model.safetensors")
            assert weights.keys() == expected.keys(), name
            assert [n for n in expected if not torch.equal(weights[n], expected[n])] == [], name


def save_a_run(rank: int, world_size: int, folder: Path, names: list[str]) -> dict[str, Weights]:
    """A training checkpoint at TP=2 or PP=2 with an optimizer that has stepped."""
    results = {}
    for name, layout in zip(names, LAYOUTS[2], strict=True):
        config = make_config(folder / name, folder / f"{name}-run", {}, parallel=layout)
        parallel = ParallelState.initialize(config.parallel, seed=1)
        policy = Policy(config, parallel)
        for parameter in policy.gpt.parameters():
            parameter.main_grad.fill_(0.01)
        policy.optimizer.step()
        store = CheckpointStore(config.run_dir / "checkpoints", policy, parallel, config)
        store.save(TrainingState(step=7))
        store.finish()
        results[name] = {name: tensor.clone() for name, tensor in policy.hf_weights()}
        parallel_state.destroy_model_parallel()
    return results


def test_training_checkpoints_become_hugging_face_folders(folder: Path, tmp_path: Path) -> None:
    names = ["qwen2-tied", "llama-untied"]
    (trained, _) = run_distributed(save_a_run, 2, folder, names)
    for name in names:
        checkpoint = find_checkpoint(folder / f"{name}-run")
        assert checkpoint.name == "step_000007"
        assert find_hf_dir(checkpoint) == folder / name
        to_hf(checkpoint, tmp_path / name, hf_dir=folder / name, shard_bytes=100_000)
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()
        assert [n for n, weight in trained[name].items() if not torch.equal(exported[n], weight)] == []
        before = load_file(folder / name / "model.safetensors")
        assert not torch.equal(before["model.norm.weight"], exported["model.norm.weight"]), "the step did something"


def verify_right_and_wrong(rank: int, world_size: int, hf_dir: Path, wrong_dir: Path) -> list[str]:
    torch.distributed.destroy_process_group()  # the check starts its own, of one process
    del os.environ["RANK"]
    messages = []
    for folder in (hf_dir, wrong_dir):
        try:
            check_same_logits(folder, converted(hf_dir))
            messages.append("")
        except VerificationError as error:
            messages.append(str(error))
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    return messages


def test_verify_finds_one_pair_of_exchanged_heads(folder: Path, tmp_path: Path) -> None:
    hf_dir, wrong = model_dir(folder, "qwen3", False), tmp_path / "wrong"
    shutil.copytree(hf_dir, wrong)
    weights = load_file(wrong / "model.safetensors")
    query = weights["model.layers.2.self_attn.q_proj.weight"]
    query[:32] = torch.cat([query[16:32], query[:16]])
    save_file(weights, wrong / "model.safetensors", metadata={"format": "pt"})
    ((right, message),) = run_distributed(verify_right_and_wrong, 1, hf_dir, wrong)
    assert right == ""
    assert "does not compute what" in message


def test_nothing_is_continued_from_weights_alone(folder: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "step_000000"
    shutil.copytree(converted(model_dir(folder, "qwen2", True)), checkpoint)
    with pytest.raises(CheckpointError, match=r"model\.megatron_dir"):
        read_manifest(checkpoint)
