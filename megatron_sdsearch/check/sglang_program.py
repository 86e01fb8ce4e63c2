"""The program that starts SGLang servers: is it there, of which version, and does it know its flags?"""

from __future__ import annotations

import ast
import difflib
import json
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.version import InvalidVersion, Version

from megatron_sdsearch.check.findings import Attempt, Finding
from megatron_sdsearch.config import SGLangConfig
from megatron_sdsearch.errors import EngineError
from megatron_sdsearch.sglang.api import OLDEST_VERSION, TESTED_VERSION
from megatron_sdsearch.sglang.servers import server_environment

SECTION = "rollout.sglang"
_PROBE_S = 60.0
"""An interpreter on a shared file system may take long to start."""
_PROBE = """
import importlib.metadata, importlib.util, json
spec = importlib.util.find_spec("sglang")
folders = list(spec.submodule_search_locations or []) if spec else []
print(json.dumps({"version": importlib.metadata.version("sglang") if spec else None, "folders": folders}))
"""
_CERTAIN = ("--model-path", "--port", "--mem-fraction-static")
"""Flags of every SGLang: where they are not found, the others are not either."""


@dataclass(frozen=True, slots=True)
class _Installed:
    """SGLang as an interpreter finds it."""

    version: str
    folder: Path


def check_program(sglang: SGLangConfig) -> Iterator[Finding]:
    """Asks the command's own interpreter, without importing SGLang: that takes a GPU and half a minute."""
    field = f"{SECTION}.command"
    if not sglang.command or not Path(sglang.command[0]).name.startswith("python"):
        if sglang.command:
            yield Finding.note(field, f"{sglang.command[0]} is no Python: version and flags were not looked at")
        return
    attempt = Attempt.at(lambda: _probe(sglang))
    if attempt.error is not None:
        fix = "name the interpreter of an environment with SGLang"
        yield Finding.error(field, str(attempt.error), f"{fix} (on a CPU `make .sglang/.installed` makes one)")
    if attempt.value is not None:
        yield from check_version(field, attempt.value.version)
        yield from _unknown_flags(sglang, attempt.value)


def _probe(sglang: SGLangConfig) -> _Installed:
    program = sglang.command[0]
    environment = server_environment() | sglang.plain_environment
    try:
        done = subprocess.run(
            [program, "-c", _PROBE], env=environment, capture_output=True, text=True, timeout=_PROBE_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineError(f"{program} does not run: {error}") from error
    if done.returncode:
        raise EngineError(f"{program} does not run: {done.stderr.strip()[-300:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    if not found["version"] or not found["folders"]:
        raise EngineError(f"{program} has no SGLang")
    return _Installed(found["version"], Path(found["folders"][0]))


def check_version(field: str, version: str) -> Iterator[Finding]:
    """Against the range of docs/sglang.md."""
    try:
        number = Version(version)
    except InvalidVersion:
        yield Finding.warning(field, f"SGLang calls itself {version!r}, which is no version", f"use {TESTED_VERSION}")
        return
    if number < Version(OLDEST_VERSION):
        yield Finding.error(field, f"SGLang {version} is older than {OLDEST_VERSION}", f"use {TESTED_VERSION}")
    elif number > Version(TESTED_VERSION):
        yield Finding.warning(
            field,
            f"SGLang {version} is newer than {TESTED_VERSION}, the last one tried",
            "try a short run first",
        )
    else:
        yield Finding.note(field, f"SGLang {version}")


def _unknown_flags(sglang: SGLangConfig, installed: _Installed) -> Iterator[Finding]:
    """A warning and no error: SGLang has moved its flags twice, and some may be declared where nobody looked."""
    field, known = f"{SECTION}.arguments", known_flags(installed.folder / "srt")
    if not known.issuperset(_CERTAIN):
        yield Finding.note(field, "this SGLang keeps its flags elsewhere: none was looked up")
        return
    for flag in flags_of(sglang.arguments):
        if not any(name.startswith(flag) for name in known):  # argparse takes beginnings of flags
            near = difflib.get_close_matches(flag, known, n=1)
            fix = f"did you mean {near[0]}?" if near else "see `python -m sglang.launch_server --help`"
            yield Finding.warning(
                field, f"{flag} is not among the {len(known)} flags of SGLang {installed.version}", fix
            )


def flags_of(arguments: Sequence[str]) -> list[str]:
    """Names of the long flags in a command line."""
    return [argument.partition("=")[0] for argument in arguments if argument.startswith("--")]


def known_flags(srt: Path) -> frozenset[str]:
    """Flags that an SGLang declares, read from its source without running it.

    Three ways: ``add_argument("--name")``; fields of the class ServerArgs; since 0.5.23 fields of the classes in
    ``arg_groups/fields``.

    Args:
        srt: the package's folder ``sglang/srt``.
    """
    server_args = _parsed(srt / "server_args.py")
    groups = [_parsed(path) for path in sorted((srt / "arg_groups/fields").glob("*.py"))]
    nodes = [node for tree in (server_args, *groups) for node in ast.walk(tree)]
    literals = (node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))
    flags = {text for text in literals if re.fullmatch(r"--[a-z0-9-]+", text)}
    for node in nodes:
        if isinstance(node, ast.ClassDef):
            fields = (item.target for item in node.body if isinstance(item, ast.AnnAssign))
            flags |= {f"--{field.id.replace('_', '-')}" for field in fields if isinstance(field, ast.Name)}
    return frozenset(flags)


def _parsed(path: Path) -> ast.Module:
    """Empty when it is not there, or no Python of this version."""
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError):
        return ast.Module(body=[], type_ignores=[])
