"""SGLang servers over their lives: started, watched, restarted when they die or hang, and given the published weights.

Runs in threads of the trainer's first rank, whose main thread sits in collectives. Each rank's engine decides by the
weight version whether a server can be used; a restart keeps the url. Each server's processes are `guardian`'s.
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
from megatron_sdsearch.sglang.rules import own_server_problems, server_problems, split_gpus

_log = logging.getLogger(__name__)

# Below Linux's ephemeral ports: between two lives no outgoing connection can take a server's port.
PORTS = range(20_000, 32_000)
# Seconds. SGLang looks for a SIGTERM every 5 s alone, and has nothing to save: the time to SIGKILL is short.
POLL_S, INFO_TIMEOUT_S, HANG_S, GRACE_S = 1.0, 5.0, 60.0, 1.0
FIRST_BACKOFF_S, MAX_BACKOFF_S = 1.0, 60.0
_NUM_LOG_LINES = 20
# Torchrun's variables for its workers: a server that reads them would join the trainer's rendezvous, not its own.
_TORCHRUN_NAMES = frozenset(
    "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK GROUP_WORLD_SIZE ROLE_NAME ROLE_RANK ROLE_WORLD_SIZE "
    "MASTER_ADDR MASTER_PORT".split()
)


@dataclass(kw_only=True, eq=False, repr=False)  # the environment holds secrets
class SupervisedServer:
    """One server of our own over all of its lives, in a thread of its own.

    Attributes:
        index: among the servers of this process.
        url: the same for all lives.
        command: starts it.
        environment: added to this process's.
        log: gets its output.
        config: ``start_timeout_s`` and ``max_restarts`` are read.
        leaves_first_life_alone: see ``ServerSupervisor``.
        published: folder and version of the newest weights; None while there is no folder to read.
        num_restarts: so far.
        has_served: set once it has answered.
        failure: why it is given up.
    """

    index: int
    url: str
    command: Sequence[str]
    environment: dict[str, str]
    log: Path
    config: SGLangConfig
    leaves_first_life_alone: bool
    published: tuple[Path, int] | None = None
    num_restarts: int = 0
    failure: str | None = None
    has_served: threading.Event = field(default_factory=threading.Event)
    _closing: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)  # no start after the end was asked for
    _guardian: subprocess.Popen[bytes] | None = None
    _thread: threading.Thread | None = None
    _log_begin: int = 0

    def start(self) -> None:
        """Begin the first life, and do not wait."""
        self._log_begin = self.log.stat().st_size if self.log.exists() else 0  # what is before is of another run
        self._thread = threading.Thread(target=self._run, name=f"sglang-server-{self.index}", daemon=True)
        self._thread.start()

    def request_end(self) -> None:
        """Begin no further life, send SIGTERM to this one, and do not wait."""
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
                    at_start = " at its start (see rollout.sglang.command and .arguments)"
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
        except BaseException as error:  # a thread's death must not look like health
            self.failure = f"SGLang server {self.index}: its supervisor failed: {error!r}"
            raise

    def _live_once(self) -> str | None:
        """Start the server, watch it, and end all of its processes; return what broke, None at the requested end."""
        with self._lock:
            if self._closing.is_set():
                return None
            shown = shown_command(self.command)
            self._note(f"start, restart {self.num_restarts} of {self.config.max_restarts}: {shown}")
            with self.log.open("ab") as stream:
                process = self._guardian = subprocess.Popen(
                    [sys.executable, "-P", guardian.__file__],  # -P: beside it lie modules that only look importable
                    stdin=subprocess.PIPE,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C at the terminal is for the trainer
                )
            request = {
                "command": list(self.command),
                "environment": server_environment() | self.environment,  # others can read arguments
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
            raise EngineError(f"processes below {process.pid} do not end on SIGKILL") from None
        return cause

    def _watch(self, process: subprocess.Popen[bytes]) -> str | None:
        """Wait until the server breaks, and return how; None when the end was asked for."""
        limit, last_answer = self.config.start_timeout_s, time.monotonic()
        while not self._closing.wait(POLL_S):
            if (code := process.poll()) is not None:
                return None if self._closing.is_set() else f"ended with exit code {code}"
            try:
                # Not /health: that one runs a generation, and fails while generation is paused.
                info = asyncio.run(SGLangServer(self.url, timeout_s=INFO_TIMEOUT_S).call("/model_info"))
            except EngineError:
                if time.monotonic() - last_answer > limit:
                    return f"does not answer /model_info since {limit:g} s"
                continue
            if (cause := self._load_published(info)) is not None:
                return cause
            self.has_served.set()
            limit, last_answer = HANG_S, time.monotonic()
        return None

    def _load_published(self, info: Json) -> str | None:
        """Load what was published, if the server is behind it; return why that failed.

        A server starts as SGLang's ``default``. One that is ahead has just been reached by a publish which
        `ServerSupervisor.set_weights` does not know of yet. After a load that failed nothing is known of its weights:
        they may be this folder's, under a version that a publish has given it meanwhile. It is restarted, even where
        the folder was outdated and is gone.
        """
        if (published := self.published) is None:
            return None
        folder, version = published
        reported = str(info.get("weight_version"))
        held = int(reported) if reported.isdecimal() else None
        if held is not None and (held >= version or self.leaves_first_life_alone):
            return None
        if self.leaves_first_life_alone and self.num_restarts == 0:
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
    """The servers of one run: started here, or attached when ``rollout.sglang.urls`` is given.

    Whatever way this process ends, SIGKILL included, its servers end within about ``GRACE_S`` (`guardian`).
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        gpus: Sequence[str] = (),
        host: str = "127.0.0.1",
        log_dir: Path | None = None,
        leaves_first_life_alone: bool = False,
    ) -> None:
        """Prepare the servers; nothing starts yet.

        Args:
            config: ``rollout.sglang`` says how many servers and how they are started, or where they are.
            gpus: of this node for servers, as in CUDA_VISIBLE_DEVICES; ``tp_size`` for each server in turn. Empty: no
                GPU is assigned.
            host: address that servers listen on and that every rank reaches.
            log_dir: ``server_{i}.log`` goes here, appended over restarts; ``run_dir/logs`` by default.
            leaves_first_life_alone: load published weights into restarted servers only; for a process that watches the
                weights folder, and would otherwise load it at the same time as the trainer does.

        Raises:
            ConfigError: ``model.hf_dir`` holds no weights, or there are too few GPUs.
            EngineError: no free port.
        """
        self._config = config
        self._sglang = sglang = config.rollout.sglang
        self._servers: list[SupervisedServer] = []
        if sglang.urls:
            return
        raise_problems(own_server_problems(config, None))
        shares = split_gpus(gpus, sglang)
        log_dir = log_dir or config.run_dir / "logs"
        log_dir.mkdir(parents=True, exist_ok=True)
        for index, port in enumerate(free_ports(sglang.num_servers, host)):
            flags = ["--model-path", str(config.model.hf_dir.resolve()), "--host", host, "--port", str(port)]
            # SGLang seeds numpy with it, which takes 32 bits.
            flags += ["--random-seed", str((config.seed + index) % 2**32), "--dtype", config.model.dtype]
            environment = sglang.plain_environment
            if shares[index]:
                flags += ["--tp-size", str(sglang.tp_size)]
                environment["CUDA_VISIBLE_DEVICES"] = ",".join(shares[index])
            if sglang.colocated:  # without it a server answers that it has released its memory, and keeps it
                flags.append("--enable-memory-saver")
            self._servers.append(
                SupervisedServer(
                    index=index,
                    url=f"http://{host}:{port}",
                    command=[*sglang.command, *flags, *sglang.arguments],
                    environment=environment,
                    log=log_dir / f"server_{index}.log",
                    config=sglang,
                    leaves_first_life_alone=leaves_first_life_alone,
                )
            )

    @property
    def urls(self) -> tuple[str, ...]:
        """All servers, usable or not; the same for the whole run."""
        return self._sglang.urls or tuple(server.url for server in self._servers)

    def start(self) -> None:
        """Start all servers at once, wait until each serves, and compare with the run what it reports of itself.

        Attached ones are not started.

        Raises:
            EngineError: one died, or does not serve within ``start_timeout_s``, with the end of its log. A first start
                is not tried again. All own servers are ended.
            ConfigError: at an attached one's url there is something else, or no such host; or a server does not fit the
                run, and would fail in the middle of a step or of a publish.
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
                    _log.warning("%s; whether it takes the run's longest request is not known", error)
                else:
                    raise_problems(server_problems(self._config, url, info))
        except BaseException:  # Ctrl-C too
            self.close()
            raise

    def set_weights(self, folder: Path | None, version: int) -> None:
        """Set what restarted servers are brought to; call it after each publish.

        Args:
            folder: readable until the next call. None: there is no folder, and a restarted server keeps reporting an
                older version, unused, until the trainer's next publish reaches it.
            version: of the policy, rising.
        """
        for server in self._servers:
            server.published = None if folder is None else (folder, version)

    def check(self) -> None:
        """Raise if a server is given up; call it often.

        Raises:
            EngineError: servers did not start or have used up their restarts, with the ends of their logs.
        """
        failures = [server.failure for server in self._servers if server.failure is not None]
        if failures:
            raise EngineError("\n".join(failures))

    def restart_counts(self) -> dict[str, int]:
        """Return the restarts so far by url, of own servers."""
        return {server.url: server.num_restarts for server in self._servers}

    def close(self) -> None:
        """End all own servers with all of their processes. May be called again."""
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
                    f"{message} within {limit_s:g} s; correct rollout.sglang.urls, or, if it is still starting, "
                    "raise rollout.sglang.start_timeout_s"
                )
            if not has_warned:  # a mistyped port looks like a server that is still starting
                _log.warning("%s; waiting up to %g s (rollout.sglang.start_timeout_s)", message, limit_s)
                has_warned = True
            time.sleep(POLL_S)


def find_obstacle(url: str, timeout_s: float) -> str:
    """Return why an attached server does not answer /model_info yet; empty when it does.

    Raises:
        ConfigError: waiting is of no use: the host has no address, or something else than SGLang answers.
    """
    try:
        asyncio.run(SGLangServer(url, timeout_s=timeout_s).call("/model_info"))
        return ""
    except ServerRefusedError as error:
        problem = f"{url}/model_info answers HTTP {error.status}"
    except ServerUnavailableError as error:
        cause = error.__cause__
        if isinstance(cause, ValueError):
            problem = f"{url}/model_info does not answer with JSON"
        elif isinstance(cause, aiohttp.ClientConnectorDNSError) and cause.errno == socket.EAI_NONAME:
            problem = f"{url}: {cause.strerror}"
        else:
            return str(error).removeprefix(f"{url}/model_info: ")
    raise ConfigError("rollout.sglang.urls", problem, "give the url of an SGLang server")


def server_environment() -> dict[str, str]:
    """Return this process's environment without torchrun's variables."""
    return {
        name: value
        for name, value in os.environ.items()
        if name not in _TORCHRUN_NAMES and not name.startswith("TORCHELASTIC_")
    }


def free_ports(num_ports: int, host: str) -> list[int]:
    """Find ports of ``host`` that are not in use now.

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
                found.append(port)
            except OSError as error:
                refusal = error
    if len(found) < num_ports:
        raise EngineError(f"no {num_ports} free ports on {host} within {PORTS.start}-{PORTS.stop}: {refusal}")
    return found[:num_ports]
