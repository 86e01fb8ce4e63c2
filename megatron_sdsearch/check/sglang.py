"""SGLang: the program that starts servers, its flags and GPUs; with ``--online`` what attached servers say."""

from __future__ import annotations

import ast
import difflib
import json
import os
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version

from megatron_sdsearch.check.findings import Attempt, Finding
from megatron_sdsearch.check.subject import Subject
from megatron_sdsearch.config import SGLangConfig
from megatron_sdsearch.errors import EngineError
from megatron_sdsearch.model.hf_config import read_hf_config
from megatron_sdsearch.rollout.server_process import (
    find_obstacle,
    own_environment,
    read_model_info,
    read_server_info,
)
from megatron_sdsearch.rollout.sglang_api import OLDEST_VERSION, TESTED_VERSION
from megatron_sdsearch.rollout.sglang_servers import check_has_weights, free_ports, split_gpus

_SECTION = "rollout.sglang"
_ANSWER_S = 10.0
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
# The supervisor gives these itself; a second one would win.
_OURS = ("--model-path", "--model", "--host", "--port", "--tp-size", "--tensor-parallel-size", "--tp")


def check(subject: Subject) -> Iterator[Finding]:
    """Nothing where the trainer samples by itself."""
    if not subject.config.samples_from_sglang:
        return
    sglang = subject.config.rollout.sglang
    if sglang.urls:
        yield from _attached(subject, sglang)
    else:
        yield from _own(subject, sglang)
    if sglang.colocated and sglang.weight_sync == "disk":
        yield Finding.note(f"{_SECTION}.weight_sync", "disk: every publish writes the whole model, see docs/sglang.md")


def _own(subject: Subject, sglang: SGLangConfig) -> Iterator[Finding]:
    """Servers that the first rank starts."""
    world = subject.world
    if world.num_nodes > 1:
        yield Finding.error(
            f"{_SECTION}.urls",
            f"empty, and the run has {world.num_nodes} nodes: own servers listen on 127.0.0.1 of the first one",
            "start servers yourself and name them here",
        )
    if subject.config.model.hf_dir.is_dir():
        attempt = Attempt.at(lambda: check_has_weights(subject.config.model.hf_dir))
        if attempt.error is not None:
            yield Finding.of(attempt.error, "model.hf_dir")
    if world.has_gpu:
        yield from _gpus(subject, sglang)
    ports = Attempt.at(lambda: free_ports(sglang.num_servers, "127.0.0.1"))
    if ports.error is not None:
        yield Finding.error(f"{_SECTION}.num_servers", str(ports.error), "end what uses them, or start fewer servers")
    for flag in sorted(set(_flags(sglang.arguments)) & set(_OURS)):
        yield Finding.error(
            f"{_SECTION}.arguments",
            f"{flag} is given by the trainer, and yours would win",
            "remove it",
        )
    yield from _program(sglang)


def _gpus(subject: Subject, sglang: SGLangConfig) -> Iterator[Finding]:
    """As the first rank hands them out: what its node's trainers leave over, or their own where colocated."""
    world = subject.world
    names = [str(index) for index in range(world.gpus_per_node)]
    trainers, rest = names[: world.ranks_per_node], names[world.ranks_per_node :]
    if not sglang.colocated and not rest and sglang.tensor == 1:
        yield Finding.error(
            f"{_SECTION}.num_servers",
            f"{world.ranks_per_node} trainers take all {world.gpus_per_node} GPUs of a node: servers get none",
            "start fewer trainers per node, set rollout.sglang.colocated=true, or attach to rollout.sglang.urls",
        )
        return
    attempt = Attempt.at(lambda: split_gpus(trainers if sglang.colocated else rest, sglang))
    if attempt.error is not None:
        yield Finding.of(attempt.error, f"{_SECTION}.num_servers")


@dataclass(frozen=True, slots=True)
class _Installed:
    """SGLang as an interpreter finds it."""

    version: str
    folder: Path


def _program(sglang: SGLangConfig) -> Iterator[Finding]:
    """Asks the command's own interpreter, without importing SGLang: that takes a GPU and half a minute."""
    field = f"{_SECTION}.command"
    if not sglang.command or not Path(sglang.command[0]).name.startswith("python"):
        if sglang.command:
            yield Finding.note(field, f"{sglang.command[0]} is no Python: version and flags were not looked at")
        return
    attempt = Attempt.at(lambda: _probe(sglang))
    if attempt.error is not None:
        mend = "name the interpreter of an environment with SGLang"
        yield Finding.error(field, str(attempt.error), f"{mend} (on a CPU `make .sglang/.installed` makes one)")
    if attempt.value is not None:
        yield from _version(field, attempt.value.version)
        yield from _unknown_flags(sglang, attempt.value)


def _probe(sglang: SGLangConfig) -> _Installed:
    program = sglang.command[0]
    environment = own_environment() | dict(sglang.environment)
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


def _version(field: str, version: str) -> Iterator[Finding]:
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
    field, known = f"{_SECTION}.arguments", known_flags(installed.folder / "srt")
    if not known.issuperset(_CERTAIN):
        yield Finding.note(field, "this SGLang keeps its flags elsewhere: none was looked up")
        return
    for flag in _flags(sglang.arguments):
        if not any(name.startswith(flag) for name in known):  # argparse takes beginnings of flags
            near = difflib.get_close_matches(flag, known, n=1)
            mend = f"did you mean {near[0]}?" if near else "see `python -m sglang.launch_server --help`"
            yield Finding.warning(
                field, f"{flag} is not among the {len(known)} flags of SGLang {installed.version}", mend
            )


def _flags(arguments: Sequence[str]) -> list[str]:
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


def _attached(subject: Subject, sglang: SGLangConfig) -> Iterator[Finding]:
    """Servers that somebody else runs."""
    if not subject.is_online:
        yield Finding.note(f"{_SECTION}.urls", f"{len(sglang.urls)} servers were not asked; --online does")
        return
    for url in sglang.urls:
        yield from _server(subject, sglang, url)


def _server(subject: Subject, sglang: SGLangConfig, url: str) -> Iterator[Finding]:
    field = f"{_SECTION}.urls"
    attempt = Attempt.at(lambda: find_obstacle(url, _ANSWER_S))
    if attempt.error is not None:
        yield Finding.of(attempt.error, field)
        return
    if attempt.value:
        yield Finding.error(
            field, f"{url}/model_info does not answer: {attempt.value}", "start it, or give another address"
        )
        return
    info = read_model_info(url, _ANSWER_S) or {}
    yield from _model(subject, url, info)
    arguments = Attempt.at(lambda: read_server_info(url, _ANSWER_S))
    if arguments.error is not None:
        yield Finding.warning(field, str(arguments.error), "attach to SGLang itself, with no router in between")
    if arguments.value is not None:
        yield from _version(field, str(arguments.value.get("version")))
        yield from _arguments(subject, sglang, url, arguments.value)


def _model(subject: Subject, url: str, info: Mapping[str, Any]) -> Iterator[Finding]:
    field, hf_config = f"{_SECTION}.urls", subject.hf_config.value
    if info.get("is_generation") is False:
        yield Finding.error(field, f"{url} serves an embedding model", "start it with the policy's model")
    served = info.get("model_type")
    if hf_config is not None and served and served != hf_config.model_type:
        yield Finding.error(
            field, f"{url} serves a {served}, the policy is a {hf_config.model_type}", "start it with model.hf_dir"
        )
    path = Path(str(info.get("model_path")))
    own = subject.config.model.hf_dir
    if path.is_dir() and own.is_dir() and not os.path.samefile(path, own):
        yield from _same_shape(subject, url, path)
    elif not path.is_dir():
        yield Finding.note(
            field,
            f"{url} serves {path}, which is not to be seen from here; weights version {info.get('weight_version')}",
        )


def _same_shape(subject: Subject, url: str, path: Path) -> Iterator[Finding]:
    """Weights are sent into the served model: it must have the policy's shapes."""
    mine, theirs = subject.hf_config.value, Attempt.at(lambda: read_hf_config(path)).value
    if mine is None or theirs is None:
        return
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings"):
        if getattr(mine, name, None) != getattr(theirs, name, None):
            yield Finding.error(
                f"{_SECTION}.urls",
                f"{url} serves {path} with {name} = {getattr(theirs, name, None)}, the policy has "
                f"{getattr(mine, name, None)}",
                "start it with model.hf_dir",
            )


def _arguments(subject: Subject, sglang: SGLangConfig, url: str, told: Mapping[str, Any]) -> Iterator[Finding]:
    tensor = told.get("tp_size")
    if isinstance(tensor, int) and tensor != sglang.tensor:
        yield Finding.error(
            f"{_SECTION}.tensor", f"{sglang.tensor}, and {url} runs with --tp-size {tensor}", f"set it to {tensor}"
        )
    rollout, hindsight = subject.config.rollout, subject.config.hindsight
    longest = rollout.max_total_tokens + hindsight.max_block_tokens
    limits = {name: told.get(name) for name in ("context_length", "max_total_num_tokens")}
    for name, limit in limits.items():
        if isinstance(limit, int) and limit < longest:
            yield Finding.error(
                "rollout.max_total_tokens",
                f"with hindsight.max_block_tokens {longest} tokens, {url} takes {limit} ({name})",
                "lower one of the two, or start the server with more (--context-length, --mem-fraction-static)",
            )
    if sglang.colocated and told.get("enable_memory_saver") is False:
        yield Finding.error(
            f"{_SECTION}.colocated", f"true, and {url} would keep its memory", "start it with --enable-memory-saver"
        )
    if told.get("skip_tokenizer_init"):
        yield Finding.error(
            f"{_SECTION}.urls",
            f"{url} has no tokenizer, and stops are strings",
            "leave --skip-tokenizer-init out",
        )
