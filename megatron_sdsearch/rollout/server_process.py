"""One life of one SGLang server, seen from the trainer: its guardian process, its log, what it answers over HTTP.

Leaves the process tree to `server_guardian`, and what to do about a dead server to `sglang_servers`.
"""

from __future__ import annotations

import http.client
import io
import json
import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_sdsearch.errors import ConfigError, EngineError, cause_of
from megatron_sdsearch.rollout import server_guardian

# What torchrun tells its workers. A server that reads them would join the trainer's rendezvous instead of its own.
_TORCHRUN_PREFIX = "TORCHELASTIC_"
_TORCHRUN_NAMES = frozenset(
    "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK GROUP_WORLD_SIZE ROLE_NAME ROLE_RANK ROLE_WORLD_SIZE "
    "MASTER_ADDR MASTER_PORT".split()
)
_MAX_SAID = 2000  # bytes of a refusal
# Servers are on this machine or in its cluster: a proxy of the environment is not asked.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class ServerProcess:
    """A started server. It ends when `end` is called, or when this process is gone, however that went."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path, *, grace_s: float) -> None:
        """Start it.

        Args:
            command: the whole command line.
            environment: added to this process's, without what torchrun put there.
            log: both output streams are appended.
            grace_s: from SIGTERM to SIGKILL.
        """
        self._grace_s = grace_s
        with log.open("ab") as stream:
            self._guardian = subprocess.Popen(
                [sys.executable, "-P", server_guardian.__file__],  # -P: beside it lie modules that only look importable
                stdin=subprocess.PIPE,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C at the terminal is the trainer's matter
            )
        request = {
            "command": list(command),
            "environment": own_environment() | dict(environment),  # not in the arguments: others can read those
            "owner": os.getpid(),
            "grace_s": grace_s,
        }
        assert self._guardian.stdin is not None
        with self._guardian.stdin as pipe:
            pipe.write(json.dumps(request).encode())

    @property
    def exit_code(self) -> int | None:
        """None while it lives; 128 + n after signal n."""
        return self._guardian.poll()

    def ask_to_end(self) -> None:
        """Send SIGTERM and do not wait."""
        self._guardian.terminate()

    def end(self) -> None:
        """End all of its processes, and wait for that.

        Raises:
            EngineError: a process does not even end on SIGKILL; names its id.
        """
        self.ask_to_end()
        try:
            self._guardian.wait(self._grace_s + 30.0)
        except subprocess.TimeoutExpired:
            raise EngineError(f"processes below {self._guardian.pid} do not end on SIGKILL") from None


def own_environment() -> dict[str, str]:
    """This process's environment without torchrun's variables."""
    return {
        name: value
        for name, value in os.environ.items()
        if name not in _TORCHRUN_NAMES and not name.startswith(_TORCHRUN_PREFIX)
    }


def read_model_info(url: str, timeout_s: float) -> dict[str, Any] | None:
    """What /model_info answers; None when it does not answer in time, or not with JSON.

    Not /health: that one runs a generation, and says 503 while generation is paused.
    """
    try:
        return _call(url + "/model_info", None, timeout_s)
    except (OSError, http.client.HTTPException, ValueError):
        return None


def read_server_info(url: str, timeout_s: float) -> dict[str, Any]:
    """What /server_info answers: the server's arguments by name (``tp_size``, ``context_length``) and its ``version``.

    Raises:
        EngineError: nothing, or nothing that is JSON.
    """
    try:
        return _call(url + "/server_info", None, timeout_s)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise EngineError(f"{url}/server_info: {cause_of(error)}") from error


def find_obstacle(url: str, timeout_s: float) -> str:
    """Why a server that somebody else runs does not answer /model_info yet; empty when it does.

    Raises:
        ConfigError: waiting is of no use: the host has no address, or something else than SGLang answers.
    """
    fix = "give the url of an SGLang server"
    try:
        _call(url + "/model_info", None, timeout_s)
    except urllib.error.HTTPError as error:
        if error.code < 500:
            raise ConfigError("rollout.sglang.urls", f"{url}/model_info answers HTTP {error.code}", fix) from error
        return f"HTTP {error.code}"
    except ValueError as error:
        raise ConfigError("rollout.sglang.urls", f"{url}/model_info does not answer with JSON", fix) from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, socket.gaierror) and reason.errno == socket.EAI_NONAME:
            raise ConfigError("rollout.sglang.urls", f"{url}: {reason.strerror}", fix) from error
        return cause_of(reason) if isinstance(reason, BaseException) else str(reason)
    return ""


def load_weights(url: str, path: Path, version: int, timeout_s: float) -> None:
    """Let a server read a Hugging Face folder, and call it ``version``.

    Raises:
        EngineError: it did not, with what it said. What it holds now is unknown, whatever version it reports: a server
            that refuses may have loaded the folder before (``SGLangServer.update_weights_from_disk``).
    """
    body = {"model_path": str(path), "weight_version": str(version)}
    try:
        answer = _call(url + "/update_weights_from_disk", body, timeout_s)
    except urllib.error.HTTPError as error:
        raise EngineError(f"loading {path} failed: {error.code} {error.read().decode(errors='replace')}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise EngineError(f"loading {path} failed: {cause_of(error)}") from error
    if not answer.get("success"):
        raise EngineError(f"loading {path} failed: {answer.get('message')}")


def _call(url: str, body: Mapping[str, Any] | None, timeout_s: float) -> dict[str, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with _opener.open(request, timeout=timeout_s) as response:
            answer = json.load(response)
    except urllib.error.HTTPError as error:
        with error:  # else its connection stays open for as long as somebody holds the error
            said = io.BytesIO(error.read(_MAX_SAID))
        raise urllib.error.HTTPError(url, error.code, error.reason, error.headers, said) from None
    if not isinstance(answer, dict):
        raise ValueError(f"{url} answered {answer!r}")
    return answer


def read_tail(log: Path, num_lines: int = 20, *, begin: int = 0) -> str:
    """The log's last lines, of those from byte ``begin`` on."""
    with log.open("rb") as stream:
        stream.seek(max(begin, stream.seek(0, os.SEEK_END) - 200 * num_lines * 4))
        lines = stream.read().decode(errors="replace").splitlines()
    return "\n".join(lines[-num_lines:])
