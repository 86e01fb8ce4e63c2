"""Start SGLang servers, watch them, and start them again when they die or hang.

Runs in threads of the trainer's first rank, whose main thread sits in collectives. Owns the servers' lives and logs,
and that a restarted one gets the published weights. Leaves to every rank's client to decide, by /model_info, whether a
server holds the current version; a restart keeps the url. One life of one server is `server_process`.
"""

from __future__ import annotations

import logging
import random
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sdsearch.config import SGLangConfig
from megatron_sdsearch.errors import ConfigError, EngineError
from megatron_sdsearch.rollout.server_process import ServerProcess, load_weights, read_model_info, read_tail

# Below Linux's ephemeral ports: between two lives no outgoing connection can take a server's port.
PORTS = range(20_000, 32_000)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long the supervisor waits, in seconds.

    Attributes:
        poll_s: between two looks at a server.
        answer_s: for /model_info.
        hang_s: a server that lives and has not answered for so long is ended.
        backoff_s: before the first restart; doubles with each, up to ``max_backoff_s``.
        max_backoff_s: upper bound.
        grace_s: from SIGTERM to SIGKILL.
    """

    poll_s: float = 1.0
    answer_s: float = 5.0
    hang_s: float = 60.0
    backoff_s: float = 1.0
    max_backoff_s: float = 60.0
    grace_s: float = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """What the trainer published last; ``path`` is None when the weights did not go through a folder."""

    path: Path | None
    version: int


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
        patience: Patience = Patience(),
    ) -> None:
        """Nothing starts yet.

        Args:
            config: how many servers and how they are started, or where they are.
            model_path: Hugging Face folder that a server starts from.
            log_dir: ``server_{i}.log`` goes here, appended over restarts.
            seed: server i samples with ``seed + i``.
            host: address that servers listen on and that every rank reaches.
            gpus: as in CUDA_VISIBLE_DEVICES; ``config.tensor`` for each server in turn. Empty: servers choose.
            patience: time limits; that of the start is ``config.start_timeout_s``.

        Raises:
            ConfigError: too few GPUs.
            EngineError: no free port.
        """
        self._config = config
        self._attached = config.urls
        self._patience = patience
        self._servers: list[_Server] = []
        if config.urls:
            return
        if gpus and config.num_servers * config.tensor > len(gpus):
            problem = f"{config.num_servers} servers x {config.tensor} GPUs are more than the {len(gpus)} given"
            raise ConfigError("rollout.sglang.num_servers", problem, "lower it, or rollout.sglang.tensor")
        log_dir.mkdir(parents=True, exist_ok=True)
        for index, port in enumerate(_free_ports(config.num_servers, host)):
            flags = ["--model-path", str(model_path), "--host", host, "--port", str(port)]
            flags += ["--random-seed", str(seed + index)]
            environment = dict(config.environment)
            if gpus:
                flags += ["--tp-size", str(config.tensor)]
                mine = gpus[index * config.tensor : (index + 1) * config.tensor]
                environment["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
            self._servers.append(
                _Server(
                    index,
                    url=f"http://{host}:{port}",
                    command=[*config.command, *flags, *config.arguments],
                    environment=environment,
                    log=log_dir / f"server_{index}.log",
                    config=config,
                    patience=patience,
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

    def set_weights(self, path: Path | None, version: int) -> None:
        """To be called after each publish: restarted servers are brought to these weights.

        Args:
            path: Hugging Face folder, readable until the next call. None: there is no folder, and a restarted server
                keeps reporting an older version, unused, until the trainer's next publish reaches it.
            version: of the policy, rising.
        """
        published = Published(path=path, version=version)
        for server in self._servers:
            server.published = published

    def check(self) -> None:
        """Call often: a server that cannot be helped ends the run.

        Raises:
            EngineError: a server did not start or has used up its restarts, with the end of its log.
        """
        for server in self._servers:
            if server.failure is not None:
                raise EngineError(server.failure)

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
        deadline = time.monotonic() + self._config.start_timeout_s
        for url in self._attached:
            while read_model_info(url, self._patience.answer_s) is None:
                if time.monotonic() > deadline:
                    raise EngineError(
                        f"{url}/model_info does not answer: no SGLang server, or none reachable from here"
                    )
                time.sleep(self._patience.poll_s)


class _Server:
    """One server over all of its lives, in a thread of its own.

    Attributes:
        url: the same for all lives.
        published: by the trainer; None before the first publish.
        num_restarts: so far.
        has_served: set once it has answered.
        failure: why it is given up.
    """

    def __init__(
        self,
        index: int,
        *,
        url: str,
        command: Sequence[str],
        environment: dict[str, str],
        log: Path,
        config: SGLangConfig,
        patience: Patience,
    ) -> None:
        self.url = url
        self.published: Published | None = None
        self.num_restarts = 0
        self.has_served = threading.Event()
        self.failure: str | None = None
        self._index = index
        self._command = command
        self._environment = environment
        self._log = log
        self._config = config
        self._patience = patience
        self._closing = threading.Event()
        self._lock = threading.Lock()  # no start after the end was asked for
        self._process: ServerProcess | None = None
        self._thread = threading.Thread(target=self._run, name=f"sglang-server-{index}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def ask_to_end(self) -> None:
        with self._lock:
            self._closing.set()
            if self._process is not None:
                self._process.ask_to_end()

    def join(self) -> None:
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            while self._live_once():
                pass
        except BaseException as error:  # a thread's death must not look like health
            self.failure = f"SGLang server {self._index}: its supervisor failed: {error!r}"
            raise

    def _live_once(self) -> bool:
        """Start, watch, end, wait; whether there is to be another life."""
        with self._lock:
            if self._closing.is_set():
                return False
            self._note(f"start, restart {self.num_restarts} of {self._config.max_restarts}: {' '.join(self._command)}")
            self._process = ServerProcess(self._command, self._environment, self._log, grace_s=self._patience.grace_s)
        cause = self._watch(self._process)
        self._process.end()
        if cause is None:
            return False
        is_last = not self.has_served.is_set() or self.num_restarts == self._config.max_restarts
        if is_last:
            self._give_up(cause)
            return False
        delay = min(self._patience.backoff_s * 2**self.num_restarts, self._patience.max_backoff_s)
        self.num_restarts += 1
        self._note(f"{cause}; restart in {delay:g} s")
        _log.warning(
            "SGLang server %d (%s) %s; restart in %g s, log: %s", self._index, self.url, cause, delay, self._log
        )
        return not self._closing.wait(delay)

    def _watch(self, process: ServerProcess) -> str | None:
        """Until it is broken, and how; None when the end was asked for."""
        limit, last_answer = self._config.start_timeout_s, time.monotonic()
        while not self._closing.wait(self._patience.poll_s):
            if (code := process.exit_code) is not None:
                return None if self._closing.is_set() else f"ended with exit code {code}"
            info = read_model_info(self.url, self._patience.answer_s)
            if info is not None:
                cause = self._bring_up(info)
                if cause is not None:
                    return cause
                self.has_served.set()
                limit, last_answer = self._patience.hang_s, time.monotonic()
            elif time.monotonic() - last_answer > limit:
                return f"does not answer /model_info since {limit:g} s"
        return None

    def _bring_up(self, info: dict[str, Any]) -> str | None:
        """Load what was published, if the server is behind it; why that failed, or None.

        A server never reports a version that it does not hold: it starts as SGLang's ``default``. One that is ahead
        has just been reached by a publish which `ServerSupervisor.set_weights` does not know of yet.
        """
        published = self.published
        if published is None or published.path is None or _version_of(info) >= published.version:
            return None
        try:
            load_weights(self.url, published.path, published.version, self._config.start_timeout_s)
        except EngineError as error:
            is_outdated = self.published is not published  # its folder may be gone; the next look loads the new one
            return None if is_outdated or self._closing.is_set() else str(error)
        self._note(f"loaded version {published.version} from {published.path}")
        return None

    def _give_up(self, cause: str) -> None:
        tries = f" (restarts: {self.num_restarts})" if self.has_served.is_set() else " at its start"
        self.failure = (
            f"SGLang server {self._index} ({self.url}) {cause}{tries}; {self._log} ends with:\n{read_tail(self._log)}"
        )

    def _note(self, text: str) -> None:
        with self._log.open("a", encoding="utf-8") as stream:
            stream.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} supervisor: {text}\n")


def _version_of(info: dict[str, Any]) -> int:
    """-1 for weights that the trainer did not publish."""
    reported = str(info.get("weight_version"))
    return int(reported) if reported.isdecimal() else -1


def _free_ports(num_ports: int, host: str) -> list[int]:
    """Ports of ``host`` that nobody uses now."""
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
