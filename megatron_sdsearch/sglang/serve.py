"""GPUs of a node for SGLang servers, and the ``serve`` command for a node that only serves.

The command watches its servers until SIGTERM and writes their urls to a file; the trainer attaches to them.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import FrameType
from typing import NoReturn

import torch

from megatron_sdsearch.allocation import servers_on_node
from megatron_sdsearch.config import RunConfig, SGLangConfig
from megatron_sdsearch.errors import ConfigError
from megatron_sdsearch.files import write_file
from megatron_sdsearch.sglang.servers import ServerSupervisor

_POLL_S = 1.0


def visible_gpus() -> tuple[str, ...]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    num_gpus = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return tuple(visible.split(",") if visible else map(str, range(num_gpus)))[:num_gpus]


def gpus_beside_trainer(sglang: SGLangConfig) -> tuple[str, ...]:
    """Return the GPUs for servers of the first rank's node: those that its ranks leave, or share when colocated."""
    names = visible_gpus()
    num_trainers = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return names[:num_trainers] if sglang.colocated else names[num_trainers:]


def serve(config: RunConfig, *, host: str, urls_file: Path, log_dir: Path | None = None, index: int = 0) -> NoReturn:
    """Run as many servers as the node's GPUs hold (on CPU ``num_servers``) until SIGTERM.

    Ignores SIGUSR1, which asks a whole Slurm job to save: the trainer may need its servers until it has saved.

    Args:
        config: of the run.
        host: address of this node that every rank reaches.
        urls_file: written when all servers are ready, one url per line; removed at the end.
        log_dir: of the servers' logs; ``run_dir/logs`` by default.
        index: of this node among the nodes with servers, from 0; gives each server of a run a seed of its own.

    Raises:
        SystemExit: with code 0, after SIGTERM.
        ConfigError: the run does not sample from SGLang, or the node has too few GPUs.
        EngineError: a server did not start or has used up its restarts.
    """
    config = _for_this_node(config, index)
    sglang = config.rollout.sglang
    supervisor = ServerSupervisor(
        config,
        gpus=visible_gpus(),
        host=host,
        log_dir=log_dir,
        only_loads_into_restarted=True,  # the trainer itself sends weights to the others
    )
    weights = config.run_dir / "weights"
    # Folders of an earlier trainer: one that resumes from an older checkpoint writes the same version again, with other
    # weights.
    old_folders = set(_find_folders(weights))
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _exit)
    try:
        supervisor.start()
        urls_file.parent.mkdir(parents=True, exist_ok=True)
        write_file(urls_file, "".join(f"{url}\n" for url in supervisor.urls))
        while True:
            supervisor.check()
            if sglang.weight_sync == "disk" and (new_folders := set(_find_folders(weights)) - old_folders):
                _, newest = max(new_folders)
                supervisor.set_weights(newest, int(newest.name.removeprefix("v")))
            time.sleep(_POLL_S)
    finally:
        urls_file.unlink(missing_ok=True)
        supervisor.close()


def _for_this_node(config: RunConfig, index: int) -> RunConfig:
    if not config.samples_from_sglang:
        raise ConfigError("rollout.engine", f"{config.rollout.engine} has no servers", "set rollout.engine=sglang")
    sglang, num_gpus = config.rollout.sglang, len(visible_gpus())
    if num_gpus and num_gpus < sglang.tp_size:
        problem = f"{sglang.tp_size} GPUs per server, but this node has {num_gpus}"
        raise ConfigError("rollout.sglang.tp_size", problem, "lower it")
    num_servers = servers_on_node(sglang, num_gpus)
    here = sglang.model_copy(update={"urls": (), "num_servers": num_servers})
    rollout = config.rollout.model_copy(update={"sglang": here})
    return config.model_copy(update={"rollout": rollout, "seed": config.seed + index * num_servers})


def _find_folders(root: Path) -> list[tuple[int, Path]]:
    """Return modification time (ns) and path of each published folder."""
    found = []
    for folder in root.glob("v*"):
        try:
            found.append((folder.stat().st_mtime_ns, folder))
        except FileNotFoundError:  # the trainer has deleted it since
            continue
    return found


def _exit(_number: int, _frame: FrameType | None) -> NoReturn:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # a second signal would interrupt the shutdown of the servers
    raise SystemExit(0)
