"""Resumable checkpoints through megatron's dist_checkpointing, and the Hugging Face export.

Layout: ``root/step_000040/`` with the shards and ``manifest.json``; ``root/latest`` names the newest complete one and
is moved only after every rank has written.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from safetensors.torch import save_file
from torch import Tensor

from megatron_sdsearch import __version__
from megatron_sdsearch.errors import CheckpointError
from megatron_sdsearch.parallel.groups import ParallelState


class Checkpointable(Protocol):
    """What a checkpoint holds: the policy's parts, as megatron names them."""

    gpt: Any
    optimizer: Any
    scheduler: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingState:
    """Where a run stands, besides the policy.

    Attributes:
        step: number of finished steps; the next batch of questions is ``step``'s, which is the data position, since a
            batch is a pure function of (seed, step).
        seed: of the run; a checkpoint of another seed would continue with other data.
    """

    step: int
    seed: int


def save_checkpoint(
    root: Path, policy: Checkpointable, state: TrainingState, parallel: ParallelState, keep: int
) -> Path:
    """Write ``root/step_N`` on all ranks, then move ``root/latest`` and delete all but the newest ``keep``."""
    target = root / f"step_{state.step:06d}"
    partial = root / f".partial_{target.name}"
    if parallel.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    content = _content(policy, parallel, is_loading=False)
    content["step"], content["seed"] = state.step, state.seed
    dist_checkpointing.save(content, str(partial))
    dist.barrier()
    if parallel.is_main:
        _write_durably(partial / "manifest.json", json.dumps(_manifest(state, parallel), indent=1))
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        _write_durably(root / "latest", target.name)
        for old in sorted(root.glob("step_*"))[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    return target


def load_latest(root: Path, policy: Checkpointable, parallel: ParallelState, *, seed: int) -> int:
    """Continue from ``root/latest``; returns the number of finished steps, 0 without a checkpoint.

    Raises:
        CheckpointError: ``latest`` names nothing complete, or the run's seed is another.
    """
    pointer = root / "latest"
    if not pointer.is_file():
        return 0
    folder = root / pointer.read_text().strip()
    if not (folder / "manifest.json").is_file():
        raise CheckpointError(
            f"{pointer} names {folder.name}, which is not a complete checkpoint; restore it or "
            f"point {pointer} at a complete step_* folder"
        )
    content = _content(policy, parallel, is_loading=True)
    loaded = dist_checkpointing.load(content, str(folder))
    if loaded["seed"] != seed:
        raise CheckpointError(
            f"{folder} is of seed {loaded['seed']}, this run's is {seed}: set seed={loaded['seed']} or another run_dir"
        )
    policy.gpt.load_state_dict(loaded["model"])
    policy.optimizer.load_state_dict(loaded["optimizer"])
    policy.scheduler.load_state_dict(loaded["scheduler"])
    torch.set_rng_state(loaded["rng"][0])
    return int(loaded["step"])


def _content(policy: Checkpointable, parallel: ParallelState, *, is_loading: bool) -> dict[str, Any]:
    model = policy.gpt.sharded_state_dict()
    rng = ShardedObject("rng", [torch.get_rng_state()], (parallel.world_size,), (parallel.rank,), replica_id=0)
    return {
        "model": model,
        "optimizer": policy.optimizer.sharded_state_dict(dict(model), is_loading=is_loading),
        "scheduler": policy.scheduler.state_dict(),
        "rng": rng,
    }


def _manifest(state: TrainingState, parallel: ParallelState) -> dict[str, Any]:
    return {
        "step": state.step,
        "seed": state.seed,
        "layout": {"tp": parallel.tp_size, "pp": parallel.pp_size, "dp": parallel.dp_size},
        "versions": {"megatron_sdsearch": __version__, **{n: version(n) for n in ("torch", "megatron-core")}},
    }


def _write_durably(path: Path, text: str) -> None:
    """Write beside and rename, with both flushed to the disk: a reader sees the old text or the new."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.rename(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def export_hf_folder(weights: Iterator[tuple[str, Tensor]], source: Path, target: Path, *, is_writer: bool) -> None:
    """Write a Hugging Face folder: new weights, everything else (config, tokenizer, template) carried over.

    Args:
        weights: whole tensors; a collective that every rank exhausts.
        source: the folder that the run started from.
        target: replaced as a whole once it is complete.
        is_writer: this rank keeps the tensors and writes.
    """
    tensors = {}
    for name, tensor in weights:
        if is_writer:
            tensors[name] = tensor.detach().cpu().contiguous().clone()
    if not is_writer:
        return
    partial = target.with_name(f".partial_{target.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for file in source.iterdir():
        if file.is_file() and not file.name.startswith(("model.safetensors", "model-", "pytorch_model")):
            shutil.copy2(file, partial / file.name)
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
