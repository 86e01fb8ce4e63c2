"""A program that starts one server, and ends all of its processes when the server or its owner has ended.

Reads one JSON object from standard input: ``command``, ``environment``, ``owner`` (process id), ``grace_s``. Its exit
code is the server's. Also removes what the server leaves in shared memory; restarts are `servers`'.

Why a process between trainer and server: the server has to end however the trainer ends, SIGKILL included. A death
signal (PR_SET_PDEATHSIG) in the server itself would fire with the *thread* that forked, and reaches no grandchildren.
A pipe to the trainer stays open in every forked copy of it. But a parent's id changes when the parent is gone, and only
then: this process watches that. It is a subreaper besides: whatever loses its parent below it becomes its child, in
whatever group or session, so that no descendant can get away.
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
SCAN_S = 0.5  # a server that is killed sooner after it has made a segment leaves it behind; a look takes milliseconds
SHARED_MEMORY = Path("/dev/shm")
# SGLang's load snapshots and buffers; Python's semaphores, whose cleaner SGLang kills when it shuts down. The remainder
# of a name is random. Files of NCCL and CUDA are not here: they may be shared with the trainer.
SEGMENT_PREFIXES = ("sglang_", "sgl_", "sem.mp-")
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_libc = ctypes.CDLL(None, use_errno=True)


class Guardian:
    """One server and its descendants.

    Attributes:
        end_requested: a signal has come.
    """

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self.end_requested = False
        self._segments: set[int] = set()  # inodes
        self._next_scan = 0.0
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        # With it Slurm asks all of a job to save: nothing is to be saved here, and the trainer needs its server still.
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # the server inherits it
        # Safe here: this process has one thread, which lives as long as the process. When the guardian is killed, the
        # server ends, too.
        self._server = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=lambda: _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),
        )

    def watch(self, owner: int) -> None:
        """Wait until the server has ended, a signal has come, or the owner is gone."""
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
        # Looks again each time: a process may fork between look and signal, and orphans arrive here.
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
                with suppress(FileNotFoundError):  # another server's, gone since the look
                    if path.stat().st_ino in self._segments:
                        path.unlink()
        code = self._server.wait()
        return 128 - code if code < 0 else code

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self.end_requested = True

    def _living(self) -> list[psutil.Process]:
        """Return all descendants, after waiting for children that have ended: adopted ones have no other parent."""
        self._server.poll()
        this = psutil.Process()
        for child in this.children():
            if child.pid != self._server.pid:
                os.waitpid(child.pid, os.WNOHANG)
        return list(this.children(recursive=True))

    def _note_segments(self) -> None:
        """Remember what the server's processes map: only that tells which files in shared memory are theirs.

        By inode, for a semaphore is mapped under a name that it has no longer.
        """
        for process in self._living():
            try:
                maps = Path(f"/proc/{process.pid}/maps").read_text(errors="replace")
            except OSError:  # it ended meanwhile
                continue
            self._segments |= {int(line.split()[4]) for line in maps.splitlines() if f" {SHARED_MEMORY}/" in line}


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value})")


def main() -> int:
    """Run the program; 127 when the server's command cannot be started."""
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
