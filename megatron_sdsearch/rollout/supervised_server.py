"""One SGLang server over all of its lives: a thread of its own watches it, restarts it, loads the published weights.

One life is `server_process`; how many servers there are, and with which flags, is `sglang_servers`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sdsearch.config import SGLangConfig, shown_command
from megatron_sdsearch.errors import EngineError
from megatron_sdsearch.rollout.server_process import ServerProcess, load_weights, read_model_info, read_tail

_log = logging.getLogger(__name__)
_NOT_PUBLISHED = -1  # version of weights that the trainer did not publish; below all others


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long the supervisor waits, in seconds.

    Attributes:
        poll_s: between two looks at a server.
        answer_s: for /model_info.
        hang_s: a server that lives and has not answered for so long is ended.
        backoff_s: before the first restart; doubles with each, up to ``max_backoff_s``.
        max_backoff_s: upper bound.
        grace_s: from SIGTERM to SIGKILL; SGLang looks for a SIGTERM every 5 s alone, and has nothing to save.
    """

    poll_s: float = 1.0
    answer_s: float = 5.0
    hang_s: float = 60.0
    backoff_s: float = 1.0
    max_backoff_s: float = 60.0
    grace_s: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """What the trainer published last.

    Attributes:
        path: a folder; None when the weights did not go through one.
        version: of the policy.
        only_after_restart: meant for a server that has come back with none of the trainer's weights.
    """

    path: Path | None
    version: int
    only_after_restart: bool = False


class SupervisedServer:
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
        self._log_begin = log.stat().st_size if log.exists() else 0  # what is before is of another run
        self._config = config
        self._patience = patience
        self._closing = threading.Event()
        self._lock = threading.Lock()  # no start after the end was asked for
        self._process: ServerProcess | None = None
        self._thread = threading.Thread(target=self._run, name=f"sglang-server-{index}", daemon=True)

    def start(self) -> None:
        """Begin the first life, and do not wait."""
        self._thread.start()

    def ask_to_end(self) -> None:
        """No further life, and SIGTERM to this one; does not wait."""
        with self._lock:
            self._closing.set()
            if self._process is not None:
                self._process.ask_to_end()

    def join(self) -> None:
        """Until the last process has ended."""
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
            self._note(
                f"start, restart {self.num_restarts} of {self._config.max_restarts}: {shown_command(self._command)}"
            )
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

        It starts as SGLang's ``default``. One that is ahead has just been reached by a publish which
        `ServerSupervisor.set_weights` does not know of yet. After a load that failed nothing is known of its weights:
        they may be this folder's, under a version that a publish has given it meanwhile. It is restarted, even where
        the folder was outdated and is gone.
        """
        published = self.published
        if published is None or published.path is None or not self._is_behind(published, _version_of(info)):
            return None
        try:
            load_weights(self.url, published.path, published.version, self._config.start_timeout_s)
        except EngineError as error:
            return None if self._closing.is_set() else str(error)
        self._note(f"loaded version {published.version} from {published.path}")
        return None

    def _is_behind(self, published: Published, held: int) -> bool:
        if published.only_after_restart:
            return held == _NOT_PUBLISHED and self.num_restarts > 0
        return held < published.version

    def _give_up(self, cause: str) -> None:
        at_start = " at its start (see rollout.sglang.command and .arguments)"
        tries = f" (restarts: {self.num_restarts})" if self.has_served.is_set() else at_start
        self.failure = f"SGLang server {self._index} ({self.url}) {cause}{tries}; {self._log} ends with:\n" + read_tail(
            self._log, begin=self._log_begin
        )

    def _note(self, text: str) -> None:
        with self._log.open("a", encoding="utf-8") as stream:
            stream.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} supervisor: {text}\n")


def _version_of(info: dict[str, Any]) -> int:
    reported = str(info.get("weight_version"))
    return int(reported) if reported.isdecimal() else _NOT_PUBLISHED
