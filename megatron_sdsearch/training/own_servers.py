"""SGLang servers that a process of ours starts for a run, and on which GPUs of its node.

The process is the trainer's first rank (`engines`), or `serve` on a node that does nothing else: there the servers are
watched until somebody ends them, and their urls are written down for the trainer, which attaches to them.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Final, NoReturn

import torch

from megatron_sdsearch.allocation import servers_on_node
from megatron_sdsearch.config import RunConfig, SGLangConfig
from megatron_sdsearch.errors import ConfigError, EngineError, raise_problems
from megatron_sdsearch.files import write_file
from megatron_sdsearch.rollout.checks import server_problems
from megatron_sdsearch.rollout.server_process import read_server_info
from megatron_sdsearch.rollout.sglang_servers import ServerSupervisor, check_has_weights, no_gpus_left

_POLL_S: Final = 1.0
_ANSWER_S: Final = 30.0
_log = logging.getLogger(__name__)


def supervise(
    config: RunConfig,
    *,
    gpus: tuple[str, ...],
    host: str = "127.0.0.1",
    log_dir: Path | None = None,
    seed: int | None = None,
) -> ServerSupervisor:
    """The servers that ``rollout.sglang`` asks for, not yet started; or those of its ``urls``.

    Args:
        config: of the run.
        gpus: of this node, for servers.
        host: address that they listen on.
        log_dir: of their logs; ``run_dir/logs`` by default.
        seed: the first one's; the run's by default.

    Raises:
        ConfigError: ``model.hf_dir`` holds no weights, or there are too few GPUs.
    """
    sglang = config.rollout.sglang
    check_has_weights(config.model.hf_dir)
    # Without the second flag a server answers that it has released its memory, and keeps it.
    flags = ("--dtype", config.model.dtype, *(("--enable-memory-saver",) if sglang.colocated else ()))
    return ServerSupervisor(
        sglang.model_copy(update={"arguments": (*flags, *sglang.arguments)}),
        model_path=config.model.hf_dir.resolve(),
        log_dir=log_dir or config.run_dir / "logs",
        seed=config.seed if seed is None else seed,
        host=host,
        gpus=gpus,
    )


def start_servers(supervisor: ServerSupervisor, config: RunConfig) -> None:
    """Start servers, or wait for attached ones, and hold what each says of itself against the configuration.

    Raises:
        EngineError, ConfigError: as ``ServerSupervisor.start``.
        ConfigError: a server is of another size or version, or could be sent a request that is too long for it.
    """
    supervisor.start()
    for url in supervisor.urls:
        try:
            info = read_server_info(url, _ANSWER_S)
        except EngineError as error:
            _log.warning("%s; whether it takes the run's longest request is not known", error)
            continue
        raise_problems(server_problems(config, url, info))


def gpus_beside_trainer(sglang: SGLangConfig) -> tuple[str, ...]:
    """This node's GPUs for servers of the first rank: the trainer's own, or those that its local ranks leave over.

    Raises:
        ConfigError: there are GPUs, and the ranks take them all: servers without a share would sit on the first one.
    """
    names = _visible_gpus()
    num_trainers = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    share = names[:num_trainers] if sglang.colocated else names[num_trainers:]
    if names and not share and not sglang.urls:
        raise no_gpus_left(num_trainers, len(names))
    return share


def serve(config: RunConfig, *, host: str, urls_file: Path, log_dir: Path | None = None, index: int = 0) -> NoReturn:
    """Run a node's servers until SIGTERM: as many as its GPUs hold, without GPUs ``num_servers``.

    SIGUSR1, with which Slurm asks whole jobs to save, is not heard: the trainer may need its servers for that.

    Args:
        config: of the run.
        host: address of this node that every rank reaches.
        urls_file: gets one url a line when all servers serve, and is gone at the end.
        log_dir: of their logs; ``run_dir/logs`` by default.
        index: of this node among those with servers, from 0: no two servers of a run sample with the same seed.

    Raises:
        SystemExit: the end that SIGTERM asked for; code 0.
        ConfigError: the run does not sample from SGLang, or the GPUs do not suffice.
        EngineError: a server did not start, or has used up its restarts.
    """
    config = _on_this_node(config)
    num_servers = config.rollout.sglang.num_servers
    seed = config.seed + index * num_servers
    supervisor = supervise(config, gpus=_visible_gpus(), host=host, log_dir=log_dir, seed=seed)
    folders = _PublishedFolders(config.run_dir / "weights")
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)
    try:
        supervisor.start()
        _write_urls(urls_file, supervisor.urls)
        while True:
            supervisor.check()
            newest = folders.newest() if config.rollout.sglang.weight_sync == "disk" else None
            if newest is not None:
                supervisor.set_weights(*newest, only_after_restart=True)
            time.sleep(_POLL_S)
    finally:
        urls_file.unlink(missing_ok=True)
        supervisor.close()


def _leave(_number: int, _frame: FrameType | None) -> NoReturn:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # a second one would interrupt the ending of the servers
    raise SystemExit(0)


def _on_this_node(config: RunConfig) -> RunConfig:
    if not config.samples_from_sglang:
        raise ConfigError("rollout.engine", f"{config.rollout.engine} has no servers", "set rollout.engine=sglang")
    sglang, num_gpus = config.rollout.sglang, len(_visible_gpus())
    if num_gpus and num_gpus < sglang.tp_size:
        problem = f"{sglang.tp_size} GPUs of a server, and this node has {num_gpus}"
        raise ConfigError("rollout.sglang.tp_size", problem, "lower it")
    here = sglang.model_copy(update={"urls": (), "num_servers": servers_on_node(sglang, num_gpus)})
    return config.model_copy(update={"rollout": config.rollout.model_copy(update={"sglang": here})})


def _visible_gpus() -> tuple[str, ...]:
    num_gpus = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return tuple(visible.split(",") if visible else map(str, range(num_gpus)))[:num_gpus]


def _write_urls(path: Path, urls: tuple[str, ...]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, "".join(f"{url}\n" for url in urls))


class _PublishedFolders:
    """The folders of ``weight_sync=disk``, seen from a node that the trainer tells nothing.

    Those that stood there at the start are of another process's run: a trainer that went back to an older checkpoint
    may write the same version anew, with other weights.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._before = set(self._look())

    def newest(self) -> tuple[Path, int] | None:
        """The folder that was published last, and its version."""
        found = sorted(set(self._look()) - self._before)
        return (found[-1][1], int(found[-1][1].name.removeprefix("v"))) if found else None

    def _look(self) -> list[tuple[int, Path]]:
        looks = []
        for folder in self._root.glob("v*"):
            try:
                looks.append((folder.stat().st_mtime_ns, folder))
            except FileNotFoundError:  # the trainer has deleted it since
                continue
        return looks
