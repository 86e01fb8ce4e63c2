"""Start SGLang servers, watch them, and start them again when they die or hang.

Runs in threads of the trainer's first rank, whose main thread sits in collectives. Owns the servers' lives and logs,
and that a restarted one gets the published weights. Leaves to every rank's client to decide, by /model_info, whether a
server holds the current version; a restart keeps the url. One server is `supervised_server`.
"""

from __future__ import annotations

import logging
import random
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_sdsearch.config import SGLangConfig
from megatron_sdsearch.errors import ConfigError, EngineError
from megatron_sdsearch.rollout.server_process import find_obstacle
from megatron_sdsearch.rollout.supervised_server import Patience, Published, SupervisedServer

_log = logging.getLogger(__name__)

# Below Linux's ephemeral ports: between two lives no outgoing connection can take a server's port.
PORTS = range(20_000, 32_000)


class ServerSupervisor:
    """The servers of one run: started here, or somebody else's when ``config.urls`` is given.

    Whatever way this process ends, SIGKILL included, its servers end within about ``grace_s`` (`server_guardian`).
    """

    def __init__(
        self,
        config: SGLangConfig,
        *,
        model_path: Path,
        log_dir: Path,
        seed: int = 0,
        host: str = "127.0.0.1",
        gpus: Sequence[str] = (),
        patience: Patience | None = None,
    ) -> None:
        """Nothing starts yet.

        Args:
            config: how many servers and how they are started, or where they are.
            model_path: Hugging Face folder that a server starts from.
            log_dir: ``server_{i}.log`` goes here, appended over restarts.
            seed: server i samples with ``seed + i``, of which 32 bits count: SGLang seeds numpy with it.
            host: address that servers listen on and that every rank reaches.
            gpus: as in CUDA_VISIBLE_DEVICES; ``config.tp_size`` for each server in turn. Empty: no GPU is assigned.
            patience: time limits other than ``config.start_timeout_s``; None takes the usual ones.

        Raises:
            ConfigError: too few GPUs.
            EngineError: no free port.
        """
        self._config = config
        self._attached = config.urls
        self._patience = patience or Patience()
        self._servers: list[SupervisedServer] = []
        if config.urls:
            return
        devices = split_gpus(gpus, config)
        log_dir.mkdir(parents=True, exist_ok=True)
        for index, port in enumerate(free_ports(config.num_servers, host)):
            flags = ["--model-path", str(model_path), "--host", host, "--port", str(port)]
            flags += ["--random-seed", str((seed + index) % 2**32), *devices[index].flags]
            self._servers.append(
                SupervisedServer(
                    index,
                    url=f"http://{host}:{port}",
                    command=[*config.command, *flags, *config.arguments],
                    environment=config.plain_environment | devices[index].environment,
                    log=log_dir / f"server_{index}.log",
                    config=config,
                    patience=self._patience,
                )
            )

    @property
    def urls(self) -> tuple[str, ...]:
        """Of all servers, usable or not; the same for the whole run."""
        return self._attached or tuple(server.url for server in self._servers)

    def start(self) -> None:
        """Start all servers at once, and wait until each serves. Attached ones are only waited for.

        Raises:
            EngineError: one died, or does not serve within ``config.start_timeout_s``, with the end of its log. A first
                start is not tried again. All servers are ended.
            ConfigError: where an attached one should be, there is something else, or no such host.
        """
        if self._attached:
            self._wait_for_attached()
            return
        for server in self._servers:
            server.start()
        try:
            while not all(server.has_served.is_set() for server in self._servers):
                self.check()
                time.sleep(0.05)
        except BaseException:  # Ctrl-C too
            self.close()
            raise

    def set_weights(self, path: Path | None, version: int, *, only_after_restart: bool = False) -> None:
        """To be called after each publish: restarted servers are brought to these weights.

        Args:
            path: Hugging Face folder, readable until the next call. None: there is no folder, and a restarted server
                keeps reporting an older version, unused, until the trainer's next publish reaches it.
            version: of the policy, rising.
            only_after_restart: servers that hold any version are left alone. For who sees a folder before the trainer
                has told the servers of it, and would load it beside the trainer.
        """
        published = Published(path=path, version=version, only_after_restart=only_after_restart)
        for server in self._servers:
            server.published = published

    def check(self) -> None:
        """Call often: a server that cannot be helped ends the run.

        Raises:
            EngineError: servers did not start or have used up their restarts, with the ends of their logs.
        """
        failures = [server.failure for server in self._servers if server.failure is not None]
        if failures:
            raise EngineError("\n".join(failures))

    def snapshot(self) -> dict[str, int]:
        """Restarts so far by url, of own servers."""
        return {server.url: server.num_restarts for server in self._servers}

    def close(self) -> None:
        """End all own servers with all of their processes. May be called again."""
        for server in self._servers:
            server.ask_to_end()
        for server in self._servers:
            server.join()

    def _wait_for_attached(self) -> None:
        limit_s = self._config.start_timeout_s
        deadline = time.monotonic() + limit_s
        for url in self._attached:
            is_said = False
            while obstacle := find_obstacle(url, self._patience.answer_s):
                words = f"{url}/model_info does not answer: {obstacle}"
                if time.monotonic() > deadline:
                    raise EngineError(
                        f"{words} within {limit_s:g} s; correct rollout.sglang.urls, or, if it is still starting, "
                        "raise rollout.sglang.start_timeout_s"
                    )
                if not is_said:  # a mistyped port looks like a server that is still starting
                    _log.warning("%s; waiting up to %g s (rollout.sglang.start_timeout_s)", words, limit_s)
                    is_said = True
                time.sleep(self._patience.poll_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Devices:
    """What tells one server which GPUs are its own.

    Attributes:
        flags: of its command.
        environment: added to its environment.
    """

    flags: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


def split_gpus(gpus: Sequence[str], config: SGLangConfig) -> list[Devices]:
    """The GPUs of each own server, in turn; without any GPU each has the whole machine.

    Raises:
        ConfigError: there are too few.
    """
    wanted = config.num_servers * config.tp_size
    if not gpus and config.tp_size == 1:
        return [Devices()] * config.num_servers
    if wanted > len(gpus):
        problem = f"{config.num_servers} servers x {config.tp_size} GPUs are more than the {len(gpus)} given"
        raise ConfigError("rollout.sglang.num_servers", problem, "lower it, or rollout.sglang.tp_size")
    shares = [gpus[start : start + config.tp_size] for start in range(0, wanted, config.tp_size)]
    flags = ("--tp-size", str(config.tp_size))
    return [Devices(flags=flags, environment={"CUDA_VISIBLE_DEVICES": ",".join(share)}) for share in shares]


def check_has_weights(model_path: Path) -> None:
    """Own servers get the policy's weights before the first request, but have to start from some.

    Raises:
        ConfigError: the folder holds none.
    """
    if not any(model_path.glob("*.safetensors")):
        told = f"{model_path} holds no weights, and servers start from it"
        raise ConfigError("model.hf_dir", told, "give a folder with safetensors; model.megatron_dir may stay")


def no_gpus_left(num_trainers: int, num_gpus: int) -> ConfigError:
    """Of a node, for servers beside its trainers."""
    return ConfigError(
        "rollout.sglang.num_servers",
        f"{num_trainers} trainers take all {num_gpus} GPUs of a node: servers get none",
        "start fewer trainers per node, set rollout.sglang.colocated=true, or attach to rollout.sglang.urls",
    )


def free_ports(num_ports: int, host: str) -> list[int]:
    """Ports of ``host`` that nobody uses now.

    Raises:
        EngineError: there are too few.
    """
    found: list[int] = []
    refusal: OSError | None = None
    for port in random.SystemRandom().sample(PORTS, k=num_ports + 100):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do
            try:
                probe.bind((host, port))
            except OSError as error:
                refusal = error
                continue
        found.append(port)
        if len(found) == num_ports:
            return found
    raise EngineError(f"no {num_ports} free ports on {host} within {PORTS.start}-{PORTS.stop}: {refusal}")
