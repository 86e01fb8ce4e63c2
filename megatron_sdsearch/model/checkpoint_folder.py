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
from pathlib import Path
from typing import Any, Final

from megatron_sdsearch.config import CheckpointConfig, RunConfig, default_of, flatten
from megatron_sdsearch.errors import CheckpointError

MANIFEST: Final = "manifest.json"
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
        if target.exists():
            target.rename(self.root / f"{_OLD}{target.name}_{time.time_ns():x}")
        partial.rename(target)
        _sync_folder(self.root)
        write_durably(self.root / LATEST, target.name)
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


# What may change between a run and its continuation: where things and servers are, what is written, layout, rates.
_MAY_CHANGE = (
    *("run_dir", "telemetry.", "evaluation.", "checkpoint.", "parallel.", "optimizer.", "train.num_steps"),
    *("rollout.sglang.", "retrieval.http.", "retrieval.index", "retrieval.elasticsearch.urls"),
    *(f"retrieval.elasticsearch.{name}" for name in ("username", "password", "api_key", "ca_file")),
)
_PATHS = (
    "model.hf_dir",
    "model.megatron_dir",
    "data.train",
    "data.heldout",
    "train.demonstrations",
    "retrieval.corpus",
)


def continuation_problems(folder: Path, manifest: Mapping[str, Any], config: RunConfig) -> Iterator[CheckpointError]:
    """Why a run of ``config`` cannot go on from a checkpoint: each setting that was another one then."""
    before, now = flatten(manifest["config"]), flatten(config.model_dump(mode="json"))
    kind = "parallel.distributed_optimizer"
    if bool(before.get(kind)) != now[kind]:  # the two keep their state under other names
        yield CheckpointError(f"{folder} was written with {kind} = {not now[kind]}: set it back")
    for name in sorted(before.keys() | now.keys()):
        if name.startswith(_MAY_CHANGE):
            continue
        # A setting that the version of that time did not have yet was what its default is now.
        old = before[name] if name in before else default_of(name)
        new = now.get(name)
        if name in _PATHS and old is not None and new is not None:
            old, new = Path(old).name, Path(new).name  # a folder may have moved
        if old != new:
            yield CheckpointError(
                f"{folder} was trained with {name} = {old}, this run has {new}: set it back or take another run_dir"
            )
    if manifest["step"] > config.train.num_steps:
        yield CheckpointError(
            f"{folder} is beyond train.num_steps = {config.train.num_steps}: raise it or take another run_dir"
        )


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


def write_durably(path: Path, text: str) -> None:
    """Write beside and rename, with both flushed to the disk: a reader sees the old text or the new."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.rename(path)
    _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
