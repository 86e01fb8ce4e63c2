"""Keep one server: start it, and end its last process when it has ended, or whoever asked for it has. A program.

Reads one JSON object from standard input: ``command``, ``environment``, ``owner`` (process id), ``grace_s``. Its exit
code is the server's. Owns the server's processes and what they leave in shared memory; leaves restarts to
`sglang_servers`.

Why a process between trainer and server: the server has to go however the trainer went, SIGKILL included. A death
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
# SGLang's load snapshots and buffers; Python's semaphores, whose cleaner SGLang kills when it shuts down. The rest of a
# name is random. Files of NCCL and CUDA are not here: they may be shared with the trainer.
SEGMENT_PREFIXES = ("sglang_", "sgl_", "sem.mp-")
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_libc = ctypes.CDLL(None, use_errno=True)


class Guardian:
    """One server and its descendants.

    Attributes:
        is_asked_to_end: a signal has come.
    """

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self.is_asked_to_end = False
        self._segments: set[int] = set()  # inodes
        self._next_scan = 0.0
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        # With it Slurm asks all of a job to save: nothing is to be saved here, and the trainer needs its server still.
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # the server inherits it
        # Safe here: this process has one thread, which lives as long as the process. Should somebody kill the guardian,
        # the server goes too.
        self._server = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=lambda: _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),
        )

    def watch(self, owner: int) -> None:
        """Until the server has ended, a signal has come, or the owner is gone."""
        while self._server.poll() is None and not self.is_asked_to_end and os.getppid() == owner:
            if time.monotonic() >= self._next_scan:
                self._note_segments()
                self._next_scan = time.monotonic() + SCAN_S
            time.sleep(POLL_S)

    def end(self, grace_s: float) -> int:
        """SIGTERM to all, SIGKILL after ``grace_s`` seconds; return the server's exit code, 128 + n after signal n."""
        self._note_segments()
        for process in self._living():
            _send(process, signal.SIGTERM)
        deadline = time.monotonic() + grace_s
        # Looks again each time: a process may fork between look and signal, and orphans arrive here.
        while living := self._living():
            if time.monotonic() > deadline:
                for process in living:
                    _send(process, signal.SIGKILL)
            time.sleep(0.05)
        self._remove_segments()
        code = self._server.wait()
        return 128 - code if code < 0 else code

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self.is_asked_to_end = True

    def _living(self) -> list[psutil.Process]:
        """All descendants, after a look for children that have ended: nobody else waits for adopted ones."""
        self._server.poll()
        this = psutil.Process()
        for child in this.children():
            if child.pid != self._server.pid:
                os.waitpid(child.pid, os.WNOHANG)
        return list(this.children(recursive=True))

    def _note_segments(self) -> None:
        """Remember what the server's processes map: that alone tells whose a file in shared memory is.

        By inode, for a semaphore is mapped under a name that it has no longer.
        """
        for process in self._living():
            try:
                maps = Path(f"/proc/{process.pid}/maps").read_text(errors="replace")
            except OSError:  # it ended meanwhile
                continue
            self._segments |= {int(line.split()[4]) for line in maps.splitlines() if f" {SHARED_MEMORY}/" in line}

    def _remove_segments(self) -> None:
        for path in SHARED_MEMORY.iterdir():
            if path.name.startswith(SEGMENT_PREFIXES):
                with suppress(FileNotFoundError):  # somebody else's, gone since the look
                    if path.stat().st_ino in self._segments:
                        path.unlink()


def _send(process: psutil.Process, number: int) -> None:
    with suppress(psutil.NoSuchProcess):
        process.send_signal(number)


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
