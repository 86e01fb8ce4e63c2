"""Being asked to stop: a signal to any rank, heard by all at the same place of the loop.

SIGTERM and SIGUSR1 are sent by Slurm and by launchers, SIGINT by Ctrl-C, SIGHUP by a terminal that closes. A launcher
that has gone asks, too: torchrun that is killed leaves its ranks behind, and they would train on unwatched.

The handler sets a flag and leaves a word for the terminal, nothing more. Ranks agree where each of them passes anyway,
for a signal may reach one rank only, and not all of them at the same step.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from megatron_sdsearch.files import write_file

if TYPE_CHECKING:  # the page reads STOPPED_FILE, and needs no torch
    from megatron_sdsearch.parallel.groups import ParallelState

EXIT_STOPPED: Final = 0
"""Exit code of every rank after a stop that was asked for. Another code would make torchrun report a crash; who has to
tell a stopped run from a finished one looks for ``STOPPED_FILE``."""
STOPPED_FILE: Final = "stopped.json"
"""In ``run_dir``: ``{"signal", "step"}`` of a run that saved and left; gone when the next process starts."""
SAME_REQUEST_S: Final = 3.0
"""A signal that comes this soon after the first is the first again: Slurm tells every process, and torchrun its
workers. A later one ends the process at once."""
LAUNCHER_GONE: Final = "launcher gone"
"""Stands for a signal's name in ``STOPPED_FILE``."""
_SIGNALS: Final = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
_SHOW_CURSOR: Final = b"\x1b[?25h\n"
"""The progress display hides it."""


class StopRequest:
    """Listens to the signals while it is entered. One that is ignored, as by nohup, stays ignored.

    Args:
        parallel: the ranks that agree.
        say: shows one line; called on the main rank alone, from a thread, once.

    Attributes:
        name: of the signal that all ranks agreed on; "" while none has come.
    """

    def __init__(self, parallel: ParallelState, say: Callable[[str], None]) -> None:
        self.name = ""
        self._parallel = parallel
        self._heard = ""
        self._heard_at = 0.0
        self._parent = os.getppid()
        self._is_under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
        self._before: dict[signal.Signals, Any] = {}
        self._say = say
        # A handler may interrupt anything, a write to the terminal too: it hands its word on. This queue is reentrant.
        self._words: queue.SimpleQueue[str] = queue.SimpleQueue()

    def __enter__(self) -> Self:
        heard = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._on_signal) for number in heard}
        if self._parallel.is_main:
            threading.Thread(target=self._speak, name="stop-request", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._words.put("")
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def is_agreed(self) -> bool:
        """A collective: some rank has been asked to stop."""
        if not self._heard and os.getppid() != self._parent:
            self._heard = LAUNCHER_GONE
        if not self.name:
            self.name = next(filter(None, self._parallel.all_gather_object(self._heard)), "")
            if self.name:
                self._words.put(self.name)
        return bool(self.name)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        if number == signal.SIGHUP:
            self._leave_terminal()
        if not self._heard:
            self._heard, self._heard_at = name, now
            self._words.put(name)
        elif self._is_another_request(name, now - self._heard_at):
            if 1 in self._terminals:
                os.write(1, _SHOW_CURSOR)
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _is_another_request(self, name: str, seconds: float) -> bool:
        """Whether a signal is more than the echo of the first one, so many seconds later."""
        if self._heard == "SIGINT":
            # A terminal sends one SIGINT for each Ctrl-C. Under torchrun to torchrun alone: it hands on the first, and
            # answers a second one with SIGTERM.
            return not self._is_under_torchrun or name == "SIGTERM" or seconds > SAME_REQUEST_S
        return seconds > SAME_REQUEST_S

    def _leave_terminal(self) -> None:
        """It has gone: to write to it would be an error, and end the run before it has saved."""
        nothing = os.open(os.devnull, os.O_WRONLY)
        for descriptor in self._terminals:
            os.dup2(nothing, descriptor)
        self._terminals = []

    def _speak(self) -> None:
        if name := self._words.get():
            self._say(announcement(name, is_under_torchrun=self._is_under_torchrun))


def announcement(name: str, *, is_under_torchrun: bool) -> str:
    """What is said when the first request has come."""
    again = "Ctrl-C again" if name == "SIGINT" else "a second signal"
    ends = f"; {again} ends at once" if name != LAUNCHER_GONE else ""
    limit = "; torchrun waits 30 s for that, or its --shutdown-timeout" if is_under_torchrun else ""
    return f"{name}: stopping at the next boundary of this step, then saving{ends}{limit}"


def write_stopped(run_dir: Path, name: str, step: int) -> None:
    """Say in a file how the run ended, and where it goes on."""
    write_file(run_dir / STOPPED_FILE, json.dumps({"signal": name, "step": step}) + "\n")
