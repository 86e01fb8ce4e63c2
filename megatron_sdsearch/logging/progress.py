"""What a person sees while a run goes: a live bar on a terminal, one plain line per step anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from types import TracebackType
from typing import Final, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.text import Text

from megatron_sdsearch.logging import names

_SHOWN: Final = {
    names.REWARD: ("reward", "{:.3f}"),
    names.EM: ("EM", "{:.3f}"),
    names.EVAL_EM: ("held-out EM", "{:.3f}"),
    names.HIT_RATE: ("hits", "{:.0%}"),
    names.JSD: ("JSD", "{:.5f}"),
    names.TOKENS_PER_SECOND: ("tokens/s", "{:,.0f}"),
}
_LOST: Final = {names.REWARD: names.NUM_LOST, names.EM: names.NUM_LOST, names.EVAL_EM: names.EVAL_NUM_LOST}
"""Counts of trajectories that a number leaves out; shown behind it unless they are 0."""


class ProgressDisplay:
    """Context manager around the loop; only the rank that owns the terminal has one.

    Args:
        num_steps: of the whole run.
        first_step: steps done before (a resumed run): the time left counts only this run's own steps.
        console: where to write; standard output without one.
        is_enabled: False shows nothing.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        num_steps: int,
        *,
        first_step: int = 0,
        console: Console | None = None,
        is_enabled: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._num_steps = num_steps
        self._first_step = first_step
        self._console = console or Console()
        self._is_enabled = is_enabled
        self._clock = clock
        self._start = clock()
        self._numbers: dict[str, str] = {}
        self._bar = Progress(
            TextColumn("{task.fields[phase]:<10}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("step {task.completed}/{task.total}"),
            TextColumn("{task.fields[left]}"),
        )
        self._task = self._bar.add_task("", total=num_steps, completed=first_step, phase="start", left="")
        is_live = is_enabled and self._console.is_terminal
        self._live = self._make_live() if is_live else None

    def _make_live(self) -> Live:
        # What is printed meanwhile goes above the bar; errors that somebody sends to a file go to that file.
        return Live(self._view(), console=self._console, refresh_per_second=4, redirect_stderr=sys.stderr.isatty())

    def __enter__(self) -> Self:
        self._start = self._clock()
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def phase(self, name: str) -> None:
        """What is happening now; shown on a terminal only."""
        self._bar.update(self._task, phase=name)

    def step(self, step: int, metrics: Mapping[str, float | int | str]) -> None:
        """A step is done: ``step`` counts from 1; known metrics are shown, the last known value of the others stays."""
        if not self._is_enabled:
            return
        left = self._time_left(step)
        if self._live is None:
            parts = [f"step {step}/{self._num_steps}", *_labelled(_formatted(metrics)), left]
            self._console.print(
                "  ".join(part for part in parts if part), markup=False, highlight=False, soft_wrap=True
            )
            return
        self._numbers |= _formatted(metrics)
        self._bar.update(self._task, completed=step, left=left)
        self._live.update(self._view())

    def _time_left(self, step: int) -> str:
        done = step - self._first_step
        if done <= 0:
            return ""
        seconds = (self._clock() - self._start) / done * (self._num_steps - step)
        return f"{timedelta(seconds=round(seconds))} left"

    def _view(self) -> RenderableType:
        return Group(self._bar, Text("   ".join(_labelled(self._numbers)), style="dim"))


def _formatted(metrics: Mapping[str, float | int | str]) -> dict[str, str]:
    return {
        label: form.format(metrics[name]) + (f" ({lost} lost)" if (lost := metrics.get(_LOST.get(name, ""))) else "")
        for name, (label, form) in _SHOWN.items()
        if name in metrics
    }


def _labelled(numbers: Mapping[str, str]) -> list[str]:
    return [f"{label} {value}" for label, value in numbers.items()]
