"""Stops a run on request: after a signal to any rank, all ranks stop at the same point of the loop.

Slurm and launchers send SIGTERM and SIGUSR1, Ctrl-C sends SIGINT, a closing terminal SIGHUP. The end of the launcher
counts as a request, too: otherwise the ranks of a killed torchrun would train on as orphans.

The handler only sets a flag and queues the signal's name for the terminal. Ranks agree at fixed points of the loop,
because a signal may reach only some ranks, and at different steps.
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
from types import FrameType
from typing import TYPE_CHECKING, Any, Final, Self

from megatron_sdsearch.files import write_file

if TYPE_CHECKING:  # the page reads STOPPED_FILE without torch
    from megatron_sdsearch.parallel.groups import ParallelState

#: In ``run_dir``: ``{"signal", "step"}`` of a run that was saved and stopped; removed at the next start. Every rank
#: exits with 0, because torchrun reports any other code as a crash: this file marks a stopped run.
STOPPED_FILE: Final = "stopped.json"
#: Seconds within which a second signal counts as a repetition: Slurm signals every process, and torchrun its workers
#: again. A later one ends the process at once.
SAME_REQUEST_S: Final = 3.0
#: Stands for a signal's name in ``STOPPED_FILE``.
LAUNCHER_GONE: Final = "launcher gone"
_SIGNALS: Final = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
_SHOW_CURSOR: Final = b"\x1b[?25h\n"  # the progress display hides it


class StopRequest:
    """Handles the signals within its context. Signals that are ignored, as with nohup, stay ignored.

    Args:
        parallel: the ranks that agree.
        say: shows one line; called once, on the main rank, from a thread.

    Attributes:
        name: of the signal that all ranks agreed on; "" before that.
    """

    def __init__(self, parallel: ParallelState, say: Callable[[str], None]) -> None:
        self.name = ""
        self._parallel = parallel
        self._received = ""
        self._received_at = 0.0
        self._parent = os.getppid()
        self._is_under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
        self._handlers_before: dict[signal.Signals, Any] = {}
        self._say = say
        # A handler may interrupt a write to the terminal, so a thread prints. SimpleQueue is reentrant.
        self._to_announce: queue.SimpleQueue[str] = queue.SimpleQueue()

    def __enter__(self) -> Self:
        handled = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._handlers_before = {number: signal.signal(number, self._on_signal) for number in handled}
        if self._parallel.is_main:
            threading.Thread(target=self._announce, name="stop-request", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._to_announce.put("")
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)

    def is_agreed(self) -> bool:
        """Return whether any rank has received a stop request. A collective."""
        if not self._received and os.getppid() != self._parent:
            self._received = LAUNCHER_GONE
        if not self.name:
            self.name = next(filter(None, self._parallel.all_gather_object(self._received)), "")
            if self.name:
                self._to_announce.put(self.name)
        return bool(self.name)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        if number == signal.SIGHUP:
            # A write to the closed terminal would fail and end the run before it is saved.
            devnull = os.open(os.devnull, os.O_WRONLY)
            for descriptor in self._terminals:
                os.dup2(devnull, descriptor)
            self._terminals = []
        if not self._received:
            self._received, self._received_at = name, now
            self._to_announce.put(name)
        # A terminal sends one SIGINT for each Ctrl-C. Under torchrun only torchrun receives it: it passes the first one
        # on, and sends SIGTERM after the second.
        elif now - self._received_at > SAME_REQUEST_S or (
            self._received == "SIGINT" and (not self._is_under_torchrun or name == "SIGTERM")
        ):
            if 1 in self._terminals:
                os.write(1, _SHOW_CURSOR)
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _announce(self) -> None:
        if name := self._to_announce.get():
            self._say(announcement(name, is_under_torchrun=self._is_under_torchrun))


def announcement(name: str, *, is_under_torchrun: bool) -> str:
    """Return the line to show after the first request."""
    again = "Ctrl-C again" if name == "SIGINT" else "a second signal"
    ends = f"; {again} ends the run at once" if name != LAUNCHER_GONE else ""
    limit = "; torchrun waits 30 s for that, or its --shutdown-timeout" if is_under_torchrun else ""
    return f"{name}: stopping at the next boundary of this step, then saving{ends}{limit}"


def write_stopped(run_dir: Path, name: str, step: int) -> None:
    """Record the signal that stopped the run and its last step."""
    write_file(run_dir / STOPPED_FILE, json.dumps({"signal": name, "step": step}) + "\n")
