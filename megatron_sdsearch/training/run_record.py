"""Records of a run in its folder: its configuration, its starts, and whether it is finished.

The first rank writes two files to ``run_dir`` before anything slow: ``config.yaml``, which the command line can read
again, and ``environment.json``, a list with an entry for each start. Settings that may be secrets are left out and
named.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import torch
from omegaconf import OmegaConf

import megatron_sdsearch
from megatron_sdsearch.config import RunConfig, flatten, is_secret
from megatron_sdsearch.errors import CheckpointError, ConfigError, raise_problems
from megatron_sdsearch.files import write_file
from megatron_sdsearch.logging import names
from megatron_sdsearch.logging.metrics import read_metrics
from megatron_sdsearch.logging.summary import SUMMARY_FILE
from megatron_sdsearch.model.checkpoint import package_versions
from megatron_sdsearch.model.checkpoint_folder import CheckpointFolder, continuation_problems, read_manifest, step_of

CONFIG_FILE: Final = "config.yaml"
ENVIRONMENT_FILE: Final = "environment.json"
_HEADER: Final = "# Written by `sdsearch train` at every start: all settings, defaults included.\n"
_OTHER_CONFIG_FILE: Final = "config.resolved.yaml"
_GIT_TIMEOUT_S: Final = 10.0
_INTERPOLATION: Final = re.compile(r"(\\*)\$\{")
_USELESS_ALONE: Final = "retrieval.http.username"  # a username without its password is refused
Tree = dict[str, Any]


def write_run_record(config: RunConfig) -> None:
    """Write both files; called on the first rank only.

    A ``config.yaml`` of the user is not overwritten: the record is then ``config.resolved.yaml``.

    Raises:
        StorageError: ``run_dir`` cannot be written.
    """
    write_file(config_path(config.run_dir), config_text(config))
    path = config.run_dir / ENVIRONMENT_FILE
    try:
        starts = json.loads(path.read_text())
    except (OSError, ValueError):
        starts = []
    start = {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": command_line(sys.argv[1:]),
        "directory": str(Path.cwd()),
        "host": socket.gethostname(),
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "commit": commit_of(Path(megatron_sdsearch.__file__).parents[1]),
        "versions": package_versions(),
    }
    content = [*starts, start] if isinstance(starts, list) else [start]
    write_file(path, json.dumps(content, indent=1) + "\n")


def config_path(run_dir: Path) -> Path:
    """Return the path of a run's resolved configuration."""
    path = run_dir / CONFIG_FILE
    is_own = not path.exists() or path.read_text(errors="replace").startswith(_HEADER)
    return path if is_own else run_dir / _OTHER_CONFIG_FILE


def config_text(config: RunConfig) -> str:
    """Return YAML of all settings; ``load_config`` restores the same configuration, except for settings left out."""
    left_out: list[str] = []
    paths = {name for name, value in flatten(config.model_dump()).items() if isinstance(value, Path)}
    tree = _without_secrets(config.model_dump(mode="json"), left_out, paths)
    notes = "".join(f"# Left out because it may be a secret: {name}\n" for name in left_out)
    return _HEADER + notes + OmegaConf.to_yaml(OmegaConf.create(tree))  # quotes strings that look like numbers


def _without_secrets(tree: Mapping[str, Any], left_out: list[str], paths: Collection[str], prefix: str = "") -> Tree:
    """Return a copy for YAML without possible secrets, and append their names to ``left_out``."""
    copy: Tree = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            copy[key] = _without_secrets(value, left_out, paths, f"{name}.")
        elif value is not None and (is_secret(name, value) or name == _USELESS_ALONE):
            left_out.append(name)
        else:
            # Keeps a folder named "~..." from being expanded when it is read again.
            copy[key] = _escaped(f"./{value}" if name in paths and value.startswith("~") else value)
    return copy


def _escaped(value: Any) -> Any:
    """Escape the value so that text like an interpolation is not resolved again."""
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return _INTERPOLATION.sub(r"\1\1\\${", value) if isinstance(value, str) else value


def command_line(arguments: Sequence[str]) -> list[str]:
    """Return the command as typed, without values of overrides that may be secrets."""
    shown = ["sdsearch"]
    for argument in arguments:
        name, equals, value = argument.partition("=")
        is_hidden = equals and (is_secret(name) or is_secret(argument, value))
        shown.append(f"{name}=..." if is_hidden else argument)
    return shown


def commit_of(root: Path) -> Tree | None:
    """Return ``{"sha", "is_changed"}`` of a checkout; None for an installed package or if git fails."""
    if not (root / ".git").exists():  # git would search the folders above
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_GIT_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError):
        return None
    sha, dirty, _ = done.stdout.partition("-dirty")
    return {"sha": sha.strip(), "is_changed": bool(dirty)}


def is_finished(config: RunConfig) -> bool:
    """Return whether an earlier start has finished the run: last step, its evaluation, export and summary.

    Raises:
        ContinuationError: the folder holds another run, which this configuration does not continue.
        ConfigError: the run is finished and its checkpoints are gone: a new start would delete its other results.
    """
    run_dir, last = config.run_dir, config.train.num_steps
    newest = next(iter(CheckpointFolder(run_dir / "checkpoints").candidates()), None)
    if newest is None:
        if (run_dir / SUMMARY_FILE).is_file():
            raise ConfigError(
                "run_dir",
                f"{run_dir} holds a finished run without checkpoints",
                f"set another run_dir, or remove {SUMMARY_FILE} to start anew in this one",
            )
        return False
    try:
        manifest = read_manifest(newest)
    except CheckpointError:
        return False  # loading it gives a better error, or falls back to an older one
    raise_problems(continuation_problems(newest, manifest, config))
    if step_of(newest) != last or not (run_dir / SUMMARY_FILE).is_file():
        return False
    evaluated = {row["step"] for row in read_metrics(run_dir) if names.EVAL_EM in row}
    is_exported = (run_dir / "hf" / "config.json").is_file()
    return (last in evaluated or not config.evaluation.every) and (is_exported or not config.checkpoint.export_hf)
