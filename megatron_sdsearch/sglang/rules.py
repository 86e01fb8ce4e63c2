"""What must hold between a run and its SGLang servers: before they start, and as running ones report it.

Each rule yields problems, which ``train`` raises and ``check`` shows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from megatron_sdsearch.config import RunConfig, SGLangConfig
from megatron_sdsearch.errors import ConfigError
from megatron_sdsearch.sglang.api import OLDEST_VERSION, TESTED_VERSION, Json

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CONTEXT_RESERVE = 6
"""Tokens of its context that an SGLang server keeps from a prompt and the token after it: ``max_req_input_len`` is the
context, or what fits its cache, less so many, and a prompt must be shorter still (tp_worker.py and utils.py, 0.5.23).
The last two tokens of the context are never sampled."""


def own_server_problems(config: RunConfig, hf_config: PretrainedConfig | None) -> Iterator[ConfigError]:
    """Find what keeps servers of our own from serving the run; nothing where servers are attached.

    Args:
        config: of the run.
        hf_config: of ``model.hf_dir``; None where it has not been read, and lengths are not looked at.
    """
    sglang, hf_dir = config.rollout.sglang, config.model.hf_dir
    if not config.samples_from_sglang or sglang.urls:
        return
    # They get the policy's weights before the first request, but have to start from some.
    if hf_dir.is_dir() and not any(hf_dir.glob("*.safetensors")):
        problem = f"{hf_dir} holds no weights, and servers start from it"
        yield ConfigError("model.hf_dir", problem, "give a folder with safetensors; model.megatron_dir may stay")
    positions = getattr(hf_config, "max_position_embeddings", None)
    context = _number_of_flag(sglang.arguments, "--context-length") or positions
    if hf_config is not None and context is not None:
        yield from _context_problems(config, "a server that it starts", context - CONTEXT_RESERVE)


def server_problems(config: RunConfig, url: str, info: Json) -> Iterator[ConfigError]:
    """Find what keeps a running server from serving the run.

    Args:
        config: of the run.
        url: of the server.
        info: its answer to ``/server_info``: its arguments by name, and ``max_req_input_len``.
    """
    sglang = config.rollout.sglang
    tp_size, longest = info.get("tp_size"), info.get("max_req_input_len")
    if isinstance(tp_size, int) and tp_size != sglang.tp_size:
        problem = f"{sglang.tp_size}, and {url} runs with --tp-size {tp_size}"
        yield ConfigError("rollout.sglang.tp_size", problem, f"set it to {tp_size}")
    if isinstance(longest, int):
        yield from _context_problems(config, url, longest)
    if sglang.colocated and info.get("enable_memory_saver") is False:
        problem = f"true, and {url} would keep its memory"
        yield ConfigError("rollout.sglang.colocated", problem, "start it with --enable-memory-saver")
    if info.get("skip_tokenizer_init"):
        problem = f"{url} has no tokenizer, and stops are strings"
        yield ConfigError("rollout.sglang.urls", problem, "leave --skip-tokenizer-init out")
    version = str(info.get("version"))
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:3])
    if numbers and numbers < tuple(int(number) for number in OLDEST_VERSION.split(".")):
        problem = f"{url} is SGLang {version}, older than {OLDEST_VERSION}"
        yield ConfigError("rollout.sglang.urls", problem, f"use {TESTED_VERSION}")


def split_gpus(gpus: Sequence[str], config: SGLangConfig) -> list[tuple[str, ...]]:
    """Deal out GPUs to own servers in turn; empty shares where there is no GPU and each has the whole machine.

    Raises:
        ConfigError: there are too few.
    """
    num_wanted = config.num_servers * config.tp_size
    if not gpus and config.tp_size == 1:
        return [()] * config.num_servers
    if num_wanted > len(gpus):
        problem = f"{config.num_servers} servers x {config.tp_size} GPUs are more than the {len(gpus)} given"
        raise ConfigError("rollout.sglang.num_servers", problem, "lower it, or rollout.sglang.tp_size")
    return [tuple(gpus[start : start + config.tp_size]) for start in range(0, num_wanted, config.tp_size)]


def no_gpus_left(num_trainers: int, num_gpus: int) -> ConfigError:
    """Return the refusal of servers on a node whose trainers take all GPUs."""
    return ConfigError(
        "rollout.sglang.num_servers",
        f"{num_trainers} trainers take all {num_gpus} GPUs of a node: servers get none",
        "start fewer trainers per node, set rollout.sglang.colocated=true, or attach to rollout.sglang.urls",
    )


def _context_problems(config: RunConfig, server: str, max_req_input_len: int) -> Iterator[ConfigError]:
    # The last turn's prompt may be one token shorter than rollout.max_total_tokens, and a server refuses a prompt of
    # max_req_input_len tokens: the one must not exceed the other.
    longest, settings = config.longest_rollout
    if longest > max_req_input_len:
        yield ConfigError(
            "rollout.max_total_tokens",
            f"{settings} makes requests of up to {longest} tokens, and {server} takes {max_req_input_len} "
            f"(max_req_input_len, {CONTEXT_RESERVE} less than its context or its cache)",
            f"lower it to {config.rollout.max_total_tokens - longest + max_req_input_len}, or start the server with "
            "more (--context-length, --mem-fraction-static)",
        )


def _number_of_flag(arguments: Sequence[str], name: str) -> int | None:
    """Return the number given with a flag; None without one, or where it is not a number."""
    parts = [part for argument in arguments for part in argument.split("=", 1)]
    value = parts[parts.index(name) + 1 :][:1] if name in parts else []
    return int(value[0]) if value and value[0].isdecimal() else None
