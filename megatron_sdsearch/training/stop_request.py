"""Being asked to stop: SIGTERM or SIGUSR1 to any rank, heard by all at the same place of the loop.

A launcher that has gone asks, too: torchrun that is killed leaves its ranks behind, and they would train on for nobody.

The handler sets a flag and nothing more. Ranks agree where each of them passes anyway, for a signal may reach one rank
only, and not all of them at the same step.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Final, Self

from megatron_sdsearch.parallel.groups import ParallelState
from megatron_sdsearch.telemetry.files import write_file

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
_SIGNALS: Final = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Listens to the signals while it is entered.

    Attributes:
        name: of the signal that all ranks agreed on; "" while nobody has been asked.
    """

    def __init__(self, parallel: ParallelState) -> None:
        self.name = ""
        self._parallel = parallel
        self._heard = ""
        self._heard_at = 0.0
        self._parent = os.getppid()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def is_agreed(self) -> bool:
        """A collective: some rank has been asked to stop."""
        if not self._heard and os.getppid() != self._parent:
            self._heard = LAUNCHER_GONE
        if not self.name:
            self.name = next(filter(None, self._parallel.all_gather_object(self._heard)), "")
        return bool(self.name)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self._heard:
            self._heard, self._heard_at = signal.Signals(number).name, now
        elif now - self._heard_at > SAME_REQUEST_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def write_stopped(run_dir: Path, name: str, step: int) -> None:
    """Leave word for whoever starts the run again."""
    write_file(run_dir / STOPPED_FILE, json.dumps({"signal": name, "step": step}) + "\n")
