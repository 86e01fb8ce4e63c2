"""What a run was: its resolved configuration, and how, where and with what each of its processes was started.

Two files in ``run_dir``, written by the first rank before anything slow: ``config.yaml``, which the command line reads
again, and ``environment.json``, a list with an entry for each start. Neither holds a secret: a setting that may be one
is left out and named.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import torch
from omegaconf import OmegaConf

import megatron_sdsearch
from megatron_sdsearch.config import RunConfig, flatten, is_secret
from megatron_sdsearch.files import write_file
from megatron_sdsearch.model.checkpoint import package_versions

CONFIG_FILE: Final = "config.yaml"
ENVIRONMENT_FILE: Final = "environment.json"
_HEADER: Final = "# Written by `sdsearch train` at every start: all settings, defaults included.\n"
_OTHER_CONFIG_FILE: Final = "config.resolved.yaml"
_GIT_TIMEOUT_S: Final = 10.0
_INTERPOLATION: Final = re.compile(r"(\\*)\$\{")
_USELESS_ALONE: Final = "retrieval.http.username"  # refused without its password
Tree = dict[str, Any]


def write_run_record(config: RunConfig) -> None:
    """Write both files; the other ranks do not call it.

    A ``config.yaml`` that a person has put into the folder stays as it is: then ours is ``config.resolved.yaml``.

    Raises:
        StorageError: ``run_dir`` cannot be written.
    """
    write_file(config_path(config.run_dir), config_text(config))
    starts = [*_starts(config.run_dir), this_start()]
    write_file(config.run_dir / ENVIRONMENT_FILE, json.dumps(starts, indent=1) + "\n")


def config_path(run_dir: Path) -> Path:
    """Where a run's resolved configuration is, or will be."""
    path = run_dir / CONFIG_FILE
    is_ours = not path.exists() or path.read_text(errors="replace").startswith(_HEADER)
    return path if is_ours else run_dir / _OTHER_CONFIG_FILE


def config_text(config: RunConfig) -> str:
    """YAML of all settings; ``load_config`` of it gives the same configuration, but for what is left out."""
    left_out: list[str] = []
    paths = {name for name, value in flatten(config.model_dump()).items() if isinstance(value, Path)}
    tree = _without_secrets(config.model_dump(mode="json"), left_out, paths)
    words = "".join(f"# Left out, for it may be a secret: {name}\n" for name in left_out)
    return _HEADER + words + OmegaConf.to_yaml(OmegaConf.create(tree))  # it knows which texts it would read as numbers


def command_line(arguments: Sequence[str]) -> list[str]:
    """As it was typed, from the command's name on; the value of an override that may be a secret is left out."""
    return ["sdsearch", *map(_shown, arguments)]


def this_start() -> Tree:
    """How this process was started."""
    return {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": command_line(sys.argv[1:]),
        "directory": str(Path.cwd()),
        "host": socket.gethostname(),
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "commit": commit_of(Path(megatron_sdsearch.__file__).parents[1]),
        "versions": package_versions(),
    }


def commit_of(root: Path) -> Tree | None:
    """``{"sha", "is_changed"}`` of a checkout; None for an installed package, or where git cannot say."""
    if not (root / ".git").exists():  # git itself would find the repository of a folder above
        return None
    try:
        sha, changes = (_git(root, *words) for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"]))
    except (OSError, subprocess.SubprocessError):
        return None
    return {"sha": sha, "is_changed": bool(changes)}


def _git(root: Path, *words: str) -> str:
    command = ["git", "-C", str(root), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_GIT_TIMEOUT_S)
    return done.stdout.strip()


def _starts(run_dir: Path) -> list[Any]:
    """Of processes before this one; none where the file is not what we write."""
    try:
        starts = json.loads((run_dir / ENVIRONMENT_FILE).read_text())
    except (OSError, ValueError):
        return []
    return starts if isinstance(starts, list) else []


def _without_secrets(tree: Mapping[str, Any], left_out: list[str], paths: Collection[str], prefix: str = "") -> Tree:
    return dict(_kept(tree, left_out, paths, prefix))


def _kept(
    tree: Mapping[str, Any], left_out: list[str], paths: Collection[str], prefix: str
) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield key, _without_secrets(value, left_out, paths, f"{name}.")
        elif value is not None and (is_secret(name, value) or name == _USELESS_ALONE):
            left_out.append(name)
        else:
            # A folder whose name begins with "~" is not a home directory when it is read again.
            yield key, _escaped(f"./{value}" if name in paths and value.startswith("~") else value)


def _escaped(value: Any) -> Any:
    """What was resolved must not be resolved again."""
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return _INTERPOLATION.sub(r"\1\1\\${", value) if isinstance(value, str) else value


def _shown(argument: str) -> str:
    name, equals, value = argument.partition("=")
    is_hidden = is_secret(name) or is_secret(argument, value)
    return f"{name}=..." if equals and is_hidden else argument
