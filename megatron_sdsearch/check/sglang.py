"""SGLang servers: GPUs and ports for own ones; with ``--online`` what attached ones say. The program is elsewhere."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_sdsearch.check.findings import Attempt, Finding
from megatron_sdsearch.check.sglang_program import SECTION, check_program, check_version, flags_of
from megatron_sdsearch.check.subject import Subject
from megatron_sdsearch.config import SGLangConfig
from megatron_sdsearch.model.hf_config import read_hf_config
from megatron_sdsearch.sglang.api import SGLangServer
from megatron_sdsearch.sglang.rules import no_gpus_left, own_server_problems, server_problems, split_gpus
from megatron_sdsearch.sglang.servers import find_obstacle, free_ports

_ANSWER_S = 10.0
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
        yield Finding.note(f"{SECTION}.weight_sync", "disk: every publish writes the whole model, see docs/sglang.md")


def _own(subject: Subject, sglang: SGLangConfig) -> Iterator[Finding]:
    """Servers that the first rank starts, or slurm/train.sh."""
    world = subject.world
    is_elsewhere = world.num_sglang_nodes > 0 or sglang.colocated
    if world.num_nodes > 1 and not is_elsewhere:
        yield Finding.error(
            f"{SECTION}.urls",
            f"empty, and the run has {world.num_nodes} nodes: own servers listen on 127.0.0.1 of the first one",
            "let slurm/train.sh start them on nodes of their own (SDSEARCH_SGLANG_NODES), or name yours here",
        )
    if world.has_gpu:
        yield from _gpus(subject, sglang)
    if not world.num_sglang_nodes:
        ports = Attempt.at(lambda: free_ports(sglang.num_servers, "127.0.0.1"))
        if ports.error is not None:
            yield Finding.error(
                f"{SECTION}.num_servers", str(ports.error), "end what uses them, or start fewer servers"
            )
    for problem in own_server_problems(subject.config, subject.hf_config.value):
        yield Finding.of(problem, problem.field)
    for flag in sorted(set(flags_of(sglang.arguments)) & set(_OURS)):
        yield Finding.error(
            f"{SECTION}.arguments",
            f"{flag} is given by the trainer, and yours would win",
            "remove it",
        )
    yield from check_program(sglang)


def _gpus(subject: Subject, sglang: SGLangConfig) -> Iterator[Finding]:
    """As the first rank hands them out: what its node's trainers leave over, or their own where colocated."""
    world = subject.world
    if world.num_sglang_nodes:
        if sglang.tp_size > world.gpus_per_node:
            told = f"{sglang.tp_size} GPUs of a server, and nodes have {world.gpus_per_node}"
            yield Finding.error(f"{SECTION}.tp_size", told, "lower it")
        return
    names = [str(index) for index in range(world.gpus_per_node)]
    trainers, rest = names[: world.ranks_per_node], names[world.ranks_per_node :]
    if not sglang.colocated and not rest and sglang.tp_size == 1:
        yield Finding.of(no_gpus_left(world.ranks_per_node, world.gpus_per_node), f"{SECTION}.num_servers")
        return
    attempt = Attempt.at(lambda: split_gpus(trainers if sglang.colocated else rest, sglang))
    if attempt.error is not None:
        yield Finding.of(attempt.error, f"{SECTION}.num_servers")


def _attached(subject: Subject, sglang: SGLangConfig) -> Iterator[Finding]:
    """Servers that somebody else runs."""
    if not subject.is_online:
        yield Finding.note(f"{SECTION}.urls", f"{len(sglang.urls)} servers were not asked; --online does")
        return
    for url in sglang.urls:
        yield from _server(subject, sglang, url)


def _server(subject: Subject, sglang: SGLangConfig, url: str) -> Iterator[Finding]:
    field = f"{SECTION}.urls"
    attempt = Attempt.at(lambda: find_obstacle(url, _ANSWER_S))
    if attempt.error is not None:
        yield Finding.of(attempt.error, field)
        return
    if attempt.value:
        yield Finding.error(
            field, f"{url}/model_info does not answer: {attempt.value}", "start it, or give another address"
        )
        return
    server = SGLangServer(url, timeout_s=_ANSWER_S)
    yield from _model(subject, url, Attempt.at(lambda: asyncio.run(server.call("/model_info"))).value or {})
    arguments = Attempt.at(lambda: asyncio.run(server.call("/server_info")))
    if arguments.error is not None:
        yield Finding.warning(field, str(arguments.error), "attach to SGLang itself, with no router in between")
    if arguments.value is not None:
        yield from check_version(field, str(arguments.value.get("version")))
        yield from _arguments(subject, sglang, url, arguments.value)


def _model(subject: Subject, url: str, info: Mapping[str, Any]) -> Iterator[Finding]:
    field, hf_config = f"{SECTION}.urls", subject.hf_config.value
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
                f"{SECTION}.urls",
                f"{url} serves {path} with {name} = {getattr(theirs, name, None)}, the policy has "
                f"{getattr(mine, name, None)}",
                "start it with model.hf_dir",
            )


def _arguments(subject: Subject, sglang: SGLangConfig, url: str, told: Mapping[str, Any]) -> Iterator[Finding]:
    for problem in server_problems(subject.config, url, dict(told)):
        yield Finding.of(problem, problem.field)
    if not isinstance(told.get("max_req_input_len"), int):
        yield Finding.warning(
            f"{SECTION}.urls",
            f"{url} does not tell how long a request it takes (max_req_input_len)",
            "attach to SGLang itself, with no router in between",
        )
