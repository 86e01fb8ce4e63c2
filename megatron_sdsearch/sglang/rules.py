"""Rules between a run and its SGLang servers, before they start and as running servers report themselves.

Each rule yields problems: ``train`` raises them, ``check`` shows them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from megatron_sdsearch.config import RunConfig
from megatron_sdsearch.errors import ConfigError
from megatron_sdsearch.sglang.api import OLDEST_VERSION, TESTED_VERSION, Json

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CONTEXT_RESERVE = 6
"""An SGLang server reports this many tokens less than its context (or its cache, if smaller) as ``max_req_input_len``,
and a prompt must be shorter still (tp_worker.py and utils.py, 0.5.23). The context's last two tokens are never sampled.
"""


def own_server_problems(config: RunConfig, hf_config: PretrainedConfig | None) -> Iterator[ConfigError]:
    """List what keeps the run's own servers from serving it; nothing if servers are attached.

    Args:
        config: of the run.
        hf_config: of ``model.hf_dir``; None skips the check of lengths.
    """
    sglang, hf_dir = config.rollout.sglang, config.model.hf_dir
    if not config.samples_from_sglang or sglang.urls:
        return
    # Servers receive the policy's weights before the first request, but cannot start without any.
    if hf_dir.is_dir() and not any(hf_dir.glob("*.safetensors")):
        problem = f"{hf_dir} holds no weights, and SGLang servers start from it"
        yield ConfigError("model.hf_dir", problem, "set it to a folder with safetensors; model.megatron_dir may stay")
    positions = getattr(hf_config, "max_position_embeddings", None)
    context = _number_of_flag(sglang.arguments, "--context-length") or positions
    if hf_config is not None and context is not None:
        yield from _context_problems(config, "an own server", context - CONTEXT_RESERVE)


def server_problems(config: RunConfig, url: str, info: Json) -> Iterator[ConfigError]:
    """List what keeps a running server from serving the run.

    Args:
        config: of the run.
        url: of the server.
        info: the answer to ``/server_info``: the server's arguments by name, and ``max_req_input_len``.
    """
    sglang = config.rollout.sglang
    tp_size, longest = info.get("tp_size"), info.get("max_req_input_len")
    if isinstance(tp_size, int) and tp_size != sglang.tp_size:
        problem = f"{sglang.tp_size}, but {url} runs with --tp-size {tp_size}"
        yield ConfigError("rollout.sglang.tp_size", problem, f"set it to {tp_size}")
    if isinstance(longest, int):
        yield from _context_problems(config, url, longest)
    if sglang.colocated and info.get("enable_memory_saver") is False:
        problem = f"true, but {url} cannot release its memory"
        yield ConfigError("rollout.sglang.colocated", problem, "start it with --enable-memory-saver")
    if info.get("skip_tokenizer_init"):
        problem = f"{url} has no tokenizer, which stop strings need"
        yield ConfigError("rollout.sglang.urls", problem, "start it without --skip-tokenizer-init")
    version = str(info.get("version"))
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:3])
    if numbers and numbers < tuple(int(number) for number in OLDEST_VERSION.split(".")):
        problem = f"{url} is SGLang {version}, older than {OLDEST_VERSION}"
        yield ConfigError("rollout.sglang.urls", problem, f"use {TESTED_VERSION}")


def _context_problems(config: RunConfig, server: str, max_req_input_len: int) -> Iterator[ConfigError]:
    # The last prompt may have one token less than rollout.max_total_tokens, and a server refuses a prompt of
    # max_req_input_len tokens.
    longest, settings = config.longest_rollout
    if longest > max_req_input_len:
        yield ConfigError(
            "rollout.max_total_tokens",
            f"{settings} allows requests of {longest} tokens, but {server} accepts {max_req_input_len} "
            f"(max_req_input_len: its context or cache less {CONTEXT_RESERVE})",
            f"lower it to {config.rollout.max_total_tokens - longest + max_req_input_len}, or start the server with a "
            "larger context or cache (--context-length, --mem-fraction-static)",
        )


def _number_of_flag(arguments: Sequence[str], name: str) -> int | None:
    """Return the number given with a flag; None if there is no flag or no number."""
    parts = [part for argument in arguments for part in argument.split("=", 1)]
    value = parts[parts.index(name) + 1 :][:1] if name in parts else []
    return int(value[0]) if value and value[0].isdecimal() else None
