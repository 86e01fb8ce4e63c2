"""Rules over a run's settings: each function yields one error per problem, and raises nothing.

``train`` raises all of them at once and ``check`` shows them. Rules that need the contents of files are in
``training/preflight.py``.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from megatron_sdsearch.config.retrieval import RetrievalConfig
from megatron_sdsearch.config.rollout import SGLangConfig
from megatron_sdsearch.config.run import RunConfig
from megatron_sdsearch.config.sections import CheckpointConfig, HindsightConfig, ModelConfig
from megatron_sdsearch.config.types import shown_url
from megatron_sdsearch.errors import ConfigError

_SERVER_FLAGS = ("--model-path", "--model", "--host", "--port", "--tp-size", "--tensor-parallel-size", "--tp")
_PROMISED_PASSAGES = 3
"""Number of passages that the autorefine profile's instructions announce."""
_LOCAL_FOLDERS = ("models/", "model/", "checkpoints/", "runs/", "data/")
_HUB_ID = re.compile(r"(?:https:/+huggingface\.co/)?([\w-][\w.-]*/([\w-][\w.-]*))")


def setting_problems(config: RunConfig) -> Iterator[ConfigError]:
    """List settings that contradict each other or are missing; reads no files."""
    parallel, hindsight, objective, optimizer = config.parallel, config.hindsight, config.objective, config.optimizer
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size == 1:
        yield ConfigError(
            "parallel.sequence_parallel",
            "is true with parallel.tensor_model_parallel_size=1",
            "set parallel.tensor_model_parallel_size >= 2 or sequence_parallel=false",
        )
    for name in ("siblings", "labels", "drop_leaks") if hindsight.content == "documents" else ():
        value, default = getattr(hindsight, name), getattr(HindsightConfig(), name)
        if value != default:
            problem = f"{value}, but content=documents shows no siblings"
            yield ConfigError(f"hindsight.{name}", problem, f"leave it at {default}")
    if objective.topk is None and objective.topk_of != "teacher":
        problem = f"{objective.topk_of}, but objective.topk is null"
        yield ConfigError("objective.topk_of", problem, "set objective.topk, or remove topk_of")
    if config.retrieval is not None:
        yield from _retrieval_problems(config.retrieval)
    if config.is_rl:
        yield from _missing("data.train", config.data.train, "train.mode=rl samples from it")
        yield from _missing("retrieval", config.retrieval, "train.mode=rl searches")
        yield from _length_problems(config)
        yield from _server_problems(config)
        if config.evaluation.every:
            yield from _missing("data.heldout", config.data.heldout, "evaluation.every is set")
    else:
        yield from _missing("train.demonstrations", config.train.demonstrations, "warm_start learns from them")
        if config.evaluation.every:
            yield ConfigError("evaluation.every", "set, but a warm start does not evaluate", "set it to 0")
    if optimizer.min_lr > optimizer.lr:
        yield ConfigError("optimizer.min_lr", f"{optimizer.min_lr} is above optimizer.lr = {optimizer.lr}", "lower it")
    if optimizer.warmup_steps >= config.num_updates:
        problem = f"{optimizer.warmup_steps} of the run's {config.num_updates} updates leaves none at optimizer.lr"
        yield ConfigError("optimizer.warmup_steps", problem, "lower it")


def _missing(field: str, value: object, reason: str) -> Iterator[ConfigError]:
    if value is None:
        yield ConfigError(field, f"missing, but {reason}", f"set {field}")


def _retrieval_problems(retrieval: RetrievalConfig) -> Iterator[ConfigError]:
    elastic, http, replay = retrieval.elasticsearch, retrieval.http, retrieval.replay
    if retrieval.engine == "tantivy" and replay.mode != "only":
        yield from _missing("retrieval.corpus", retrieval.corpus, "retrieval.engine=tantivy reads it")
    if retrieval.engine == "elasticsearch" and elastic.mode != "bm25":
        yield from _missing("retrieval.elasticsearch.encoder", elastic.encoder, f"mode is {elastic.mode}")
    if replay.mode != "off":
        yield from _missing("retrieval.replay.store", replay.store, f"mode is {replay.mode}")
    if (http.username is None) != (http.password is None):
        lacking, other = ("password", "username") if http.password is None else ("username", "password")
        yield ConfigError(f"retrieval.http.{lacking}", f"missing, but {other} is set", "set both, or neither")


def _length_problems(config: RunConfig) -> Iterator[ConfigError]:
    """List lengths and sizes of rollouts that do not fit each other."""
    rollout, hindsight, budget = config.rollout, config.hindsight, config.train.max_tokens_per_microbatch
    if rollout.group_size < 2:
        yield ConfigError("rollout.group_size", f"{rollout.group_size} gives no advantage", "set it to at least 2")
    least = rollout.max_prompt_tokens + rollout.max_response_tokens
    if rollout.max_total_tokens < least:
        problem = f"{rollout.max_total_tokens} is less than max_prompt_tokens + max_response_tokens = {least}"
        yield ConfigError("rollout.max_total_tokens", problem, f"set it to at least {least}")
    longest, settings = config.longest_sequence
    if budget < longest:
        problem = f"{budget} cannot hold the longest sequence of {settings} = {longest}"
        yield ConfigError("train.max_tokens_per_microbatch", problem, f"set it to at least {longest}")
    if hindsight.content != "everything" or not config.is_distilling:
        return
    # A response counts with the room that a prompt of full length leaves it. After a shorter prompt it may be longer,
    # and cost the block a sibling, which is counted.
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


def _server_problems(config: RunConfig) -> Iterator[ConfigError]:
    """List wrong addresses and flags of SGLang servers, if the run uses them."""
    sglang = config.rollout.sglang
    if not config.samples_from_sglang:
        return
    for url in dict.fromkeys(sglang.urls):
        if not is_server_url(url):
            problem = f"{shown_url(url)!r} is not the url of a server"
            yield ConfigError("rollout.sglang.urls", problem, "write it as http://host:port")
        if (count := sglang.urls.count(url)) > 1:
            yield ConfigError("rollout.sglang.urls", f"{url} is listed {count} times", "list each server once")
    flags = {argument.partition("=")[0] for argument in sglang.arguments}
    for flag in sorted(flags & {*_SERVER_FLAGS}) if not sglang.urls else ():
        problem = f"{flag} is set by the trainer, and yours would override it"
        yield ConfigError("rollout.sglang.arguments", problem, "remove it")


def is_server_url(url: str) -> bool:
    """Tell whether a URL is ``http(s)://host`` with or without a port."""
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is not a number
        return False


def setting_warnings(config: RunConfig) -> Iterator[ConfigError]:
    """List settings with which a run would start, but most likely not do what is wanted."""
    yield from _saving_warnings(config.checkpoint, config.train.num_steps)
    if config.retrieval is not None and config.retrieval.engine != "tantivy":
        for name in ("index", "analyzer"):
            value, default = getattr(config.retrieval, name), RetrievalConfig.model_fields[name].default
            if value != default:
                problem = f"{value}, but only tantivy reads this setting, not {config.retrieval.engine}"
                yield ConfigError(f"retrieval.{name}", problem, "remove it, or index the corpus there accordingly")
    if not config.is_rl:
        return
    objective, rollout, num_steps = config.objective, config.rollout, config.train.num_steps
    if objective.alpha > 0 and not config.is_distilling:
        yield ConfigError(
            "objective.alpha_warmup_steps",
            f"{objective.alpha_warmup_steps} of train.num_steps = {num_steps}: the run ends before it distils",
            f"lower it below {num_steps}, or train longer; set objective.alpha=0 for GRPO alone",
        )
    if config.telemetry.query_probe and not config.is_distilling:
        problem = "true, but it probes the first step that distils, and this run has none"
        yield ConfigError("telemetry.query_probe", problem, "set it to false")
    if rollout.top_p < 1.0 and objective.importance_correction != "none":
        yield ConfigError(
            "objective.importance_correction",
            f"{objective.importance_correction} with rollout.top_p={rollout.top_p}: its ratios ignore the cut tail, so "
            "they correct towards another distribution",
            "set rollout.top_p=1 or importance_correction=none",
        )
    top_k = _PROMISED_PASSAGES if config.retrieval is None else config.retrieval.top_k
    if config.data.prompt_profile == "autorefine" and top_k != _PROMISED_PASSAGES:
        fix = f"set it to {_PROMISED_PASSAGES}, or use another data.prompt_profile"
        yield ConfigError("retrieval.top_k", f"{top_k}, but the autorefine prompt promises three documents", fix)


def _saving_warnings(checkpoint: CheckpointConfig, num_steps: int) -> Iterator[ConfigError]:
    every, keep_every = checkpoint.every, checkpoint.keep_every
    if checkpoint.every_minutes == 0 and not 0 < every < num_steps:
        yield ConfigError(
            "checkpoint.every_minutes",
            f"0, and checkpoint.every is {every}: nothing is saved before the end of {num_steps} steps, except on a "
            "signal",
            f"set checkpoint.every_minutes={CheckpointConfig().every_minutes:g}: a run that dies starts over",
        )
    elif keep_every and (every == 0 or every > num_steps):
        problem = f"{keep_every}, but checkpoint.every is {every}: such a step is only saved by chance"
        yield ConfigError("checkpoint.keep_every", problem, f"set checkpoint.every={keep_every}")
    elif keep_every and keep_every % every:
        problem = f"{keep_every} is not a multiple of checkpoint.every = {every}: most such steps are never saved"
        yield ConfigError("checkpoint.keep_every", problem, f"set it to a multiple of {every}")


def file_problems(config: RunConfig) -> Iterator[ConfigError]:
    """List paths that will be read, and the program that will be started, if they do not exist."""
    folders: dict[str, Path | None] = {"model.hf_dir": config.model.hf_dir}
    files = {"data.train": config.data.train, "data.heldout": config.data.heldout}
    if not config.is_rl:
        files = {"train.demonstrations": config.train.demonstrations, "data.heldout": config.data.heldout}
    if config.retrieval is not None:
        files |= config.retrieval.files()
        elastic = config.retrieval.elasticsearch
        if config.retrieval.engine == "elasticsearch" and elastic.mode != "bm25":
            folders["retrieval.elasticsearch.encoder"] = elastic.encoder
    for field, folder in folders.items():
        if folder is not None and not (folder / "config.json").is_file():
            yield no_model(field, folder)
    if config.model.megatron_dir is not None and not (config.model.megatron_dir / ".metadata").exists():
        yield _no_checkpoint(config.model.megatron_dir)
    yield from path_problems(files)
    if config.samples_from_sglang and not config.rollout.sglang.urls:
        yield from _command_problems(config.rollout.sglang.command, config.rollout.sglang.plain_environment)


def path_problems(files: Mapping[str, Path | None]) -> Iterator[ConfigError]:
    """List settings whose file is missing, or is a folder; None is not a setting to look at."""
    for field, path in files.items():
        if path is not None and not path.is_file():
            problem = "is a folder" if path.is_dir() else "does not exist"
            yield ConfigError(field, f"{path} {problem}", "give the path of a file that exists")


def no_model(field: str, folder: Path) -> ConfigError:
    """Describe a folder without config.json, with the download command if it may be a hub model's name."""
    fix = "give a Hugging Face model folder"
    hub_id = None if folder.parent.exists() else _HUB_ID.fullmatch(str(folder))
    if hub_id is not None:
        name, target = hub_id[1], f"models/{hub_id[2]}"
        if name.startswith(_LOCAL_FOLDERS):  # a local target folder, without the publisher
            name, target = f"ORGANISATION/{hub_id[2]}", name
        command = f"`hf download {name} --local-dir {target}`"
        fix += f"; to use a model of the hub, run {command} and set {field}={target}"
    return ConfigError(field, f"{folder} holds no config.json", fix)


def _no_checkpoint(folder: Path) -> ConfigError:
    pointers = (path for path in (folder / "latest", folder / "checkpoints" / "latest") if path.is_file())
    if (pointer := next(pointers, None)) is not None:
        fix = f"give one of them, such as {pointer.parent / pointer.read_text().strip()}"
        return ConfigError("model.megatron_dir", f"{folder} holds several checkpoints", fix)
    return ConfigError(
        "model.megatron_dir",
        f"{folder} holds no checkpoint of megatron",
        "give a folder with one; if checkpoint.keep_last of the run that wrote it removed it, copy a step out of its "
        "checkpoints before another run starts from it",
    )


def _command_problems(command: tuple[str, ...], environment: dict[str, str]) -> Iterator[ConfigError]:
    field, path = "rollout.sglang.command", environment.get("PATH")
    if not command:
        yield ConfigError(field, "is empty", "give the program that starts a server, or rollout.sglang.urls")
    elif shutil.which(command[0], path=path) is None:  # it starts with this environment's PATH
        problem = f"{command[0]} is not a program" + (f" in {path}" if path else " here")
        fix = (
            "give an existing path (on a CPU, `make .sglang/.installed` installs one), or attach to rollout.sglang.urls"
        )
        yield ConfigError(f"{field}[0]", problem, fix)


def model_problems(model: ModelConfig, has_gpu: bool) -> Iterator[ConfigError]:
    """List settings of the model that the hardware does not support."""
    if model.layer_spec == "transformer_engine" and not has_gpu:
        yield ConfigError("model.layer_spec", "transformer_engine without a GPU", "set it to auto")
    dtype = "bfloat16" if has_gpu else "float32"
    if model.dtype != dtype and not (has_gpu and model.layer_spec == "local"):
        reason = "with transformer-engine, which has no packed fp32 attention" if has_gpu else "without a GPU"
        yield ConfigError("model.dtype", f"{model.dtype} {reason}", f"set model.dtype={dtype}")


def problems_without_gpu(sglang: SGLangConfig) -> Iterator[ConfigError]:
    """List settings of servers that need a GPU."""
    if sglang.colocated:
        problem = "true without a GPU: there is no memory to share"
        yield ConfigError("rollout.sglang.colocated", problem, "set it to false")
    if sglang.tp_size > 1 and not sglang.urls:
        problem = f"{sglang.tp_size} GPUs per server, but there is no GPU"
        yield ConfigError("rollout.sglang.tp_size", problem, "set it to 1")
