"""Checkpoints move between layouts with their moments; damage is named; nothing in them is executed."""

from __future__ import annotations

import json
import pickle
import random
import re
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch import Tensor

from megatron_sdsearch.config import RunConfig
from megatron_sdsearch.errors import CheckpointError
from megatron_sdsearch.model.checkpoint import CheckpointStore, TrainingState
from megatron_sdsearch.model.checkpoint_folder import hash_file, read_manifest
from tests.distributed.launch import run_distributed
from tests.distributed.oracle import make_model
from tests.distributed.test_training import Run, _config
from tests.unit.model.test_safe_load import Poison

# Each layout trains one step, saves, and the next goes on: TP 2 (DP 2) -> PP 2 (DP 2) -> TP 4 -> DP 4.
CHAIN: list[dict[str, object]] = [
    {"tensor_model_parallel_size": 2},
    {"pipeline_model_parallel_size": 2},
    {"tensor_model_parallel_size": 4},
    {},
]
Weights = dict[str, Tensor]


def config_of(folder: Path, layout: dict[str, object], **checkpoint: object) -> RunConfig:
    config = _config(folder, layout)
    train = config.train.model_copy(update={"num_steps": 9})
    return config.model_copy(
        update={"train": train, "checkpoint": config.checkpoint.model_copy(update={"keep_last": 9, **checkpoint})}
    )


def store_of(run: Run, root: Path) -> CheckpointStore:
    return CheckpointStore(root, run.policy, run.parallel, run.config)


def through_layouts(
    rank: int, world_size: int, folder: Path, chain: list[dict[str, object]]
) -> tuple[Weights, Weights, list[int]]:
    straight = Run(config_of(folder, chain[0]))
    for step in range(len(chain)):
        straight.step(step)
    expected = straight.weights()
    straight.end()
    loaded = []
    for step, layout in enumerate(chain):
        run = Run(config_of(folder, layout))
        store = store_of(run, folder / "chain")
        loaded.append(store.load().step)
        run.step(step)
        store.save(TrainingState(step=step + 1))
        store.finish()
        weights = run.weights()
        run.end()
    return expected, weights, loaded


def one_more_step(rank: int, world_size: int, folder: Path, chain: list[dict[str, object]]) -> tuple[Weights, Weights]:
    """A single process goes on from the last of the chain, with its moments and without them."""
    results = []
    for has_moments in (True, False):
        run = Run(config_of(folder, chain[-1]))  # no sizes: a single process
        assert store_of(run, folder / "chain").load().step == len(chain)
        if not has_moments:
            for state in run.policy.optimizer.chained_optimizers[0].optimizer.state.values():
                state["exp_avg"].zero_()
        run.step(len(chain))
        results.append(run.weights())
        run.end()
    return results[0], results[1]


def gap(ours: Weights, theirs: Weights) -> float:
    return max(float((ours[name] - theirs[name]).abs().max()) for name in theirs)


def test_a_run_goes_on_across_layouts(tmp_path: Path) -> None:
    check_chain(tmp_path, CHAIN)


def check_chain(folder: Path, chain: list[dict[str, object]]) -> None:
    make_model(folder / "hf", "qwen2", is_tied=True, num_groups=4)
    expected, weights, loaded = run_distributed(through_layouts, 4, folder, chain, timeout_s=280)[0]
    assert loaded == [0, 1, 2, 3]
    assert gap(weights, expected) < 5e-6  # as between layouts without a checkpoint
    ours, without = run_distributed(one_more_step, 1, folder, chain, timeout_s=200)[0]
    assert gap(ours, weights) > 1e-4, "the step does something"
    assert gap(without, ours) > 1e-4, "lost moments would show"


def draws() -> list[float]:
    """One from each generator of the process."""
    with get_cuda_rng_tracker().fork():
        tracked = float(torch.rand(()))
    return [tracked, float(torch.rand(())), random.random(), float(np.random.rand())]


def damaged(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    root = folder / "damaged"
    run = Run(config_of(folder, {}))
    store = store_of(run, root)
    start = run.weights()
    store.save(TrainingState(step=1))  # before any update: Adam has no moments yet
    run.step(1)
    for _ in range(5):
        draws()
    store.save(TrainingState(step=2, wall_s=7.0, scores={2: 0.5}, run_date=date(2025, 2, 5)))
    next_draws = draws()
    store.finish()
    assert read_manifest(root / "step_000002")["run_date"] == "2025-02-05"
    run.step(2)
    shard = root / "step_000002" / "__0_0.distcp"
    whole = shard.read_bytes()

    messages = {}
    for name, content in {"short": whole[:-5], "changed": whole[:-5] + b"12345", "missing": None}.items():
        shard.unlink(missing_ok=True)
        if content is not None:
            shard.write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            store.load()
        messages[name] = str(caught.value)
    shard.write_bytes(whole)
    assert draws() != next_draws
    state = store.load()
    assert draws() == next_draws
    for name in (".metadata", "common.pt"):  # the second is read where there is one; from 0.19 on none is written
        path = root / "step_000002" / name
        good = path.read_bytes() if path.exists() else None
        if name == "common.pt":
            torch.save({"step": 2, "poison": Poison(folder / "mark")}, root / "step_000002" / name)
        else:
            (root / "step_000002" / name).write_bytes(pickle.dumps(Poison(folder / "mark")))
        forge(root / "step_000002", name)
        with pytest.raises(CheckpointError) as caught:
            store.load()
        messages[name] = str(caught.value)
        path.unlink() if good is None else path.write_bytes(good)
        forge(root / "step_000002", name)
    (folder / "a_file").write_text("")
    with pytest.raises(CheckpointError) as caught:
        store_of(run, folder / "a_file" / "checkpoints").save(TrainingState(step=3))
    messages["unwritable"] = str(caught.value)
    config = json.loads((folder / "hf" / "config.json").read_text())
    (folder / "hf" / "config.json").write_text(json.dumps({**config, "note": "another model"}))
    with pytest.raises(CheckpointError) as caught:
        store_of(run, root).load()
    messages["reference"] = str(caught.value)
    (folder / "hf" / "config.json").write_text(json.dumps(config, indent=2))

    shard.unlink()
    run.config = config_of(folder, {}, fallback=True, verify=False)
    gone_back = store_of(run, root).load()
    same = gap(run.weights(), start)
    run.step(1)  # Adam begins anew
    run.end()
    latest = (root / "latest").read_text()
    return {"messages": messages, "state": state, "back": gone_back.step, "same": same, "latest": latest}


def forge(folder: Path, name: str) -> None:
    """Change the manifest as an attacker would: it vouches for the file."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"].pop(name, None)
    if (folder / name).exists():
        manifest["files"][name] = hash_file(folder / name)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_damage_is_named_poison_is_not_run_and_falling_back_is_asked_for(tmp_path: Path) -> None:
    make_model(tmp_path / "hf", "qwen2", is_tied=True)
    result = run_distributed(damaged, 1, tmp_path, timeout_s=240)[0]
    messages = result["messages"]
    for name, text in {"short": r"has \d+ bytes instead of", "changed": "has changed", "missing": "is missing"}.items():
        assert re.search(rf"__0_0\.distcp {text}", messages[name])
        assert "set checkpoint.fallback=true to go on from step_000001" in messages[name]
    assert (result["state"].step, result["state"].wall_s, result["state"].scores) == (2, 7.0, {2: 0.5})
    assert "mkdir, which no checkpoint needs" in messages[".metadata"]
    assert "Weights only load failed" in messages["common.pt"]
    assert "other contents of model.hf_dir" in messages["reference"]
    assert "cannot be written (step 3): NotADirectoryError" in messages["unwritable"]
    assert not (tmp_path / "mark").exists()
    assert (result["back"], result["same"], result["latest"]) == (1, 0.0, "step_000001")
    assert len(list((tmp_path / "damaged").glob("damaged_step_000002*"))) == 1
