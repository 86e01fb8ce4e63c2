"""Check the run's folder: its contents, and space for what the run will write."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from megatron_sdsearch.check.findings import Finding, errors, note, warning
from megatron_sdsearch.check.run_under_test import RunUnderTest
from megatron_sdsearch.config import RunConfig
from megatron_sdsearch.errors import CheckpointError, ConfigError
from megatron_sdsearch.files import format_bytes, nearest_existing
from megatron_sdsearch.logging.metrics import METRICS_FILE
from megatron_sdsearch.logging.trajectories import step_files
from megatron_sdsearch.model.checkpoint_folder import CheckpointFolder, continuation_problems, damages, read_manifest
from megatron_sdsearch.model.hf_config import hf_config_problems
from megatron_sdsearch.model.shape import ModelShape
from megatron_sdsearch.training.preflight import attempt
from megatron_sdsearch.training.run_lock import check_run_dir, live_run

_TRAJECTORY_TOKEN_BYTES = 17
"""Bytes per token in a trajectory file, measured on 192 trajectories of examples/tiny."""


def check_storage(run: RunUnderTest) -> Iterator[Finding]:
    """Check that ``run_dir`` can be used, continued from, and has space."""
    config, problems = run.config, list[ConfigError]()
    attempt(lambda: check_run_dir(config.run_dir), "run_dir", problems)
    if problems:
        yield from errors(problems)
        return
    in_use = live_run(config.run_dir)
    if in_use is not None:
        yield from errors([in_use])
    candidates = attempt(CheckpointFolder(config.run_dir / "checkpoints").candidates, "run_dir", problems)
    yield from errors(problems)
    if candidates:
        yield from _newest_whole(candidates, config)
    elif candidates is not None and ((config.run_dir / METRICS_FILE).exists() or step_files(config.run_dir)):
        yield warning(
            "run_dir",
            f"{config.run_dir} has metrics or trajectories of a run without a checkpoint: they would be deleted",
            "use another run_dir, or move them away to keep them",
        )
    yield from _room(config, run.files.hf_config)


def _newest_whole(candidates: list[Path], config: RunConfig) -> Iterator[Finding]:
    """Check the checkpoint that training would load: the newest, or with ``checkpoint.fallback`` the newest whole."""
    for folder in candidates:
        try:
            manifest = _read_whole_manifest(folder)
        except CheckpointError as error:
            if not config.checkpoint.fallback:
                fix = "restore it, or set checkpoint.fallback=true"
                yield from errors([ConfigError("run_dir", str(error), fix)])
                return
            yield warning("run_dir", str(error), "restore it, or let checkpoint.fallback skip it")
            continue
        parts = (str(error).rpartition(": ") for error in continuation_problems(folder, manifest, config))
        problems = [ConfigError("run_dir", problem, fix) for problem, _, fix in parts]
        yield from errors(problems)
        step, last = manifest["step"], config.train.num_steps
        if not problems and step == last:
            problem = f"{folder} is the end of a run of {last} steps: nothing is left to train"
            yield warning("run_dir", problem, "raise train.num_steps, or use another run_dir")
        elif not problems:
            yield note("run_dir", f"the run continues from step {step} of {last} ({folder})")
        return
    problem = "no checkpoint of this run is whole"
    yield from errors([ConfigError("run_dir", problem, "restore one, or use another run_dir")])


def _read_whole_manifest(folder: Path) -> dict[str, Any]:
    manifest = read_manifest(folder)
    files = manifest["files"]
    if broken := damages(folder, files, list(files), verify=False):
        raise CheckpointError(f"{folder} is damaged: {'; '.join(broken)}")
    return manifest


def _room(config: RunConfig, hf_config: PretrainedConfig | None) -> Iterator[Finding]:
    """Compare the size of checkpoints, weights and trajectories, less what is there already, with the free space."""
    if hf_config is None or hf_config_problems(hf_config):
        return
    num_parameters = ModelShape.from_hf_config(hf_config).num_params
    writable_parent = nearest_existing(config.run_dir)
    free = shutil.disk_usage(writable_parent).free
    # Weights and Adam's two moments in fp32; bf16 also has fp32 weights.
    weight_bytes, checkpoint_bytes = (4, 12) if config.model.dtype == "float32" else (2, 14)
    weights, checkpoint = num_parameters * weight_bytes, num_parameters * checkpoint_bytes
    num_kept, num_folders = _num_kept(config), int(config.checkpoint.export_hf)
    if config.samples_from_sglang and config.rollout.sglang.weight_sync == "disk":
        num_folders += 2  # the published one and the next
    needed = num_kept * checkpoint + num_folders * weights
    folders = (config.run_dir / name for name in ("checkpoints", "weights", "hf"))
    written = sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())
    trajectories = 0
    if config.is_rl and config.telemetry.trajectories:
        num_trajectories = config.train.num_steps * config.trajectories_per_step
        trajectories = num_trajectories * config.rollout.max_total_tokens * _TRAJECTORY_TOKEN_BYTES
    problem = (
        f"{num_kept} checkpoints of {format_bytes(checkpoint)} and {num_folders} folders of weights of "
        f"{format_bytes(weights)} make {format_bytes(needed)}, "
        f"of which {format_bytes(min(written, needed))} exist; "
        f"trajectories at most {format_bytes(trajectories)} more; {format_bytes(free)} are free on {writable_parent}"
    )
    missing = max(0, needed - written)
    if missing > free:
        fix = "free some space, use a run_dir on another file system, or lower checkpoint.keep_last"
        yield from errors([ConfigError("run_dir", problem, fix)])
    elif missing + trajectories > free:
        yield warning("run_dir", problem, "free some space, or set telemetry.trajectories=false")
    else:
        yield note("run_dir", problem)


def _num_kept(config: RunConfig) -> int:
    """Count the checkpoints that exist at one time, including the best and the one being written."""
    checkpoint, num_steps = config.checkpoint, config.train.num_steps
    num_saved = -(-num_steps // checkpoint.every) if checkpoint.every else 1
    if checkpoint.every_minutes:
        num_saved = num_steps  # each step may take longer than that
    num_for_good = num_steps // checkpoint.keep_every if checkpoint.keep_every else 0
    return min(num_saved, checkpoint.keep_last + num_for_good + int(checkpoint.keep_best)) + 1
