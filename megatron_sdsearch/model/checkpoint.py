"""Resumable checkpoints through megatron's dist_checkpointing.

Layout: ``root/step_000040/`` with the shards and ``manifest.json``; ``root/latest`` names the newest complete one and
is moved only after every rank has written.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject

from megatron_sdsearch import __version__
from megatron_sdsearch.config import RunConfig, flatten
from megatron_sdsearch.errors import CheckpointError
from megatron_sdsearch.parallel.groups import ParallelState


class Checkpointable(Protocol):
    """What a checkpoint holds: the policy's parts, as megatron names them."""

    gpt: Any
    optimizer: Any
    scheduler: Any

    def load_training_state(self, optimizer: Any, scheduler: Any) -> None:
        """Take over a checkpoint's optimizer and schedule."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingState:
    """Where a run stands, besides the policy.

    Attributes:
        step: number of finished steps; the next batch of questions is ``step``'s, which is the data position, since a
            batch is a pure function of (seed, step).
    """

    step: int


def save_checkpoint(
    root: Path, policy: Checkpointable, state: TrainingState, parallel: ParallelState, config: RunConfig
) -> Path:
    """Write ``root/step_N`` on all ranks, then move ``root/latest`` and delete all but ``checkpoint.keep_last``.

    Checkpoints of later steps belong to a future that this run has left (it went back to an older one): they go, too.
    """
    target = root / f"step_{state.step:06d}"
    partial = root / f".partial_{target.name}"
    if parallel.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    content = _content(policy, parallel, is_loading=False)
    content["step"] = state.step
    dist_checkpointing.save(content, str(partial))
    dist.barrier()
    if parallel.is_main:
        _write_durably(partial / "manifest.json", json.dumps(_manifest(state, parallel, config), indent=1))
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        _write_durably(root / "latest", target.name)
        steps = {int(folder.name.removeprefix("step_")): folder for folder in root.glob("step_*")}
        past = sorted(step for step in steps if step <= state.step)
        for step in set(steps) - set(past[-config.checkpoint.keep_last :]):
            shutil.rmtree(steps[step])
    dist.barrier()
    return target


def load_latest(root: Path, policy: Checkpointable, parallel: ParallelState, config: RunConfig) -> int:
    """Continue from ``root/latest``; returns the number of finished steps, 0 without a checkpoint.

    Raises:
        CheckpointError: ``latest`` names nothing complete or unreadable, the run was configured otherwise, or it has
            gone beyond ``train.num_steps``.
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
    manifest = json.loads((folder / "manifest.json").read_text())
    if "config" not in manifest:
        raise CheckpointError(
            f"{folder} holds weights alone: start a run from it with model.megatron_dir, nothing can be continued"
        )
    _check_config(folder, manifest, config)
    content = _content(policy, parallel, is_loading=True)
    if manifest["layout"] != _layout(parallel):
        del content["rng"]  # kept per rank, and there are other ranks now
    try:
        loaded = dist_checkpointing.load(content, str(folder))
    except CheckpointingException as error:
        raise CheckpointError(f"{folder} does not fit this model or is damaged: {error}") from error
    policy.gpt.load_state_dict(loaded["model"])
    policy.load_training_state(loaded["optimizer"], loaded["scheduler"])
    if "rng" in loaded:
        torch.set_rng_state(loaded["rng"][0])
    return int(loaded["step"])


# What may change between a run and its continuation: where things lie, what is written, the layout, the rates.
_MAY_CHANGE = ("run_dir", "telemetry.", "evaluation.", "checkpoint.", "parallel.", "optimizer.", "train.num_steps")
_PATHS = (
    "model.hf_dir",
    "model.megatron_dir",
    "data.train",
    "data.heldout",
    "train.demonstrations",
    "retrieval.corpus",
)


def _check_config(folder: Path, manifest: dict[str, Any], config: RunConfig) -> None:
    before, now = flatten(manifest["config"]), flatten(config.model_dump(mode="json"))
    for field in sorted(before.keys() | now.keys()):
        old, new = before.get(field), now.get(field)
        if field in _PATHS and old is not None and new is not None:
            old, new = Path(old).name, Path(new).name  # a folder may have moved
        if old != new and not field.startswith(_MAY_CHANGE):
            raise CheckpointError(
                f"{folder} was trained with {field} = {old}, this run has {new}: set it back or take another run_dir"
            )
    if manifest["step"] > config.train.num_steps:
        raise CheckpointError(
            f"{folder} is beyond train.num_steps = {config.train.num_steps}: raise it or take another run_dir"
        )


def _content(policy: Checkpointable, parallel: ParallelState, *, is_loading: bool) -> dict[str, Any]:
    model = policy.gpt.sharded_state_dict()
    rng = ShardedObject("rng", [torch.get_rng_state()], (parallel.world_size,), (parallel.rank,), replica_id=0)
    return {
        "model": model,
        "optimizer": policy.optimizer.sharded_state_dict(dict(model), is_loading=is_loading),
        "scheduler": policy.scheduler.state_dict(),
        "rng": rng,
    }


def _manifest(state: TrainingState, parallel: ParallelState, config: RunConfig) -> dict[str, Any]:
    return {
        "step": state.step,
        "layout": _layout(parallel),
        "config": config.model_dump(mode="json"),
        "versions": {"megatron_sdsearch": __version__, **{n: version(n) for n in ("torch", "megatron-core")}},
    }


def _layout(parallel: ParallelState) -> dict[str, int]:
    return {"tp": parallel.tp_size, "pp": parallel.pp_size, "dp": parallel.dp_size}


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
