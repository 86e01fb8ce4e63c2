"""Where the seconds of a step go."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megatron_sdsearch.logging.names import PHASE_PREFIX


class PhaseTimer:
    """Adds up wall seconds by phase. A nested phase pauses the outer one, so the phases never exceed the step.

    Host time: on a GPU a phase that only enqueues kernels looks short, and the phase that waits for them long.

    Args:
        on_phase: told the name of a phase when it begins or goes on after a nested one.
        clock: seconds, monotonic.
    """

    def __init__(
        self, on_phase: Callable[[str], None] | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._on_phase = on_phase
        self._clock = clock
        self._running: list[str] = []
        self._seconds: dict[str, float] = {}
        self._since = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside to ``name``, also when it ends with an exception."""
        self._book()
        self._enter(name)
        try:
            yield
        finally:
            self._book()
            self._running.pop()
            if self._running:
                self._enter(self._running.pop())

    def take(self) -> dict[str, float]:
        """Seconds by phase in the order of first use; starts over from 0. A phase that is running keeps running."""
        self._book()
        seconds, self._seconds = self._seconds, {}
        return seconds

    def take_metrics(self) -> dict[str, float]:
        """``take`` under metric names, ``time/phase/<name>``."""
        return {PHASE_PREFIX + name: seconds for name, seconds in self.take().items()}

    def _enter(self, name: str) -> None:
        self._running.append(name)
        if self._on_phase is not None:
            self._on_phase(name)

    def _book(self) -> None:
        now = self._clock()
        if self._running:
            name = self._running[-1]
            self._seconds[name] = self._seconds.get(name, 0.0) + now - self._since
        self._since = now
