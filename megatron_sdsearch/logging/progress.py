"""Show progress: a live bar on a terminal, one plain line per step anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Final

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.text import Text

from megatron_sdsearch.logging import names

#: Labels of the metrics of which a run logs one, by objective.divergence.
DIVERGENCES: Final = {
    names.JSD: "JSD, nats",
    names.FORWARD_KL: "forward KL, nats",
    names.REVERSE_KL: "reverse KL, nats",
    names.MSE: "squared error",
}
_SHOWN: Final = {
    names.REWARD: ("reward", "{:.3f}"),
    names.EM: ("EM", "{:.3f}"),
    names.EVAL_EM: ("held-out EM", "{:.3f}"),
    names.HIT_RATE: ("hits", "{:.0%}"),
    **{name: (label.removesuffix(", nats"), "{:.5f}") for name, label in DIVERGENCES.items()},
    names.TOKENS_PER_SECOND: ("tokens/s", "{:,.0f}"),
}
# Counts of trajectories that a metric leaves out; shown after it unless 0.
_LOST: Final = {names.REWARD: names.NUM_LOST, names.EM: names.NUM_LOST, names.EVAL_EM: names.EVAL_NUM_LOST}


class PhaseTimer:
    """Adds up wall seconds by phase. A nested phase pauses the outer one, so the phases never exceed the step.

    Host time: on a GPU a phase that only enqueues kernels looks short, and the phase that waits for them long.

    Args:
        on_phase: called with the name of a phase when it starts, and when it continues after a nested one.
        clock: seconds, monotonic.
    """

    def __init__(
        self, on_phase: Callable[[str], None] | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._on_phase = on_phase
        self._clock = clock
        self._current = ""
        self._seconds: dict[str, float] = {}
        self._since = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time inside to ``name``, also when it ends with an exception."""
        outer = self._current
        self._switch(name)
        try:
            yield
        finally:
            self._switch(outer)

    def take(self) -> dict[str, float]:
        """Return seconds by phase in order of first use, and reset them to 0. The current phase continues."""
        self._switch(self._current)
        seconds, self._seconds = self._seconds, {}
        return seconds

    def _switch(self, name: str) -> None:
        now = self._clock()
        if self._current:
            self._seconds[self._current] = self._seconds.get(self._current, 0.0) + now - self._since
        if name and name != self._current and self._on_phase is not None:
            self._on_phase(name)
        self._current, self._since = name, now


class ProgressDisplay:
    """Bar or lines of one run, from construction to ``close``; only on the rank that owns the terminal.

    Args:
        num_steps: steps of the whole run.
        first_step: steps done before a resume; the time left is estimated from this process's own steps.
        console: output; standard output by default.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        num_steps: int,
        first_step: int = 0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._num_steps = num_steps
        self._first_step = first_step
        self._console = console or Console()
        self._clock = clock
        self._start = clock()
        self._values: dict[str, str] = {}
        self._bar = Progress(
            TextColumn("{task.fields[phase]:<10}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("step {task.completed}/{task.total}"),
            TextColumn("{task.fields[left]}"),
        )
        self._task = self._bar.add_task("", total=num_steps, completed=first_step, phase="start", left="")
        self._live: Live | None = None
        if self._console.is_terminal:
            # Other output goes above the bar, except errors that are redirected to a file.
            redirect = sys.stderr.isatty()
            self._live = Live(self._view(), console=self._console, refresh_per_second=4, redirect_stderr=redirect)
            self._live.start()

    def close(self) -> None:
        """End the bar and give the terminal back."""
        if self._live is not None:
            self._live.stop()

    def phase(self, name: str) -> None:
        """Show the current phase, on a terminal only."""
        self._bar.update(self._task, phase=name)

    def step(self, step: int, metrics: Mapping[str, float | int | str]) -> None:
        """Show the known metrics of finished step ``step``, from 1; the bar keeps the last value of the others."""
        left, num_done = "", step - self._first_step
        if num_done > 0:
            seconds = (self._clock() - self._start) / num_done * (self._num_steps - step)
            left = f"{timedelta(seconds=round(seconds))} left"
        values = {}
        for name, (label, form) in _SHOWN.items():
            if name in metrics:
                num_lost = metrics.get(_LOST.get(name, ""))
                values[label] = form.format(metrics[name]) + (f" ({num_lost} lost)" if num_lost else "")
        if self._live is None:
            parts = [f"step {step}/{self._num_steps}", *(f"{label} {value}" for label, value in values.items()), left]
            line = "  ".join(part for part in parts if part)
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)
            return
        self._values |= values
        self._bar.update(self._task, completed=step, left=left)
        self._live.update(self._view())

    def _view(self) -> RenderableType:
        text = "   ".join(f"{label} {value}" for label, value in self._values.items())
        return Group(self._bar, Text(text, style="dim"))
