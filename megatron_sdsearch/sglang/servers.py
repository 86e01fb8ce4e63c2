"""Supervises SGLang servers: starts and watches them, restarts them when they die or hang, loads published weights.

Runs in threads of the first rank, because its main thread blocks in collectives. A restart keeps the url; each rank's
engine decides by the weight version whether it may use a server. `guardian` owns the processes of a server.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from megatron_sdsearch.config import RunConfig, SGLangConfig, shown_command
from megatron_sdsearch.errors import (
    ConfigError,
    EngineError,
    ServerRefusedError,
    ServerUnavailableError,
    raise_problems,
)
from megatron_sdsearch.sglang import guardian
from megatron_sdsearch.sglang.api import Json, SGLangServer
from megatron_sdsearch.sglang.rules import own_server_problems, server_problems

_log = logging.getLogger(__name__)

# Below Linux's ephemeral ports: during a restart no outgoing connection can take a server's port.
PORTS = range(20_000, 32_000)
# Seconds. SGLang checks for SIGTERM only every 5 s and has nothing to save, so SIGKILL follows soon.
POLL_S, INFO_TIMEOUT_S, HANG_S, GRACE_S = 1.0, 5.0, 60.0, 1.0
FIRST_BACKOFF_S, MAX_BACKOFF_S = 1.0, 60.0
_NUM_LOG_LINES = 20
# Set by torchrun for its workers: a server that inherits them would join the trainer's rendezvous.
_TORCHRUN_NAMES = frozenset(
    "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK GROUP_WORLD_SIZE ROLE_NAME ROLE_RANK ROLE_WORLD_SIZE "
    "MASTER_ADDR MASTER_PORT".split()
)


@dataclass(kw_only=True, eq=False, repr=False)  # the environment holds secrets
class SupervisedServer:
    """One own server and its restarts, supervised by a thread.

    Attributes:
        index: among the servers of this process.
        url: kept over restarts.
        command: starts the server.
        environment: added to this process's.
        log: file for the server's output.
        config: ``start_timeout_s`` and ``max_restarts`` are read.
        only_loads_into_restarted: see ``ServerSupervisor``.
        published: folder and version of the newest weights; None if there is no folder to read.
        num_restarts: so far.
        has_served: set after its first answer.
        failure: why no further restart is tried.
    """

    index: int
    url: str
    command: Sequence[str]
    environment: dict[str, str]
    log: Path
    config: SGLangConfig
    only_loads_into_restarted: bool
    published: tuple[Path, int] | None = None
    num_restarts: int = 0
    failure: str | None = None
    has_served: threading.Event = field(default_factory=threading.Event)
    _closing: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)  # prevents a start after request_end
    _guardian: subprocess.Popen[bytes] | None = None
    _thread: threading.Thread | None = None
    _log_begin: int = 0

    def start(self) -> None:
        """Start the server without waiting for it."""
        self._log_begin = self.log.stat().st_size if self.log.exists() else 0  # earlier output is another run's
        self._thread = threading.Thread(target=self._run, name=f"sglang-server-{self.index}", daemon=True)
        self._thread.start()

    def request_end(self) -> None:
        """Send SIGTERM to the server and start it no more; returns without waiting."""
        with self._lock:
            self._closing.set()
            if self._guardian is not None:
                self._guardian.terminate()

    def join(self) -> None:
        """Wait until the last process has ended."""
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            while (cause := self._live_once()) is not None:
                if not self.has_served.is_set() or self.num_restarts == self.config.max_restarts:
                    at_start = " while starting (check rollout.sglang.command and rollout.sglang.arguments)"
                    when = f" (restarts: {self.num_restarts})" if self.has_served.is_set() else at_start
                    failure = f"SGLang server {self.index} ({self.url}) {cause}{when}; {self.log} ends with:\n"
                    with self.log.open("rb") as stream:
                        stream.seek(max(self._log_begin, stream.seek(0, os.SEEK_END) - 1000 * _NUM_LOG_LINES))
                        lines = stream.read().decode(errors="replace").splitlines()
                    self.failure = failure + "\n".join(lines[-_NUM_LOG_LINES:])
                    return
                delay = min(FIRST_BACKOFF_S * 2**self.num_restarts, MAX_BACKOFF_S)
                self.num_restarts += 1
                self._note(f"{cause}; restart in {delay:g} s")
                _log.warning(
                    "SGLang server %d (%s) %s; restart in %g s, log: %s", self.index, self.url, cause, delay, self.log
                )
                self._closing.wait(delay)
        except BaseException as error:  # else a dead thread would look like a healthy server
            self.failure = f"SGLang server {self.index}: its supervisor failed: {error!r}"
            raise

    def _live_once(self) -> str | None:
        """Run the server until it fails or should end, then end its processes; return the failure, if any."""
        with self._lock:
            if self._closing.is_set():
                return None
            shown = shown_command(self.command)
            self._note(f"start, restart {self.num_restarts} of {self.config.max_restarts}: {shown}")
            with self.log.open("ab") as stream:
                process = self._guardian = subprocess.Popen(
                    [sys.executable, "-P", guardian.__file__],  # -P: its folder stays out of sys.path
                    stdin=subprocess.PIPE,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C is meant for the trainer
                )
            inherited = {name: value for name, value in os.environ.items() if not _is_torchrun_variable(name)}
            request = {
                "command": list(self.command),
                "environment": inherited | self.environment,  # not as arguments, which other users can read
                "owner": os.getpid(),
                "grace_s": GRACE_S,
            }
            assert process.stdin is not None
            with process.stdin as pipe:
                pipe.write(json.dumps(request).encode())
        cause = self._watch(process)
        process.terminate()
        try:
            process.wait(GRACE_S + 30.0)
        except subprocess.TimeoutExpired:
            raise EngineError(f"child processes of {process.pid} survive SIGKILL") from None
        return cause

    def _watch(self, process: subprocess.Popen[bytes]) -> str | None:
        """Wait until the server fails and return how; None if it should end."""
        limit, last_answer = self.config.start_timeout_s, time.monotonic()
        while not self._closing.wait(POLL_S):
            if (code := process.poll()) is not None:
                return None if self._closing.is_set() else f"ended with exit code {code}"
            try:
                # Not /health, which runs a generation and fails while generation is paused.
                info = asyncio.run(SGLangServer(self.url, timeout_s=INFO_TIMEOUT_S).call("/model_info"))
            except EngineError:
                if time.monotonic() - last_answer > limit:
                    return f"has not answered /model_info for {limit:g} s"
                continue
            if (cause := self._load_published(info)) is not None:
                return cause
            self.has_served.set()
            limit, last_answer = HANG_S, time.monotonic()
        return None

    def _load_published(self, info: Json) -> str | None:
        """Load the published weights if the server's are older; return why that failed.

        A server starts with version ``default``. Its version is newer while a publish is under way that has not called
        `ServerSupervisor.set_weights` yet. A failed load requires a restart, even if the folder was outdated and is
        gone: the server may hold this folder's weights under a newer version, which a publish has set meanwhile.
        """
        if (published := self.published) is None:
            return None
        folder, version = published
        reported = str(info.get("weight_version"))
        held = int(reported) if reported.isdecimal() else None
        if held is not None and (held >= version or self.only_loads_into_restarted):
            return None
        if self.only_loads_into_restarted and self.num_restarts == 0:
            return None
        try:
            server = SGLangServer(self.url, timeout_s=self.config.start_timeout_s)
            asyncio.run(server.load_folder(str(folder), str(version)))
        except EngineError as error:
            return None if self._closing.is_set() else f"loading {folder} failed: {error}"
        self._note(f"loaded version {version} from {folder}")
        return None

    def _note(self, text: str) -> None:
        with self.log.open("a", encoding="utf-8") as stream:
            stream.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} supervisor: {text}\n")


class ServerSupervisor:
    """The servers of one run: its own ones, or those of ``rollout.sglang.urls``.

    However this process ends, SIGKILL included, its servers end within about ``GRACE_S`` (`guardian`).
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        gpus: Sequence[str] = (),
        host: str = "127.0.0.1",
        log_dir: Path | None = None,
        only_loads_into_restarted: bool = False,
    ) -> None:
        """Prepare the servers without starting them.

        Args:
            config: ``rollout.sglang`` is read.
            gpus: of this node for servers, as in CUDA_VISIBLE_DEVICES, ``tp_size`` for each server in turn; empty on
                CPU.
            host: address that servers listen on and that every rank reaches.
            log_dir: of ``server_{i}.log``, to which restarts append; ``run_dir/logs`` by default.
            only_loads_into_restarted: load published weights into restarted servers only; for a process that watches
                the weights folder and must not load it at the same time as the trainer.

        Raises:
            ConfigError: ``model.hf_dir`` holds no weights, or there are too few GPUs.
            EngineError: no port is free.
        """
        self._config = config
        self._sglang = sglang = config.rollout.sglang
        self._servers: list[SupervisedServer] = []
        if sglang.urls:
            return
        raise_problems(own_server_problems(config, None))
        if gpus and len(gpus) < sglang.num_servers * sglang.tp_size:
            problem = f"{sglang.num_servers} servers x {sglang.tp_size} GPUs are more than the {len(gpus)} of this node"
            raise ConfigError("rollout.sglang.num_servers", problem, "lower it or rollout.sglang.tp_size")
        log_dir = log_dir or config.run_dir / "logs"
        log_dir.mkdir(parents=True, exist_ok=True)
        for index, port in enumerate(free_ports(sglang.num_servers, host)):
            flags = ["--model-path", str(config.model.hf_dir.resolve()), "--host", host, "--port", str(port)]
            # SGLang passes the seed to numpy, which takes 32 bits.
            flags += ["--random-seed", str((config.seed + index) % 2**32), "--dtype", config.model.dtype]
            environment = sglang.plain_environment
            if gpus:
                flags += ["--tp-size", str(sglang.tp_size)]
                share = gpus[index * sglang.tp_size : (index + 1) * sglang.tp_size]
                environment["CUDA_VISIBLE_DEVICES"] = ",".join(share)
            if sglang.colocated:  # without the flag a server reports that it has released its memory, and keeps it
                flags.append("--enable-memory-saver")
            self._servers.append(
                SupervisedServer(
                    index=index,
                    url=f"http://{host}:{port}",
                    command=[*sglang.command, *flags, *sglang.arguments],
                    environment=environment,
                    log=log_dir / f"server_{index}.log",
                    config=sglang,
                    only_loads_into_restarted=only_loads_into_restarted,
                )
            )

    @property
    def urls(self) -> tuple[str, ...]:
        """Urls of all servers, usable or not; constant over the run."""
        return self._sglang.urls or tuple(server.url for server in self._servers)

    def start(self) -> None:
        """Start own servers, wait until all servers are ready, and check that they fit the run.

        Raises:
            EngineError: a server died or is not ready within ``start_timeout_s``; with the end of its log. There is no
                second try, and all own servers are ended.
            ConfigError: the url of an attached server has no host or is not an SGLang server; or a server does not fit
                the run, so that a step or a publish would fail.
        """
        deadline = time.monotonic() + self._sglang.start_timeout_s
        for url in self._sglang.urls:
            self._wait_for_attached(url, deadline)
        for server in self._servers:
            server.start()
        try:
            while not all(server.has_served.is_set() for server in self._servers):
                self.check()
                time.sleep(0.05)
            for url in self.urls:
                try:
                    info = asyncio.run(SGLangServer(url).call("/server_info"))
                except EngineError as error:
                    _log.warning("%s; cannot check whether the server accepts the run's longest request", error)
                else:
                    raise_problems(server_problems(self._config, url, info))
        except BaseException:  # Ctrl-C too
            self.close()
            raise

    def set_weights(self, folder: Path | None, version: int) -> None:
        """Set the weights for restarted servers; call it after each publish.

        Args:
            folder: readable until the next call. None if there is no folder: a restarted server then stays unused
                until the next publish.
            version: of the policy, increasing.
        """
        for server in self._servers:
            server.published = None if folder is None else (folder, version)

    def check(self) -> None:
        """Check that no server has failed for good; call it often.

        Raises:
            EngineError: a server did not start or has used up its restarts; with the end of its log.
        """
        failures = [server.failure for server in self._servers if server.failure is not None]
        if failures:
            raise EngineError("\n".join(failures))

    def restart_counts(self) -> dict[str, int]:
        """Return the number of restarts of each own server, by url."""
        return {server.url: server.num_restarts for server in self._servers}

    def close(self) -> None:
        """End all processes of all own servers. May be called again."""
        for server in self._servers:
            server.request_end()
        for server in self._servers:
            server.join()

    def _wait_for_attached(self, url: str, deadline: float) -> None:
        limit_s = self._sglang.start_timeout_s
        has_warned = False
        while obstacle := find_obstacle(url, INFO_TIMEOUT_S):
            message = f"{url}/model_info does not answer: {obstacle}"
            if time.monotonic() > deadline:
                raise EngineError(
                    f"{message} within {limit_s:g} s; correct rollout.sglang.urls, or, if the server is still "
                    "starting, raise rollout.sglang.start_timeout_s"
                )
            if not has_warned:  # a wrong port looks like a server that is still starting
                _log.warning("%s; waiting up to %g s (rollout.sglang.start_timeout_s)", message, limit_s)
                has_warned = True
            time.sleep(POLL_S)


def find_obstacle(url: str, timeout_s: float) -> str:
    """Return why an attached server does not answer /model_info; empty if it does.

    Raises:
        ConfigError: waiting does not help: the host name does not resolve, or the answer is not SGLang's.
    """
    try:
        asyncio.run(SGLangServer(url, timeout_s=timeout_s).call("/model_info"))
        return ""
    except ServerRefusedError as error:
        problem = f"{url}/model_info returns HTTP {error.status}"
    except ServerUnavailableError as error:
        cause = error.__cause__
        if isinstance(cause, ValueError):
            problem = f"{url}/model_info does not return JSON"
        elif isinstance(cause, aiohttp.ClientConnectorDNSError) and cause.errno == socket.EAI_NONAME:
            problem = f"{url}: {cause.strerror}"
        else:
            return str(error).removeprefix(f"{url}/model_info: ")
    raise ConfigError("rollout.sglang.urls", problem, "set it to the url of an SGLang server")


def _is_torchrun_variable(name: str) -> bool:
    return name in _TORCHRUN_NAMES or name.startswith("TORCHELASTIC_")


def free_ports(num_ports: int, host: str, candidates: Sequence[int] = ()) -> list[int]:
    """Find ports of ``host`` that are free now.

    Args:
        num_ports: to find.
        host: to bind to.
        candidates: tried in this order; some of ``PORTS`` by default.

    Raises:
        EngineError: too few candidates are free.
    """
    found: list[int] = []
    failure: OSError | None = None
    for port in candidates or random.SystemRandom().sample(PORTS, k=num_ports + 100):
        if len(found) == num_ports:
            return found
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do
            try:
                probe.bind((host, port))
                found.append(port)
            except OSError as error:
                failure = error
    if len(found) < num_ports:
        raise EngineError(f"fewer than {num_ports} free ports on {host or 'this host'}: {failure}")
    return found
