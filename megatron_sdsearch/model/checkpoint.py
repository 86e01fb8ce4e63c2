"""Resumable checkpoints through megatron's dist_checkpointing: what is in one, its writing in the background, loading.

Layout: ``root/step_000040/`` with the shards and ``manifest.json``; ``root/latest`` names the newest, and moves last.
Folders, checksums and retention are ``checkpoint_folder``'s; ``docs/checkpoints.md`` tells the user's side.
"""

from __future__ import annotations

import hashlib
import logging
import math
import pickle
import platform
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
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
from megatron_sdsearch.errors import CheckpointError, raise_problems
from megatron_sdsearch.files import free_words
from megatron_sdsearch.model.background_write import BackgroundWrite, describe, plan_write
from megatron_sdsearch.model.checkpoint_folder import (
    FORMAT,
    CheckpointFolder,
    FileRecord,
    changed_settings,
    continuation_problems,
    damages,
    fingerprint,
    read_manifest,
)
from megatron_sdsearch.model.safe_load import check_metadata, forbid_pickles
from megatron_sdsearch.parallel.groups import ParallelState

_log = logging.getLogger(__name__)
_METADATA = ".metadata"
# How the distributed optimizer writes its shards: as whole tensors by parameter, which every other layout can read. Its
# default, fully_sharded_model_space, is deprecated (distrib_optimizer.py, sharded_state_dict, 0.16.1 and 0.19.2).
_OPTIMIZER_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable"}


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
        wall_s: spent on these steps by all processes that took part, one after the other.
        scores: held-out EM by step, for the checkpoint that is kept as the best.
        run_date: on which the run began, for chat templates that tell the date: ``checkpoint_folder.run_date_of``.
        changes: of a loaded one: what this run does otherwise than the one that saved it, in words.
    """

    step: int
    wall_s: float = 0.0
    scores: Mapping[int, float] = field(default_factory=dict)
    run_date: date | None = None
    changes: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pending:
    """A save that has begun."""

    state: TrainingState
    partial: Path
    write: BackgroundWrite
    has_moments: bool


class CheckpointStore:
    """All checkpoints of a run. Every rank has one; all methods are collectives.

    Args:
        root: of the checkpoints.
        policy: saved and loaded.
        parallel: layout of this run.
        config: of this run.

    Raises:
        CheckpointError: the optimizer is one whose checkpoints are known to be wrong.
    """

    def __init__(self, root: Path, policy: Checkpointable, parallel: ParallelState, config: RunConfig) -> None:
        forbid_pickles()
        _refuse_broken_optimizer(policy.optimizer)
        self._folder = CheckpointFolder(root)
        self._policy = policy
        self._parallel = parallel
        self._config = config
        self._pending: _Pending | None = None
        self._saved_step = 0
        self._inputs: dict[str, str] | None = None

    def save(self, state: TrainingState) -> None:
        """Begin to write ``root/step_N``; returns when the state is copied. ``poll`` and ``finish`` complete it.

        Does nothing when this very step is saved already. Without ``checkpoint.async_save`` it is complete on return.

        Raises:
            CheckpointError: this save or the one before cannot be written; the last complete checkpoint is unharmed.
        """
        self.finish()
        if state.step == self._saved_step:
            return
        (partial,) = self._on_main(lambda: (self._folder.begin(state.step),), f"step {state.step}")
        has_moments = _has_moments(self._policy.optimizer)
        content = _content(self._policy, self._parallel, is_loading=False, has_moments=has_moments)
        try:
            request = plan_write({**content, "step": state.step}, partial)
        except (OSError, RuntimeError, CheckpointingException, CheckpointException) as error:
            # On one rank perhaps: the others notice when it is gone.
            raise self._failure(state.step, describe(error)) from error
        write = BackgroundWrite(request)
        self._pending = _Pending(state=state, partial=partial, write=write, has_moments=has_moments)
        if not self._config.checkpoint.async_save:
            self.finish()

    def poll(self) -> None:
        """Complete a save whose files all ranks have written. Called once a step.

        Raises:
            CheckpointError: see ``save``.
        """
        if self._pending is not None and all(self._parallel.all_gather_object(self._pending.write.is_done)):
            self.finish()

    def finish(self) -> None:
        """Wait for a save that is under way, and complete it.

        Raises:
            CheckpointError: see ``save``.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        write, step = pending.write, pending.state.step
        write.wait()
        reports = self._parallel.all_gather_object((write.error, write.files))
        errors = [f"rank {rank}: {error}" for rank, (error, _) in enumerate(reports) if error]
        if errors:
            if self._parallel.is_main:
                shutil.rmtree(pending.partial, ignore_errors=True)  # a full disk needs the room
            raise self._failure(step, "; ".join(errors))
        try:
            write.write_metadata()
        except (OSError, RuntimeError, CheckpointingException, CheckpointException) as error:
            raise self._failure(step, describe(error)) from error
        shards = {name: record for _, files in reports for name, record in files.items()}
        self._on_main(lambda: self._commit(pending, shards), f"step {step}")
        self._saved_step = step

    def prune(self, state: TrainingState) -> None:
        """Remove what the settings do not keep, by the newest scores."""
        self._on_main(lambda: self._folder.prune(state.step, state.scores, self._config.checkpoint), "retention")

    def load(self) -> TrainingState:
        """Continue from ``root/latest``; step 0 without a checkpoint.

        Raises:
            CheckpointError: ``latest`` is damaged (and ``checkpoint.fallback`` is off, or nothing else is whole), the
                run was configured otherwise, or it has gone beyond ``train.num_steps``.
        """
        folder = self._choose()
        if folder is None:
            return TrainingState(step=0)
        manifest = read_manifest(folder)
        raise_problems(continuation_problems(folder, manifest, self._config))
        self._check_inputs(folder, manifest)
        has_moments = bool(manifest.get("has_moments", True))
        content = _content(self._policy, self._parallel, is_loading=True, has_moments=has_moments)
        if manifest["layout"] != _layout(self._parallel):
            del content["rng"]  # kept per rank, and there are other ranks now
        loaded = _read(content, folder)
        self._policy.gpt.load_state_dict(loaded["model"])
        if has_moments:
            self._policy.load_training_state(loaded["optimizer"], loaded["scheduler"])
        else:
            self._policy.scheduler.load_state_dict(loaded["scheduler"])
        if "rng" in loaded:
            _set_rng(loaded["rng"])
        self._saved_step = int(loaded["step"])
        state = manifest.get("state", {})
        return TrainingState(
            step=self._saved_step,
            wall_s=float(state.get("wall_s", 0.0)),
            scores={int(step): float(score) for step, score in state.get("scores", {}).items()},
            changes=[*changed_settings(manifest, self._config), *_changed_world(manifest, self._parallel)],
        )

    def _choose(self) -> Path | None:
        """The checkpoint to go on from, whole as far as one can see: the same one on every rank."""

        def candidates() -> list[Path]:
            self._folder.clean()
            return self._folder.candidates()

        found: list[Path] = self._on_main(candidates, "start")
        for index, folder in enumerate(found):
            problems = self._problems(folder)
            if not problems:
                if index:
                    self._on_main(lambda folder=folder: self._folder.go_back(folder), "fallback")  # type: ignore[misc]
                return folder
            older = [other.name for other in found[index + 1 :]]
            message = f"{folder} is damaged: {'; '.join(problems)}"
            if not self._config.checkpoint.fallback or not older:
                hint = f"set checkpoint.fallback=true to go on from {older[0]}" if older else "there is no older one"
                raise CheckpointError(f"{message}. Restore it, or {hint}" if older else f"{message}; {hint}")
            if self._parallel.is_main:
                _log.warning("%s; checkpoint.fallback is on: trying %s", message, older[0])
        return None

    def _problems(self, folder: Path) -> list[str]:
        """What is wrong with a checkpoint; each rank looks at its share of the files."""
        try:
            manifest = read_manifest(folder)
        except CheckpointError as error:
            return [str(error)]
        files = manifest["files"]
        own = sorted(files)[self._parallel.rank :: self._parallel.world_size]
        problems = damages(folder, files, own, verify=self._config.checkpoint.verify)
        if self._parallel.is_main and (refusal := check_metadata(folder / _METADATA)):
            problems.append(f"{_METADATA} {refusal}")
        if self._parallel.is_main and _METADATA not in files:
            problems.append(f"the manifest does not list {_METADATA}")
        return [problem for part in self._parallel.all_gather_object(problems) for problem in part]

    def _check_inputs(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        """The reference policy and the questions are what they were, by content."""
        if not self._config.checkpoint.verify:
            return

        def compare() -> None:
            for name, before in manifest.get("inputs", {}).items():
                if before and (now := self._fingerprints().get(name)) != before:
                    raise CheckpointError(
                        f"{folder} was trained with other contents of {name} (sha256 {before[:12]}, now "
                        f"{(now or 'nothing')[:12]}): put them back, or take another run_dir; "
                        "checkpoint.verify=false does not look"
                    )

        self._on_main(compare, "start")

    def _fingerprints(self) -> dict[str, str]:
        if self._inputs is None:
            config = self._config
            paths = {
                "model.hf_dir": config.model.hf_dir,
                "data.train": config.data.train,
                "train.demonstrations": config.train.demonstrations,
            }
            self._inputs = {name: fingerprint(path) for name, path in paths.items() if path is not None}
        return self._inputs

    def _commit(self, pending: _Pending, shards: Mapping[str, FileRecord]) -> None:
        partial, state = pending.partial, pending.state
        others = {
            path.name: FileRecord.of(path, should_sync=True)
            for path in partial.iterdir()
            if path.is_file() and path.name not in shards
        }
        records = dict(sorted({**shards, **others}.items()))
        manifest = {
            "format": FORMAT,
            "step": state.step,
            "run_date": state.run_date.isoformat() if state.run_date is not None else None,
            "layout": _layout(self._parallel),
            "has_moments": pending.has_moments,
            "state": {"wall_s": state.wall_s, "scores": {str(step): score for step, score in state.scores.items()}},
            "inputs": self._fingerprints() if self._config.checkpoint.verify else {},
            "config": self._config.model_dump(mode="json"),
            "code": _code_sha256(),
            "versions": package_versions(),
            "files": {name: {"num_bytes": r.num_bytes, "sha256": r.sha256} for name, r in records.items()},
        }
        self._folder.commit(partial, manifest)
        self._folder.prune(state.step, state.scores, self._config.checkpoint)

    def _on_main(self, work: Callable[[], Any], what: str) -> Any:
        """What ``work`` returns on the main rank, on every rank; its failure is every rank's."""
        result, error = None, None
        if self._parallel.is_main:
            try:
                result = work()
            except CheckpointError as ours:
                error = ours
            except OSError as theirs:
                error = self._failure(what, f"{type(theirs).__name__}: {theirs}")
        result, error = self._parallel.all_gather_object((result, error))[0]
        if error is not None:
            raise error
        return result

    def _failure(self, what: object, reason: str) -> CheckpointError:
        """One message for whoever has to make room or fix permissions."""
        name = f"step {what}" if isinstance(what, int) else what
        kept = f"step {self._saved_step}'s is unharmed" if self._saved_step else "there is none before it"
        return CheckpointError(
            f"the checkpoint in {self._folder.root} cannot be written ({name}): {reason} "
            f"({free_words(self._folder.root)}). The last one: {kept}. "
            "Make room or fix the permissions, then start the same command again"
        )


def save_checkpoint(
    root: Path, policy: Checkpointable, state: TrainingState, parallel: ParallelState, config: RunConfig
) -> Path:
    """Write one checkpoint on all ranks and wait for it; see ``CheckpointStore.save``."""
    store = CheckpointStore(root, policy, parallel, config)
    store.save(state)
    store.finish()
    return root / f"step_{state.step:06d}"


def load_latest(root: Path, policy: Checkpointable, parallel: ParallelState, config: RunConfig) -> int:
    """Continue from ``root/latest``; returns the number of finished steps. See ``CheckpointStore.load``."""
    return CheckpointStore(root, policy, parallel, config).load().step


def _content(policy: Checkpointable, parallel: ParallelState, *, is_loading: bool, has_moments: bool) -> dict[str, Any]:
    model = policy.gpt.sharded_state_dict()
    content = {
        "model": model,
        "scheduler": policy.scheduler.state_dict(),
        "rng": ShardedObject("rng", [_get_rng()], (parallel.world_size,), (parallel.rank,), replica_id=0),
    }
    if has_moments:
        content["optimizer"] = policy.optimizer.sharded_state_dict(
            dict(model), is_loading=is_loading, metadata=_OPTIMIZER_FORMAT
        )
    return content


def _read(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    try:
        return dict(dist_checkpointing.load(content, str(folder)))
    # CheckpointException, torch's own, is a BaseException.
    except (CheckpointingException, CheckpointException, pickle.UnpicklingError, OSError, RuntimeError) as error:
        raise CheckpointError(f"{folder} does not fit this model or is damaged: {error}") from error


def _get_rng() -> dict[str, Any]:
    """Every generator of this process, as plain numbers and tensors, which need no pickle."""
    kind, words, position, has_gauss, cached = np.random.get_state()  # libraries draw from it
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "megatron": dict(get_cuda_rng_tracker().get_states()),
        "python": random.getstate(),
        "numpy": (str(kind), [int(w) for w in words], int(position), int(has_gauss), float(cached)),
    }


def _set_rng(loaded: list[dict[str, Any]]) -> None:
    state = loaded[0]
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states(state["megatron"])
    version_, words, gauss = state["python"]
    random.setstate((version_, tuple(words), gauss))
    kind, words, *rest = state["numpy"]
    np.random.set_state((kind, np.asarray(words, dtype=np.uint32), *rest))


def _optimizers(optimizer: Any) -> Iterator[Any]:
    yield from getattr(optimizer, "chained_optimizers", [optimizer])


def _has_moments(optimizer: Any) -> bool:
    """False before the first update: steps with nothing to learn may come first, and Adam has no state yet."""
    return any(bool(part.optimizer.state) for part in _optimizers(optimizer) if part.optimizer is not None)


def _refuse_broken_optimizer(optimizer: Any) -> None:
    is_distributed = any(isinstance(part, DistributedOptimizer) for part in _optimizers(optimizer))
    if is_distributed and megatron_optimizer.USING_PYTORCH_OPTIMIZER:
        raise CheckpointError(
            "checkpoints of megatron's distributed optimizer with torch's AdamW are wrong without an error "
            "(0.16.1): use the plain optimizer, or install transformer-engine"
        )


def _layout(parallel: ParallelState) -> dict[str, int]:
    return {"tp": parallel.tp_size, "pp": parallel.pp_size, "dp": parallel.dp_size}


def _changed_world(manifest: Mapping[str, Any], parallel: ParallelState) -> Iterator[str]:
    """What no setting says: the number of processes, and the libraries' versions."""
    before = {"ranks": math.prod(manifest["layout"].values()), **manifest.get("versions", {})}
    for name, new in {"ranks": parallel.world_size, **package_versions()}.items():
        if name in before and before[name] != new:
            yield f"{name} {before[name]} -> {new}"


def package_versions() -> dict[str, str]:
    """Of this package, of Python, and of the libraries that a run's numbers depend on."""
    packages = ("torch", "megatron-core", "transformers", "tokenizers", "safetensors", "numpy", "tantivy")
    own = {"megatron_sdsearch": megatron_sdsearch.__version__, "python": platform.python_version()}
    return own | {name: version(name) for name in packages}


def _code_sha256() -> str:
    """Of this package's source, which says more than a version number that nobody has raised."""
    root = Path(megatron_sdsearch.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()
