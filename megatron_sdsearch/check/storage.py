"""The run's folder: writable, nobody else's, with room for what the run will write."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron_sdsearch.check.findings import Attempt, Finding
from megatron_sdsearch.check.subject import Subject
from megatron_sdsearch.config import CheckpointConfig, RunConfig
from megatron_sdsearch.errors import CheckpointError
from megatron_sdsearch.files import format_bytes, nearest_existing
from megatron_sdsearch.logging.metrics import METRICS_FILE
from megatron_sdsearch.logging.trajectories import step_files
from megatron_sdsearch.model.checkpoint_folder import CheckpointFolder, continuation_problems, damages, read_manifest
from megatron_sdsearch.training.run_lock import check_run_dir, live_run

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
_ADAM_BYTES = 8
"""Two moments in fp32; bf16 keeps the weights in fp32 as well."""
_TRAJECTORY_TOKEN_BYTES = 17
"""Measured on the tiny world: ids, log-probabilities and text of 192 trajectories."""


def check(subject: Subject) -> Iterator[Finding]:
    """What is there, and what there is room for."""
    run_dir = subject.config.run_dir
    attempt = Attempt.at(partial(check_run_dir, run_dir))
    if attempt.error is not None:
        yield Finding.of(attempt.error, "run_dir")
        return
    in_use = live_run(run_dir)
    if in_use is not None:
        yield Finding.of(in_use, "run_dir")
    yield from _contents(subject.config)
    yield from _schedule(subject)
    yield from _space(subject, nearest_existing(run_dir))


def _contents(config: RunConfig) -> Iterator[Finding]:
    folder = CheckpointFolder(config.run_dir / "checkpoints")
    attempt = Attempt.at(folder.candidates)
    if attempt.error is not None:
        yield Finding.of(attempt.error, "run_dir")
    if attempt.value:
        yield from _newest_whole(attempt.value, config)
    elif (config.run_dir / METRICS_FILE).exists() or step_files(config.run_dir):
        yield Finding.warning(
            "run_dir",
            f"{config.run_dir} holds metrics or trajectories of a run without a checkpoint: they would be deleted",
            "take another run_dir, or move them away if you want to keep them",
        )


def _newest_whole(candidates: Sequence[Path], config: RunConfig) -> Iterator[Finding]:
    """As training looks for it: the newest, or, with ``checkpoint.fallback``, the newest that is whole."""
    for folder in candidates:
        attempt = Attempt.at(partial(_whole_manifest, folder))
        if attempt.value is not None:
            yield from _continuation(folder, attempt.value, config)
            return
        if not config.checkpoint.fallback:
            yield Finding.error("run_dir", str(attempt.error), "restore it, or set checkpoint.fallback=true")
            return
        yield Finding.warning("run_dir", str(attempt.error), "restore it, or let checkpoint.fallback pass it over")
    yield Finding.error("run_dir", "no checkpoint of this run is whole", "restore one, or take another run_dir")


def _whole_manifest(folder: Path) -> dict[str, Any]:
    manifest = read_manifest(folder)
    files = manifest["files"]
    if broken := damages(folder, files, list(files), verify=False):
        raise CheckpointError(f"{folder} is damaged: {'; '.join(broken)}")
    return manifest


def _continuation(newest: Path, manifest: Mapping[str, Any], config: RunConfig) -> Iterator[Finding]:
    problems = list(continuation_problems(newest, manifest, config))
    for problem in problems:
        told, _, fix = str(problem).rpartition(": ")
        yield Finding.error("run_dir", told, fix)
    step, wanted = manifest["step"], config.train.num_steps
    if not problems and step == wanted:
        yield Finding.warning(
            "run_dir",
            f"{newest} is the end of a run of {wanted} steps: nothing is left to train",
            "raise train.num_steps, or take another run_dir",
        )
    elif not problems:
        yield Finding.note("run_dir", f"the run goes on from step {step} of {wanted} ({newest})")


def _schedule(subject: Subject) -> Iterator[Finding]:
    config = subject.config
    checkpoint, every = config.checkpoint, config.checkpoint.every
    if (problem := config.saving_problem()) is not None:
        yield Finding.warning(problem.field, problem.problem, problem.fix)
        return
    if every == 0 or every > config.train.num_steps:
        minutes = f"{checkpoint.every_minutes:g}: which steps are saved depends on how long they take"
        yield Finding.note("checkpoint.every_minutes", minutes)
        if checkpoint.keep_every:
            yield Finding.warning(
                "checkpoint.keep_every",
                f"{checkpoint.keep_every}, and checkpoint.every is {every}: only by chance is one of these saved",
                f"set checkpoint.every={checkpoint.keep_every}",
            )
        return
    if checkpoint.keep_every % every:
        yield Finding.warning(
            "checkpoint.keep_every",
            f"{checkpoint.keep_every} is no multiple of checkpoint.every = {every}: most of these are never saved",
            f"set it to a multiple of {every}",
        )
    evaluated = config.evaluation.every
    if checkpoint.keep_best and evaluated and every % evaluated and evaluated % every:
        yield Finding.note(
            "checkpoint.keep_best",
            f"saved every {every}, scored every {evaluated} steps: few can be best",
        )


def _space(subject: Subject, home: Path) -> Iterator[Finding]:
    config, num_parameters = subject.config, subject.num_parameters
    if not num_parameters:
        return
    free = shutil.disk_usage(home).free
    weights = num_parameters * _DTYPE_BYTES[config.model.dtype]
    master = 0 if config.model.dtype == "float32" else 4 * num_parameters
    checkpoint = weights + master + _ADAM_BYTES * num_parameters
    num_kept = _num_kept(config.checkpoint, config.train.num_steps)
    num_folders = int(config.checkpoint.export_hf)
    if config.samples_from_sglang and config.rollout.sglang.weight_sync == "disk":
        num_folders += 2  # the published one, and the next
    needed = num_kept * checkpoint + num_folders * weights
    written = sum(_num_bytes(config.run_dir / name) for name in ("checkpoints", "weights", "hf"))
    trajectories = _trajectory_bytes(config)
    told = (
        f"{num_kept} checkpoints of {format_bytes(checkpoint)} and {num_folders} folders of weights of "
        f"{format_bytes(weights)} make {format_bytes(needed)}, "
        f"of which {format_bytes(min(written, needed))} are there; "
        f"trajectories at most {format_bytes(trajectories)} more; {format_bytes(free)} are free on {home}"
    )
    needed -= min(written, needed)
    if needed > free:
        fix = "free some, take a run_dir on another file system, or lower checkpoint.keep_last"
        yield Finding.error("run_dir", told, fix)
    elif needed + trajectories > free:
        yield Finding.warning("run_dir", told, "free some, or set telemetry.trajectories=false")
    else:
        yield Finding.note("run_dir", told)


def _num_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _num_kept(config: CheckpointConfig, num_steps: int) -> int:
    """At one time: those that stay, the best one, and the one that is being written."""
    num_saved = -(-num_steps // config.every) if config.every else 1
    if config.every_minutes:
        num_saved = num_steps  # each step may take longer
    num_for_good = num_steps // config.keep_every if config.keep_every else 0
    return min(num_saved, config.keep_last + num_for_good + int(config.keep_best)) + 1


def _trajectory_bytes(config: RunConfig) -> int:
    if config.train.mode != "rl" or not config.telemetry.trajectories:
        return 0
    num_trajectories = config.train.num_steps * config.data.questions_per_step * config.rollout.group_size
    return num_trajectories * config.rollout.max_total_tokens * _TRAJECTORY_TOKEN_BYTES
