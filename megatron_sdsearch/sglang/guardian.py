"""Wrapper process: starts one server and ends its whole process tree when the server or its owner has ended.

Reads one JSON object from standard input: ``command``, ``environment``, ``owner`` (process id), ``grace_s``. Exits with
the server's exit code. Also removes what the server leaves in shared memory; `servers` restarts servers.

The server must end however the trainer ends, SIGKILL included. A death signal (PR_SET_PDEATHSIG) in the server itself
would fire when the *thread* that forked ends, and would not reach grandchildren. A pipe to the trainer stays open in
every forked copy of the trainer. But the id of a process's parent changes when the parent ends, and only then: this
process polls it. It is also a subreaper: descendants that lose their parent become its children, whatever their group
or session, so none can escape.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

import psutil  # type: ignore[import-untyped]

POLL_S = 0.2
SCAN_S = 0.5  # a segment younger than this is missed when the server is killed; a scan takes milliseconds
SHARED_MEMORY = Path("/dev/shm")
# SGLang's load snapshots and buffers, and Python's semaphores: SGLang kills their resource tracker when it shuts down.
# The names end in random characters. Files of NCCL and CUDA are left alone: the trainer may share them.
SEGMENT_PREFIXES = ("sglang_", "sgl_", "sem.mp-")
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_libc = ctypes.CDLL(None, use_errno=True)


class Guardian:
    """One server and its descendants.

    Attributes:
        end_requested: a signal has arrived.
    """

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self.end_requested = False
        self._segments: set[int] = set()  # inodes
        self._next_scan = 0.0
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        # SIGUSR1 asks a whole Slurm job to save: there is nothing to save here, and the trainer still needs its server.
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # inherited by the server
        # The death signal ends the server when the guardian is killed. It is safe here: this process has one thread.
        self._server = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=lambda: _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),
        )

    def watch(self, owner: int) -> None:
        """Wait until the server ends, a signal arrives, or the owner ends."""
        while self._server.poll() is None and not self.end_requested and os.getppid() == owner:
            if time.monotonic() >= self._next_scan:
                self._note_segments()
                self._next_scan = time.monotonic() + SCAN_S
            time.sleep(POLL_S)

    def end(self, grace_s: float) -> int:
        """Send SIGTERM, and SIGKILL after ``grace_s``; return the server's exit code, 128 + n after signal n."""
        self._note_segments()
        deadline = time.monotonic() + grace_s
        terminated: set[int] = set()
        # Lists them again each time: a process may fork before the signal reaches it, and orphans are adopted.
        while living := self._living():
            for process in living:
                with suppress(psutil.NoSuchProcess):
                    if time.monotonic() > deadline:
                        process.kill()
                    elif process.pid not in terminated:
                        process.terminate()
                        terminated.add(process.pid)
            time.sleep(0.05)
        for path in SHARED_MEMORY.iterdir():
            if path.name.startswith(SEGMENT_PREFIXES):
                with suppress(FileNotFoundError):  # another server has just removed its own
                    if path.stat().st_ino in self._segments:
                        path.unlink()
        code = self._server.wait()
        return 128 - code if code < 0 else code

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self.end_requested = True

    def _living(self) -> list[psutil.Process]:
        """Return all descendants, after reaping children that have ended: only this process can reap adopted ones."""
        self._server.poll()
        this = psutil.Process()
        for child in this.children():
            if child.pid != self._server.pid:
                os.waitpid(child.pid, os.WNOHANG)
        return list(this.children(recursive=True))

    def _note_segments(self) -> None:
        """Remember the files in shared memory that the server's processes map: nothing else identifies them.

        Remembers inodes, because a semaphore stays mapped under a temporary name.
        """
        for process in self._living():
            try:
                maps = Path(f"/proc/{process.pid}/maps").read_text(errors="replace")
            except OSError:  # the process has ended
                continue
            self._segments |= {int(line.split()[4]) for line in maps.splitlines() if f" {SHARED_MEMORY}/" in line}


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value})")


def main() -> int:
    """Run the program; returns 127 if the server's command cannot be started."""
    request = json.load(sys.stdin)
    try:
        guardian = Guardian(request["command"], request["environment"])
    except OSError as error:
        sys.stderr.write(f"cannot start {request['command'][0]}: {error}\n")
        return 127
    guardian.watch(request["owner"])
    return guardian.end(request["grace_s"])


if __name__ == "__main__":
    sys.exit(main())
