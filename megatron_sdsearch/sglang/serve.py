"""A node's GPUs for SGLang servers, and the ``serve`` command on a node that does nothing else.

There the servers are watched until SIGTERM, and their urls are written down for the trainer, which attaches to them.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import FrameType
from typing import NoReturn

import torch

from megatron_sdsearch.config import RunConfig, SGLangConfig
from megatron_sdsearch.errors import ConfigError
from megatron_sdsearch.files import write_file
from megatron_sdsearch.sglang.rules import no_gpus_left
from megatron_sdsearch.sglang.servers import ServerSupervisor

_POLL_S = 1.0


def visible_gpus() -> tuple[str, ...]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    num_gpus = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return tuple(visible.split(",") if visible else map(str, range(num_gpus)))[:num_gpus]


def gpus_beside_trainer(sglang: SGLangConfig) -> tuple[str, ...]:
    """Return this node's GPUs for servers of the first rank: those that its local ranks leave over, or share.

    Raises:
        ConfigError: there are GPUs, and the ranks take them all: servers without a share would sit on the first one.
    """
    names = visible_gpus()
    num_trainers = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    share = names[:num_trainers] if sglang.colocated else names[num_trainers:]
    if names and not share and not sglang.urls:
        raise no_gpus_left(num_trainers, len(names))
    return share


def serve(config: RunConfig, *, host: str, urls_file: Path, log_dir: Path | None = None, index: int = 0) -> NoReturn:
    """Run a node's servers until SIGTERM: as many as its GPUs hold, without GPUs ``num_servers``.

    SIGUSR1, with which Slurm asks whole jobs to save, is ignored: the trainer may need its servers for that.

    Args:
        config: of the run.
        host: address of this node that every rank reaches.
        urls_file: gets one url a line when all servers serve, and is removed at the end.
        log_dir: of their logs; ``run_dir/logs`` by default.
        index: of this node among those with servers, from 0: no two servers of a run sample with the same seed.

    Raises:
        SystemExit: the end that SIGTERM asked for; code 0.
        ConfigError: the run does not sample from SGLang, or the GPUs do not suffice.
        EngineError: a server did not start, or has used up its restarts.
    """
    config = _for_this_node(config, index)
    sglang = config.rollout.sglang
    supervisor = ServerSupervisor(
        config,
        gpus=visible_gpus(),
        host=host,
        log_dir=log_dir,
        leaves_first_life_alone=True,  # the trainer gives weights to living servers itself
    )
    weights = config.run_dir / "weights"
    # Folders of another process's run: a trainer that went back to an older checkpoint may write the same version anew,
    # with other weights.
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
        problem = f"{sglang.tp_size} GPUs of a server, and this node has {num_gpus}"
        raise ConfigError("rollout.sglang.tp_size", problem, "lower it")
    num_servers = num_gpus // sglang.tp_size if num_gpus else sglang.num_servers
    here = sglang.model_copy(update={"urls": (), "num_servers": num_servers})
    rollout = config.rollout.model_copy(update={"sglang": here})
    return config.model_copy(update={"rollout": rollout, "seed": config.seed + index * num_servers})


def _find_folders(root: Path) -> list[tuple[int, Path]]:
    """Return when each published folder was written (ns), and the folder."""
    found = []
    for folder in root.glob("v*"):
        try:
            found.append((folder.stat().st_mtime_ns, folder))
        except FileNotFoundError:  # the trainer has deleted it since
            continue
    return found


def _exit(_number: int, _frame: FrameType | None) -> NoReturn:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # a second one would interrupt the ending of the servers
    raise SystemExit(0)
