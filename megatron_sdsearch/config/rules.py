"""Rules that span sections of a run's settings."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from megatron_sdsearch.config.rollout import SGLangConfig
from megatron_sdsearch.config.sections import ModelConfig
from megatron_sdsearch.config.types import shown_url
from megatron_sdsearch.errors import ConfigError

if TYPE_CHECKING:
    from megatron_sdsearch.config.run import RunConfig


def missing_problems(field: str, value: object, reason: str) -> Iterator[ConfigError]:
    """Report a setting that is needed and not set."""
    if value is None:
        yield ConfigError(field, f"missing, and {reason}", f"set {field}")


_LOCAL_FOLDERS = ("models/", "model/", "checkpoints/", "runs/", "data/")
_HUB_ID = re.compile(r"(?:https:/+huggingface\.co/)?([\w-][\w.-]*/([\w-][\w.-]*))")


def no_model(field: str, folder: Path) -> ConfigError:
    """What to say of a folder without config.json; of what may be the name of a model on the hub: how to fetch it."""
    fix = "give a Hugging Face model folder"
    hub_id = None if folder.parent.exists() else _HUB_ID.fullmatch(str(folder))
    if hub_id is not None:
        name, target = hub_id[1], f"models/{hub_id[2]}"
        if name.startswith(_LOCAL_FOLDERS):  # where it is to lie; who published it, nothing says
            name, target = f"ORGANISATION/{hub_id[2]}", name
        fix += (
            f"; a model of the hub is fetched by `hf download {name} --local-dir {target}`, then set {field}={target}"
        )
    return ConfigError(field, f"{folder} holds no config.json", fix)


def megatron_problems(folder: Path) -> Iterator[ConfigError]:
    """Report a ``model.megatron_dir`` that is no checkpoint."""
    if (folder / ".metadata").exists():
        return
    pointers = (path for path in (folder / "latest", folder / "checkpoints" / "latest") if path.is_file())
    if (pointer := next(pointers, None)) is not None:
        step = pointer.parent / pointer.read_text().strip()
        yield ConfigError(
            "model.megatron_dir", f"{folder} holds several checkpoints", f"give one of them, such as {step}"
        )
    else:
        yield ConfigError(
            "model.megatron_dir",
            f"{folder} holds no checkpoint of megatron",
            "give a folder that does; checkpoint.keep_last of the run that wrote it may have removed it: copy a step "
            "out of its checkpoints before another run begins from it",
        )


def is_server_url(url: str) -> bool:
    """Whether it is ``http://host:port``, or https, or without a port."""
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        return False


def _url_problems(urls: Sequence[str]) -> Iterator[ConfigError]:
    field = "rollout.sglang.urls"
    for url in dict.fromkeys(urls):
        if not is_server_url(url):
            yield ConfigError(field, f"{shown_url(url)!r} is not the url of a server", "write it as http://host:port")
        if urls.count(url) > 1:
            yield ConfigError(field, f"{url} stands there {urls.count(url)} times", "name each server once")


def command_problems(sglang: SGLangConfig) -> Iterator[ConfigError]:
    """Report a command that starts no server."""
    field = "rollout.sglang.command"
    if not sglang.command:
        yield ConfigError(field, "is empty", "give the program that starts a server, or rollout.sglang.urls")
        return
    # The server is started with this environment, and found by its PATH.
    program, path = sglang.command[0], sglang.plain_environment.get("PATH")
    if shutil.which(program, path=path) is None:
        yield ConfigError(
            f"{field}[0]",
            f"{program} is no program" + (f" in {path}" if path else " here"),
            "give a path that exists (on a CPU `make .sglang/.installed` makes one), or attach to rollout.sglang.urls",
        )


def model_problems(model: ModelConfig, has_gpu: bool) -> Iterator[ConfigError]:
    """Report a model setting that the hardware does not run."""
    if model.layer_spec == "transformer_engine" and not has_gpu:
        yield ConfigError("model.layer_spec", "transformer_engine without a GPU", "set it to auto")
    if has_gpu and model.layer_spec == "local":
        return
    wanted = "bfloat16" if has_gpu else "float32"
    if model.dtype != wanted:
        reason = "with transformer-engine, whose packed attention takes no float32" if has_gpu else "without a GPU"
        yield ConfigError("model.dtype", f"{model.dtype} {reason}", f"set model.dtype={wanted}")


def problems_without_gpu(sglang: SGLangConfig) -> Iterator[ConfigError]:
    """Report server settings that need a GPU where there is none."""
    if sglang.colocated:
        yield ConfigError(
            "rollout.sglang.colocated", "true without a GPU, where there is no memory to share", "set it to false"
        )
    if sglang.tp_size > 1 and not sglang.urls:
        yield ConfigError(
            "rollout.sglang.tp_size", f"{sglang.tp_size} GPUs of a server, and there is none", "set it to 1"
        )


def rollout_problems(config: RunConfig) -> Iterator[ConfigError]:
    """Report lengths and sizes of rollouts that do not fit one another."""
    rollout = config.rollout
    if config.samples_from_sglang:
        yield from _url_problems(rollout.sglang.urls)
    if rollout.group_size < 2:
        yield ConfigError("rollout.group_size", f"{rollout.group_size} gives no advantage", "set it to at least 2")
    least = rollout.max_prompt_tokens + rollout.max_response_tokens
    if rollout.max_total_tokens < least:
        yield ConfigError(
            "rollout.max_total_tokens",
            f"{rollout.max_total_tokens} is less than max_prompt_tokens + max_response_tokens = {least}",
            f"set it to at least {least}",
        )
    longest = config.longest_sequence
    if config.train.max_tokens_per_microbatch < longest.num_tokens:
        yield ConfigError(
            "train.max_tokens_per_microbatch",
            f"{config.train.max_tokens_per_microbatch} cannot hold the longest sequence of {longest.settings} = "
            f"{longest.num_tokens}",
            f"set it to at least {longest.num_tokens}",
        )


def block_problems(config: RunConfig) -> Iterator[ConfigError]:
    """A block of whole responses holds every sibling that it is meant to show.

    A response counts with what the budgets leave it behind a prompt of full length. One behind a shorter prompt may be
    longer; then the block loses a sibling, which is counted.
    """
    rollout, hindsight = config.rollout, config.hindsight
    if hindsight.content != "everything" or not config.is_distilling:
        return
    num_shown = {"own": 1, "others": rollout.group_size - 1}.get(hindsight.siblings, rollout.group_size)
    per_turn = rollout.max_response_tokens + rollout.max_observation_tokens
    response = min(
        rollout.max_total_tokens - rollout.max_prompt_tokens,
        rollout.max_turns * per_turn + rollout.max_response_tokens,
    )
    needed = num_shown * response
    if hindsight.max_block_tokens < needed:
        yield ConfigError(
            "hindsight.max_block_tokens",
            f"{hindsight.max_block_tokens} cannot hold what hindsight.content=everything shows: {num_shown} responses "
            f"of up to {response} tokens = {needed}",
            f"set it to at least {needed}, and train.max_tokens_per_microbatch to {rollout.max_total_tokens + needed}",
        )


def optimizer_problems(config: RunConfig) -> Iterator[ConfigError]:
    """Report a schedule that does not fit the run."""
    optimizer = config.optimizer
    if optimizer.min_lr > optimizer.lr:
        yield ConfigError("optimizer.min_lr", f"{optimizer.min_lr} is above optimizer.lr = {optimizer.lr}", "lower it")
    if optimizer.warmup_steps >= config.num_updates:
        yield ConfigError(
            "optimizer.warmup_steps",
            f"{optimizer.warmup_steps} of the run's {config.num_updates} updates leaves none at optimizer.lr",
            "lower it",
        )
