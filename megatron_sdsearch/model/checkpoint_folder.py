"""The folder of a run's checkpoints: names, manifests, checksums, retention, and whether a run may continue from one.

The content of shards is handled in ``checkpoint.py``. A checkpoint is complete once its folder, with the manifest in
it, has its final name; ``latest`` is updated afterwards.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Final, TypedDict

from megatron_sdsearch.config import CheckpointConfig, RunConfig, default_of, flatten, is_secret, with_current_names
from megatron_sdsearch.errors import CheckpointError, ContinuationError
from megatron_sdsearch.files import replace_folder, write_file

MANIFEST: Final = "manifest.json"
FORMAT: Final = 3
"""Version of the manifest; in version 2 ``hindsight.labels=permuted`` was called ``shuffled``."""
LATEST: Final = "latest"
BEST: Final = "best"
_STEP: Final = "step_"
_PARTIAL: Final = ".partial_"
_OLD: Final = ".old_"
_log = logging.getLogger(__name__)


class FileRecord(TypedDict):
    """A manifest's entry for one file."""

    num_bytes: int
    sha256: str


def hash_file(path: Path, *, should_sync: bool = False) -> FileRecord:
    """Compute a file's size and checksum; ``should_sync`` also flushes it to the disk."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256")
        if should_sync:
            os.fsync(stream.fileno())
        return {"num_bytes": stream.tell(), "sha256": digest.hexdigest()}


def folder_name(step: int) -> str:
    """Return the name of the checkpoint after ``step`` finished steps."""
    return f"{_STEP}{step:06d}"


def step_of(folder: Path) -> int:
    """Return the step in the name of a checkpoint's folder."""
    return int(folder.name.removeprefix(_STEP))


@dataclass(frozen=True, slots=True)
class CheckpointFolder:
    """``run_dir/checkpoints``. Only one process of a run may call the methods that change it."""

    root: Path

    def steps(self) -> dict[int, Path]:
        """List completed checkpoints by step, ascending; they may have been damaged since."""
        folders = (f for f in self.root.glob(f"{_STEP}*") if f.name.removeprefix(_STEP).isdigit() and f.is_dir())
        return dict(sorted((step_of(folder), folder) for folder in folders))

    def candidates(self) -> list[Path]:
        """List the checkpoints that a run may continue from: first ``latest``, then older ones, newest first.

        Without ``latest`` (a run killed at the end of its first save) these are all completed ones.

        Raises:
            CheckpointError: ``latest`` does not name a checkpoint.
        """
        pointer = self.root / LATEST
        if not pointer.is_file():
            return list(reversed(self.steps().values()))
        latest = self.root / pointer.read_text().strip()
        if not latest.name.removeprefix(_STEP).isdigit():
            raise CheckpointError(
                f"{pointer} names {latest.name!r}, which is not a step_* folder: write the name of one into it"
            )
        older = [folder for step, folder in self.steps().items() if step < step_of(latest)]
        return [latest, *reversed(older)]

    def clean(self) -> None:
        """Remove the leftovers of killed saves."""
        for leftover in (*self.root.glob(f"{_PARTIAL}*"), *self.root.glob(f"{_OLD}*")):
            shutil.rmtree(leftover, ignore_errors=True)

    def begin(self, step: int) -> Path:
        """Create a new, empty folder to write into.

        Its name is unique, because a rank of a killed run may go on writing for a moment.
        """
        partial = self.root / f"{_PARTIAL}{folder_name(step)}_{time.time_ns():x}"
        partial.mkdir(parents=True)
        return partial

    def commit(self, partial: Path, manifest: Mapping[str, Any]) -> Path:
        """Add the manifest to ``partial``, rename the folder and make it the latest, all flushed to the disk."""
        target = self.root / folder_name(int(manifest["step"]))
        write_file(partial / MANIFEST, json.dumps(manifest, indent=1))
        replace_folder(partial, target)  # an old target was saved by a process killed before it updated ``latest``
        write_file(self.root / LATEST, target.name)
        return target

    def go_back(self, folder: Path) -> None:
        """Make an older checkpoint the latest; newer ones are renamed to ``damaged_*`` for inspection."""
        for step, newer in self.steps().items():
            if step > step_of(folder):
                newer.rename(self.root / f"damaged_{newer.name}_{time.time_ns():x}")
        write_file(self.root / LATEST, folder.name)

    def prune(self, current: int, scores: Mapping[int, float], config: CheckpointConfig) -> None:
        """Remove checkpoints that the settings do not keep and update ``best``; failed removals only log a warning."""
        folders = self.steps()
        kept, best = select_steps(folders, current, scores, config)
        if best is not None:
            write_file(self.root / BEST, folder_name(best))
        for step in folders.keys() - kept:
            doomed = self.root / f"{_OLD}{folders[step].name}"
            try:
                folders[step].rename(doomed)  # a half-removed checkpoint must not look complete
                shutil.rmtree(doomed)
            except OSError as error:
                _log.warning("checkpoint %s is no longer needed but cannot be removed: %s", folders[step], error)


def select_steps(
    steps: Collection[int], current: int, scores: Mapping[int, float], config: CheckpointConfig
) -> tuple[set[int], int | None]:
    """Choose the saved steps to keep: the last N, every Mth, and the best.

    Steps beyond ``current`` are not kept: they were saved before the run went back to an older checkpoint.

    Returns:
        The steps to keep, and the step with the highest score, the earliest among equals; None without a scored step or
        without ``keep_best``.
    """
    past = sorted(step for step in steps if step <= current)
    kept = set(past[-config.keep_last :])
    if config.keep_every:
        kept |= {step for step in past if step % config.keep_every == 0}
    scored = [step for step in past if step in scores and config.keep_best]
    best = max(scored, key=lambda step: scores[step], default=None)
    return kept | ({best} if best is not None else set()), best


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a checkpoint.

    Raises:
        CheckpointError: it is missing, or not a manifest.
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
            f"{folder} holds only weights, so no run can continue from it; start a new one with model.megatron_dir"
        )
    if not isinstance(manifest, dict) or not {"step", "config", "layout", "files"} <= manifest.keys():
        raise CheckpointError(f"{path} is not a manifest of this version: it lacks step, config, layout or files")
    return manifest


def run_date_of(run_dir: Path) -> date:
    """Return the date on which a run began, from its newest readable checkpoint; today without one.

    Chat templates that print the date get this one, so that prompts change neither at midnight nor when a run resumes.
    Checkpoints of earlier versions have no date: the run then continues with today's, which its next checkpoint
    records. Damaged checkpoints are reported when they are loaded, not here.
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
                "%s does not record when its run began: chat templates that print a date get %s", folder, today
            )
            return today
    return today


# Settings that may change when a run continues: locations of files and servers, output, layout, learning rates.
_MAY_CHANGE = (
    *("run_dir", "telemetry.", "evaluation.", "checkpoint.", "parallel.", "optimizer.", "train.num_steps"),
    *("rollout.sglang.", "retrieval.http.", "retrieval.index", "retrieval.elasticsearch.urls"),
    *(f"retrieval.elasticsearch.{name}" for name in ("username", "password", "api_key", "ca_file")),
)
_FREE_NAMES = "rollout.sglang.environment."
_PATHS = (
    *("model.hf_dir", "model.megatron_dir", "data.train", "data.heldout"),
    *("train.demonstrations", "retrieval.corpus"),
)


def continuation_problems(folder: Path, manifest: Mapping[str, Any], config: RunConfig) -> Iterator[ContinuationError]:
    """Yield the reasons why a run of ``config`` cannot continue from a checkpoint, one for each changed setting."""
    optimizer = "parallel.distributed_optimizer"
    for name, old, new in _differences(manifest, config):
        if name == optimizer:  # the two optimizers save their state under different names
            yield ContinuationError(f"{folder} was written with {optimizer} = {old}: set it back")
        elif not name.startswith(_MAY_CHANGE):
            # A changed model cannot start from the old model's weights.
            fork = "" if name == "model.hf_dir" else f", where model.megatron_dir={folder} starts from these weights"
            yield ContinuationError(
                f"{folder} was trained with {name} = {old}, this run has {new}: "
                f"set it back, or take another run_dir{fork}"
            )
    if manifest["step"] > config.train.num_steps:
        yield ContinuationError(
            f"{folder} is beyond train.num_steps = {config.train.num_steps}: raise it or take another run_dir"
        )


def changed_settings(manifest: Mapping[str, Any], config: RunConfig) -> list[str]:
    """List the settings that differ between ``config`` and a checkpoint, as ``optimizer.lr 1e-06 -> 0.0001``."""
    changes = []
    for name, *values in _differences(manifest, config):
        is_hidden = any(is_secret(name, value) for value in values)
        old, new = ("null" if value is None else str(value) for value in values)
        changes.append(f"{name} (a secret)" if is_hidden else f"{name} {old} -> {new}")
    return changes


def _differences(manifest: Mapping[str, Any], config: RunConfig) -> Iterator[tuple[str, Any, Any]]:
    """Yield settings that differ from the checkpoint's: name (the current one), old value, new value."""
    before, now = with_current_names(flatten(manifest["config"])), flatten(config.model_dump(mode="json"))
    if manifest.get("format", 0) < FORMAT:
        before.setdefault("rollout.eos_without_action", "notice")  # there was no other choice
        if before.get("hindsight.labels") == "shuffled":
            before["hindsight.labels"] = "permuted"  # format 2 called it shuffled
        if before.get("train.mode") == "warm_start":
            before.pop("data.prompt_profile", None)  # a warm start did not read it
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if name == "data.prompt_profile" and name not in before:
            continue
        if name not in before and not name.startswith(_FREE_NAMES):
            old = default_of(name)  # versions without the setting behaved like its default
        if name in _PATHS and old is not None and new is not None:
            old, new = Path(old).name, Path(new).name  # a folder may have moved
        if old != new:
            yield name, old, new


def damages(folder: Path, files: Mapping[str, FileRecord], names: Sequence[str], *, verify: bool) -> list[str]:
    """List damaged files of a checkpoint, by name.

    Args:
        folder: the checkpoint.
        files: the manifest's entries.
        names: the files to check.
        verify: also read the files and compare checksums, not only presence and size.
    """
    found = []
    for name in names:
        expected, path = files[name], folder / name
        try:
            num_bytes = path.stat().st_size
            if num_bytes != expected["num_bytes"]:
                found.append(f"{name} has {num_bytes} bytes instead of {expected['num_bytes']}")
            elif verify and hash_file(path)["sha256"] != expected["sha256"]:
                found.append(f"{name} has changed since it was written (sha256)")
        except FileNotFoundError:
            found.append(f"{name} is missing")
        except OSError as error:
            found.append(f"{name} cannot be read ({error})")
    return found


def fingerprint(path: Path, pattern: str = "*") -> str:
    """Hash a file, or names and content of a folder's files that match ``pattern``; "" if ``path`` does not exist."""
    if path.is_file():
        return hash_file(path)["sha256"]
    if not path.is_dir():
        return ""
    files = sorted(file for file in path.glob(pattern) if file.is_file())
    parts = [f"{file.relative_to(path)} {hash_file(file)['sha256']}" for file in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
