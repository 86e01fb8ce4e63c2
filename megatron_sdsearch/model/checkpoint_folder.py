"""The folder of checkpoints: which is the newest, whether one is whole, which ones go.

Owns names, checksums, atomic moves, retention, and which run may go on from a checkpoint. Knows nothing of what is in a
shard: that is ``checkpoint``'s. A checkpoint counts from the moment its folder has its name, which it gets with its
manifest inside; ``latest`` moves after that.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Final

from megatron_sdsearch.config import CheckpointConfig, RunConfig, default_of, flatten, is_secret, with_current_names
from megatron_sdsearch.errors import CheckpointError, ContinuationError
from megatron_sdsearch.files import sync_folder, write_durably

MANIFEST: Final = "manifest.json"
FORMAT: Final = 3
"""Of manifests; 2 had ``hindsight.labels=permuted`` under the name of ``shuffled``."""
LATEST: Final = "latest"
BEST: Final = "best"
_STEP: Final = "step_"
_PARTIAL: Final = ".partial_"
_OLD: Final = ".old_"
_CHUNK: Final = 1 << 22
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """What a manifest says of one file."""

    num_bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path, *, should_sync: bool = False) -> FileRecord:
        """Read a file in pieces; with ``should_sync`` it is on the disk afterwards."""
        digest = hashlib.sha256()
        with path.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
            if should_sync:
                os.fsync(stream.fileno())
            return cls(num_bytes=stream.tell(), sha256=digest.hexdigest())


def folder_name(step: int) -> str:
    """Of the checkpoint after ``step`` finished steps."""
    return f"{_STEP}{step:06d}"


def step_of(folder: Path) -> int:
    """The step that a checkpoint's folder is named after."""
    return int(folder.name.removeprefix(_STEP))


class CheckpointFolder:
    """``run_dir/checkpoints``. One process alone calls what changes it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def steps(self) -> dict[int, Path]:
        """Folders that were completed, by step in ascending order; nobody has looked whether they still are whole."""
        folders = (f for f in self.root.glob(f"{_STEP}*") if f.name.removeprefix(_STEP).isdigit() and f.is_dir())
        return dict(sorted((step_of(folder), folder) for folder in folders))

    def candidates(self) -> list[Path]:
        """What a run may go on from: first what ``latest`` names, then older ones, the newest of them first.

        Without ``latest`` (a run that was killed while it ended its first save) all complete ones.
        """
        pointer = self.root / LATEST
        if not pointer.is_file():
            return list(reversed(self.steps().values()))
        latest = self.root / pointer.read_text().strip()
        if not latest.name.removeprefix(_STEP).isdigit():
            raise CheckpointError(f"{pointer} names {latest.name!r}, no step_* folder: write one's name into it")
        older = [folder for step, folder in self.steps().items() if step < step_of(latest)]
        return [latest, *reversed(older)]

    def clean(self) -> None:
        """Remove what saves that were killed have left behind."""
        for pattern in (f"{_PARTIAL}*", f"{_OLD}*"):
            for leftover in self.root.glob(pattern):
                shutil.rmtree(leftover, ignore_errors=True)

    def begin(self, step: int) -> Path:
        """A new, empty folder to write into.

        Its name is its own: a rank of a killed run that lives on for a moment writes into another one.
        """
        partial = self.root / f"{_PARTIAL}{folder_name(step)}_{time.time_ns():x}"
        partial.mkdir(parents=True)
        return partial

    def commit(self, partial: Path, manifest: Mapping[str, Any]) -> Path:
        """Complete ``partial`` with its manifest, give it its name, and make it the latest: all flushed to the disk."""
        target = self.root / folder_name(int(manifest["step"]))
        write_durably(partial / MANIFEST, json.dumps(manifest, indent=1))
        old = self.root / f"{_OLD}{target.name}_{time.time_ns():x}"
        if target.exists():  # of a process that was killed before it became the latest
            target.rename(old)
        partial.rename(target)
        sync_folder(self.root)
        write_durably(self.root / LATEST, target.name)
        shutil.rmtree(old, ignore_errors=True)
        return target

    def go_back(self, folder: Path) -> None:
        """Make an older checkpoint the latest; newer ones are kept as ``damaged_*`` for somebody to look at."""
        for step, newer in self.steps().items():
            if step > step_of(folder):
                newer.rename(self.root / f"damaged_{newer.name}_{time.time_ns():x}")
        write_durably(self.root / LATEST, folder.name)

    def prune(self, current: int, scores: Mapping[int, float], config: CheckpointConfig) -> None:
        """Remove what the settings do not keep, and name the best. A folder that cannot go is said, and no error."""
        folders = self.steps()
        best = best_step(folders, scores, current) if config.keep_best else None
        kept = kept_steps(folders, current, best, config)
        if best is not None:
            write_durably(self.root / BEST, folder_name(best))
        for step in folders.keys() - kept:
            doomed = self.root / f"{_OLD}{folders[step].name}"
            try:
                folders[step].rename(doomed)  # half a checkpoint must not look like one
                shutil.rmtree(doomed)
            except OSError as error:
                _log.warning("checkpoint %s is not needed any more and cannot be removed: %s", folders[step], error)


def best_step(steps: Iterable[int], scores: Mapping[int, float], current: int) -> int | None:
    """The saved step with the highest score, the earliest of equal ones; None when none of them was scored."""
    scored = [step for step in sorted(steps) if step in scores and step <= current]
    return max(scored, key=lambda step: scores[step], default=None)


def kept_steps(steps: Collection[int], current: int, best: int | None, config: CheckpointConfig) -> set[int]:
    """The last N, every Mth and the best of the saved steps.

    Steps beyond ``current`` belong to a future that this run has left (it went back to an older checkpoint): they go.
    """
    past = sorted(step for step in steps if step <= current)
    kept = set(past[-config.keep_last :])
    if config.keep_every:
        kept |= {step for step in past if step % config.keep_every == 0}
    return kept | ({best} if best is not None else set())


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: it is missing or no manifest.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is not a complete checkpoint: {MANIFEST} is missing") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if isinstance(manifest, dict) and "layout" in manifest and "config" not in manifest:
        raise CheckpointError(
            f"{folder} holds weights alone: start a run from it with model.megatron_dir, nothing can be continued"
        )
    if not isinstance(manifest, dict) or not {"step", "config", "layout", "files"} <= manifest.keys():
        raise CheckpointError(f"{path} is no manifest of this version: it lacks step, config, layout or files")
    return manifest


def run_date_of(run_dir: Path) -> date:
    """On which a run began, by its newest checkpoint that can be read; today for one that has none.

    Chat templates that tell the date are told this one, so that prompts neither change at midnight nor at a resume. A
    checkpoint of an earlier version records no date: its run goes on with today's, which its next checkpoint records.
    What is wrong with a checkpoint is not said here: loading it does that.
    """
    today = date.today()
    try:
        newest = CheckpointFolder(run_dir / "checkpoints").candidates()
    except (CheckpointError, OSError, ValueError):
        return today
    for folder in newest:
        try:
            recorded = str(read_manifest(folder).get("run_date"))
        except CheckpointError:
            continue
        try:
            return date.fromisoformat(recorded)
        except ValueError:
            _log.warning(
                "%s records no date of its run: a chat template that tells one is told today's, %s", folder, today
            )
            return today
    return today


# What may change between a run and its continuation: where things and servers are, what is written, layout, rates.
_MAY_CHANGE = (
    *("run_dir", "telemetry.", "evaluation.", "checkpoint.", "parallel.", "optimizer.", "train.num_steps"),
    *("rollout.sglang.", "retrieval.http.", "retrieval.index", "retrieval.elasticsearch.urls"),
    *(f"retrieval.elasticsearch.{name}" for name in ("username", "password", "api_key", "ca_file")),
)
_FREE_NAMES = "rollout.sglang.environment."
_PATHS = (
    "model.hf_dir",
    "model.megatron_dir",
    "data.train",
    "data.heldout",
    "train.demonstrations",
    "retrieval.corpus",
)


def continuation_problems(folder: Path, manifest: Mapping[str, Any], config: RunConfig) -> Iterator[ContinuationError]:
    """Why a run of ``config`` cannot go on from a checkpoint: each setting that was another one then."""
    kind = "parallel.distributed_optimizer"
    for name, old, new in _differences(manifest, config):
        if name == kind:  # the two keep their state under other names
            yield ContinuationError(f"{folder} was written with {kind} = {old}: set it back")
        elif not name.startswith(_MAY_CHANGE):
            # Of another network nothing could be taken over.
            fork = "" if name == "model.hf_dir" else f", where model.megatron_dir={folder} starts from these weights"
            yield ContinuationError(
                f"{folder} was trained with {name} = {old}, this run has {new}: "
                f"set it back, or take another run_dir{fork}"
            )
    if manifest["step"] > config.train.num_steps:
        yield ContinuationError(
            f"{folder} is beyond train.num_steps = {config.train.num_steps}: raise it or take another run_dir"
        )


def _settings(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the run that wrote a manifest, under today's names."""
    settings = with_current_names(flatten(manifest["config"]))
    if manifest.get("format", 0) < FORMAT:
        settings.setdefault("rollout.eos_without_action", "notice")  # there was no other way
        if settings.get("hindsight.labels") == "shuffled":
            settings["hindsight.labels"] = "permuted"  # what format 2 called so
        if settings.get("train.mode") == "warm_start":
            settings.pop("data.prompt_profile", None)  # a warm start did not read it
    return settings


def changed_settings(manifest: Mapping[str, Any], config: RunConfig) -> list[str]:
    """What a run of ``config`` does otherwise than its checkpoint, in words: ``optimizer.lr 1e-06 -> 0.0001``."""
    changes = []
    for name, old, new in _differences(manifest, config):
        hidden = is_secret(name, old) or is_secret(name, new)
        changes.append(f"{name} (a secret)" if hidden else f"{name} {_word(old)} -> {_word(new)}")
    return changes


def _word(value: object) -> str:
    return "null" if value is None else str(value)


def _differences(manifest: Mapping[str, Any], config: RunConfig) -> Iterator[tuple[str, Any, Any]]:
    """Settings that were others when the checkpoint was written: name, value then, value now."""
    before, now = _settings(manifest), flatten(config.model_dump(mode="json"))
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if name == "data.prompt_profile" and name not in before:
            continue
        if name not in before and not name.startswith(_FREE_NAMES):
            old = default_of(name)  # what the version of that time did without knowing the setting
        if name in _PATHS and old is not None and new is not None:
            old, new = Path(old).name, Path(new).name  # a folder may have moved
        if old != new:
            yield name, old, new


def damages(folder: Path, files: Mapping[str, Mapping[str, Any]], names: Sequence[str], *, verify: bool) -> list[str]:
    """What is wrong with some files of a checkpoint, each named.

    Args:
        folder: of the checkpoint.
        files: of its manifest.
        names: the files to look at.
        verify: read them whole and compare checksums; else only presence and size.
    """
    found = []
    for name in names:
        expected, path = files[name], folder / name
        try:
            num_bytes = path.stat().st_size
            if num_bytes != expected["num_bytes"]:
                found.append(f"{name} has {num_bytes} bytes instead of {expected['num_bytes']}")
            elif verify and FileRecord.of(path).sha256 != expected["sha256"]:
                found.append(f"{name} has changed since it was written (sha256)")
        except FileNotFoundError:
            found.append(f"{name} is missing")
        except OSError as error:
            found.append(f"{name} cannot be read ({error})")
    return found


def fingerprint(path: Path) -> str:
    """Identity of a file, or of a folder's files, by content; "" where there is nothing."""
    if path.is_file():
        return FileRecord.of(path).sha256
    if not path.is_dir():
        return ""
    parts = [f"{file.name} {FileRecord.of(file).sha256}" for file in sorted(path.iterdir()) if file.is_file()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
