"""Resumable checkpoints through megatron's dist_checkpointing: saving in the background, and loading.

Layout: ``root/step_000040/`` with the shards and ``manifest.json``; ``root/latest`` names the newest and is written
last. Folders, checksums and retention are in ``checkpoint_folder.py``; ``docs/checkpoints.md`` is the user's guide.
"""

from __future__ import annotations

import logging
import math
import pickle
import platform
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property, partial
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from megatron.core import dist_checkpointing
from megatron.core import optimizer as megatron_optimizer
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch.distributed.checkpoint.api import CheckpointException

import megatron_sdsearch
from megatron_sdsearch.config import RunConfig
from megatron_sdsearch.errors import CheckpointError, StorageError, raise_problems
from megatron_sdsearch.files import describe_free_space
from megatron_sdsearch.model.background_write import BackgroundWrite, describe_error
from megatron_sdsearch.model.checkpoint_folder import (
    FORMAT,
    CheckpointFolder,
    changed_settings,
    continuation_problems,
    damages,
    fingerprint,
    hash_file,
    read_manifest,
)
from megatron_sdsearch.model.megatron_folder import METADATA, forbid_pickles, read_metadata
from megatron_sdsearch.parallel.groups import ParallelState

_log = logging.getLogger(__name__)
# The distributed optimizer saves whole tensors by parameter, which every other layout can read. Its default,
# fully_sharded_model_space, is deprecated (distrib_optimizer.py, sharded_state_dict, 0.16.1 and 0.19.2).
_OPTIMIZER_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable"}
# torch's CheckpointException is a BaseException, so no other entry covers it.
_LIBRARY_ERRORS = (OSError, RuntimeError, CheckpointingException, CheckpointException)


class Checkpointable(Protocol):
    """The parts of a policy that a checkpoint holds, as megatron names them."""

    gpt: Any
    optimizer: Any
    scheduler: Any

    def load_training_state(self, optimizer: Any, scheduler: Any) -> None:
        """Load a checkpoint's optimizer and schedule."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingState:
    """The progress of a run, apart from the policy.

    Attributes:
        step: number of finished steps. It is also the position in the data, because a batch of questions is a pure
            function of (seed, step).
        wall_s: seconds spent on these steps, summed over a run and its continuations.
        scores: held-out EM by step; decides which checkpoint is kept as the best.
        run_date: date on which the run began, for chat templates that print it; see ``checkpoint_folder.run_date_of``.
        changes: after loading: one text for each difference between this run and the one that saved the checkpoint.
    """

    step: int
    wall_s: float = 0.0
    scores: Mapping[int, float] = field(default_factory=dict)
    run_date: date | None = None
    changes: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _PendingSave:
    """A save in progress."""

    state: TrainingState
    folder: Path
    manifest: Mapping[str, Any]
    write: BackgroundWrite


class CheckpointStore:
    """Saves and loads the checkpoints of a run. Every rank has a store; all methods are collectives.

    Args:
        root: folder of all checkpoints.
        policy: the policy to save and load.
        parallel: layout of this run.
        config: of this run.

    Raises:
        CheckpointError: checkpoints of this optimizer are known to be wrong.
    """

    def __init__(self, root: Path, policy: Checkpointable, parallel: ParallelState, config: RunConfig) -> None:
        forbid_pickles()
        self._folder = CheckpointFolder(root)
        self._policy = policy
        self._optimizers = getattr(policy.optimizer, "chained_optimizers", [policy.optimizer])
        self._parallel = parallel
        self._layout = {"tp": parallel.tp_size, "pp": parallel.pp_size, "dp": parallel.dp_size}
        self._config = config
        self._pending: _PendingSave | None = None
        self._saved_step = 0
        is_distributed = any(isinstance(part, DistributedOptimizer) for part in self._optimizers)
        if is_distributed and megatron_optimizer.USING_PYTORCH_OPTIMIZER:
            raise CheckpointError(
                "checkpoints of megatron's distributed optimizer with torch's AdamW are wrong without an error "
                "(0.16.1): use the plain optimizer, or install transformer-engine"
            )

    def save(self, state: TrainingState) -> None:
        """Start writing ``root/step_N`` and return once the state is copied; ``poll`` or ``finish`` completes the save.

        Does nothing if this step is already saved. Without ``checkpoint.async_save`` the save is complete on return.

        Raises:
            CheckpointError: this save or the previous one failed; the last complete checkpoint is unharmed.
        """
        self.finish()
        if state.step == self._saved_step:
            return
        # Adam has no state before the first update, and the first steps may have nothing to learn.
        has_moments = any(bool(part.optimizer.state) for part in self._optimizers if part.optimizer is not None)
        manifest, folder = self._run_on_main(
            lambda: (self._describe_run(state, has_moments=has_moments), self._folder.begin(state.step)),
            f"step {state.step}",
        )
        content = {**self._content(is_loading=False, has_moments=has_moments), "step": state.step}
        try:
            write = BackgroundWrite(content, folder)
        except _LIBRARY_ERRORS as error:
            # Perhaps on this rank only; the others fail when it is gone.
            raise self._write_error(f"step {state.step}", describe_error(error)) from error
        self._pending = _PendingSave(state=state, folder=folder, manifest=manifest, write=write)
        if not self._config.checkpoint.async_save:
            self.finish()

    def poll(self) -> None:
        """Complete a pending save if all ranks have written their files. To be called once per step.

        Raises:
            CheckpointError: see ``save``.
        """
        if self._pending is not None and all(self._parallel.all_gather_object(self._pending.write.is_done)):
            self.finish()

    def finish(self) -> None:
        """Wait for a pending save and complete it: metadata, manifest, folder name, ``latest``, retention.

        Raises:
            CheckpointError: see ``save``.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        name = f"step {pending.state.step}"
        reports = self._parallel.all_gather_object(pending.write.wait())
        if errors := [f"rank {rank}: {error}" for rank, (error, _) in enumerate(reports) if error]:
            if self._parallel.is_main:
                shutil.rmtree(pending.folder, ignore_errors=True)  # frees space on a full disk
            raise self._write_error(name, "; ".join(errors))
        # Last, because the metadata makes the folder readable: all shards that it lists are on the disk by now.
        try:
            pending.write.write_metadata()
        except _LIBRARY_ERRORS as error:
            raise self._write_error(name, describe_error(error)) from error

        def commit() -> None:
            records = {name: record for _, files in reports for name, record in files.items()}
            for path in pending.folder.iterdir():  # adds the metadata, which no rank has reported
                if path.is_file() and path.name not in records:
                    records[path.name] = hash_file(path, should_sync=True)
            self._folder.commit(pending.folder, {**pending.manifest, "files": dict(sorted(records.items()))})
            self._folder.prune(pending.state.step, pending.state.scores, self._config.checkpoint)

        self._run_on_main(commit, name)
        self._saved_step = pending.state.step

    def prune(self, state: TrainingState) -> None:
        """Remove checkpoints that the settings do not keep, given the newest scores."""
        self._run_on_main(lambda: self._folder.prune(state.step, state.scores, self._config.checkpoint), "retention")

    def load(self) -> TrainingState:
        """Load ``root/latest`` and return the run's state; step 0 without a checkpoint.

        Raises:
            CheckpointError: ``latest`` is damaged (and ``checkpoint.fallback`` is off, or no other one is intact), the
                run had other settings, or it is beyond ``train.num_steps``.
        """
        folder = self._choose()
        if folder is None:
            return TrainingState(step=0)
        manifest = read_manifest(folder)
        raise_problems(continuation_problems(folder, manifest, self._config))
        if self._config.checkpoint.verify:
            self._run_on_main(lambda: self._check_inputs(folder, manifest), "start")
        has_moments = bool(manifest.get("has_moments", True))
        content = self._content(is_loading=True, has_moments=has_moments)
        if manifest["layout"] != self._layout:
            del content["rng"]  # saved per rank, and the ranks are different now
        try:
            loaded = dist_checkpointing.load(content, str(folder))
        except (*_LIBRARY_ERRORS, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{folder} does not fit this model or is damaged: {error}") from error
        self._policy.gpt.load_state_dict(loaded["model"])
        if has_moments:
            self._policy.load_training_state(loaded["optimizer"], loaded["scheduler"])
        else:
            self._policy.scheduler.load_state_dict(loaded["scheduler"])
        if "rng" in loaded:
            _set_rng_states(loaded["rng"][0])
        self._saved_step = int(loaded["step"])  # it need not be saved again
        state = manifest.get("state", {})
        # Differences outside the settings: the number of processes, and versions of libraries.
        before = {"ranks": math.prod(manifest["layout"].values()), **manifest.get("versions", {})}
        now = {"ranks": self._parallel.world_size, **package_versions()}
        others = [f"{name} {before[name]} -> {new}" for name, new in now.items() if before.get(name, new) != new]
        return TrainingState(
            step=self._saved_step,
            wall_s=float(state.get("wall_s", 0.0)),
            scores={int(step): float(score) for step, score in state.get("scores", {}).items()},
            changes=[*changed_settings(manifest, self._config), *others],
        )

    def _choose(self) -> Path | None:
        """Find the checkpoint to continue from, without visible damage; the same one on every rank."""
        self._run_on_main(self._folder.clean, "start")
        found: list[Path] = self._run_on_main(self._folder.candidates, "start")
        for folder, older in zip_longest(found, found[1:]):
            problems = self._find_damage(folder)
            if not problems:
                if folder != found[0]:
                    self._run_on_main(partial(self._folder.go_back, folder), "fallback")
                return folder
            message = f"{folder} is damaged: {'; '.join(problems)}"
            if older is None:
                raise CheckpointError(f"{message}; there is no older one")
            if not self._config.checkpoint.fallback:
                fix = f"Restore it, or set checkpoint.fallback=true to go on from {older.name}"
                raise CheckpointError(f"{message}. {fix}")
            if self._parallel.is_main:
                _log.warning("%s; checkpoint.fallback is on: trying %s", message, older.name)
        return None

    def _find_damage(self, folder: Path) -> list[str]:
        """List the damage of a checkpoint. Each rank checks its share of the files, the main rank the metadata too."""
        problems: list[str] = []
        try:
            files = read_manifest(folder)["files"]
            own = sorted(files)[self._parallel.rank :: self._parallel.world_size]
            problems += damages(folder, files, own, verify=self._config.checkpoint.verify)
            if self._parallel.is_main and METADATA not in files:
                problems.append(f"the manifest does not list {METADATA}")
            if self._parallel.is_main:
                read_metadata(folder)
        except CheckpointError as error:
            problems.append(str(error))
        found = (problem for part in self._parallel.all_gather_object(problems) for problem in part)
        return list(dict.fromkeys(found))  # every rank reports an unreadable manifest, with the same text

    def _check_inputs(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        for name, before in manifest.get("inputs", {}).items():
            now = self._inputs.get(name, "")
            if before and now != before:
                raise CheckpointError(
                    f"{folder} was trained with other contents of {name} (sha256 {before[:12]}, now "
                    f"{(now or 'nothing')[:12]}): put them back, or take another run_dir; "
                    "checkpoint.verify=false skips this check"
                )

    @cached_property
    def _inputs(self) -> dict[str, str]:
        """Content hashes of the inputs that must be unchanged when a run continues, by setting."""
        config = self._config
        paths = {
            "model.hf_dir": config.model.hf_dir,
            "data.train": config.data.train,
            "train.demonstrations": config.train.demonstrations,
        }
        return {name: fingerprint(path) for name, path in paths.items() if path is not None}

    def _describe_run(self, state: TrainingState, *, has_moments: bool) -> dict[str, Any]:
        """Build the manifest, without the list of files, which are not written yet."""
        return {
            "format": FORMAT,
            "step": state.step,
            "run_date": state.run_date.isoformat() if state.run_date is not None else None,
            "layout": self._layout,
            "has_moments": has_moments,
            "state": {"wall_s": state.wall_s, "scores": {str(step): score for step, score in state.scores.items()}},
            "inputs": self._inputs if self._config.checkpoint.verify else {},
            "config": self._config.model_dump(mode="json"),
            # Not every change of the source raises the version number.
            "code": fingerprint(Path(megatron_sdsearch.__file__).parent, "**/*.py"),
            "versions": package_versions(),
        }

    def _content(self, *, is_loading: bool, has_moments: bool) -> dict[str, Any]:
        """Build megatron's sharded state dictionary of all that is saved or loaded, except the step."""
        policy, parallel = self._policy, self._parallel
        # The state of every generator of this process, as plain numbers and tensors, which need no pickle.
        algorithm, keys, position, has_gauss, cached = np.random.get_state()  # libraries draw from it
        states = {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
            "megatron": dict(get_cuda_rng_tracker().get_states()),
            "python": random.getstate(),
            "numpy": (str(algorithm), [int(key) for key in keys], int(position), int(has_gauss), float(cached)),
        }
        model = policy.gpt.sharded_state_dict()
        content = {
            "model": model,
            "scheduler": policy.scheduler.state_dict(),
            "rng": ShardedObject("rng", [states], (parallel.world_size,), (parallel.rank,), replica_id=0),
        }
        if has_moments:
            content["optimizer"] = policy.optimizer.sharded_state_dict(
                dict(model), is_loading=is_loading, metadata=_OPTIMIZER_FORMAT
            )
        return content

    def _run_on_main(self, work: Callable[[], Any], name: str) -> Any:
        """Run ``work`` on the main rank only; its result is returned, or its error raised, on every rank."""
        result, error = None, None
        if self._parallel.is_main:
            try:
                result = work()
            except CheckpointError as ours:
                error = ours
            except (OSError, StorageError) as theirs:
                error = self._write_error(name, describe_error(theirs))
        result, error = self._parallel.all_gather_object((result, error))[0]
        if error is not None:
            raise error
        return result

    def _write_error(self, name: str, reason: str) -> CheckpointError:
        kept = f"step {self._saved_step}'s is unharmed" if self._saved_step else "there is none before it"
        return CheckpointError(
            f"the checkpoint in {self._folder.root} cannot be written ({name}): {reason} "
            f"({describe_free_space(self._folder.root)}). The last one: {kept}. "
            "Make room or fix the permissions, then start the same command again"
        )


def _set_rng_states(states: Mapping[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    get_cuda_rng_tracker().set_states(states["megatron"])
    layout_version, internal, gauss = states["python"]
    random.setstate((layout_version, tuple(internal), gauss))
    algorithm, keys, *position = states["numpy"]
    np.random.set_state((algorithm, np.asarray(keys, dtype=np.uint32), *position))


def package_versions() -> dict[str, str]:
    """Return the versions of this package, of Python, and of the libraries that affect a run's numbers."""
    packages = ("torch", "megatron-core", "transformers", "tokenizers", "safetensors", "numpy", "tantivy")
    own = {"megatron_sdsearch": megatron_sdsearch.__version__, "python": platform.python_version()}
    return own | {name: version(name) for name in packages}
