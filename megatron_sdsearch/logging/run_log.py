"""The loop's log: files and display on the main rank, only the timer on others."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Self

from megatron_sdsearch.config import RunConfig
from megatron_sdsearch.logging import names
from megatron_sdsearch.logging.idle_steps import due_warnings
from megatron_sdsearch.logging.metrics import MetricsLog
from megatron_sdsearch.logging.progress import PhaseTimer, ProgressDisplay
from megatron_sdsearch.logging.trajectories import TrajectoryLog
from megatron_sdsearch.records import HindsightBlock, RolloutGroup

if TYPE_CHECKING:
    from megatron_sdsearch.parallel.groups import ParallelState
    from megatron_sdsearch.tokenization.renderer import Renderer

Values = Mapping[str, float | int]
_log = logging.getLogger(__name__)
_BESIDE_THE_STEP = {names.PHASE_PREFIX + name for name in ("evaluate", "probe", "checkpoint")}


class RunLog:
    """Timer, metrics, trajectories and progress of one run; a context manager around the loop.

    Args:
        config: of the run.
        parallel: its ranks.
        first_step: steps finished before.
        renderer: decodes the token ids of trajectories.
    """

    def __init__(self, config: RunConfig, parallel: ParallelState, first_step: int, renderer: Renderer) -> None:
        self._metrics: MetricsLog | None = None
        self._trajectories: TrajectoryLog | None = None
        self._display: ProgressDisplay | None = None
        if parallel.is_main:
            run_dir, telemetry = config.run_dir, config.telemetry
            self._metrics = MetricsLog(run_dir, telemetry.tensorboard, resume_step=first_step)
            if telemetry.trajectories and config.is_rl:
                self._trajectories = TrajectoryLog(run_dir, renderer.decode, resume_step=first_step)
            if telemetry.progress:  # last, since a failure here would leave the bar running
                self._display = ProgressDisplay(config.train.num_steps, first_step=first_step)
        self.timer = PhaseTimer(self._display.phase if self._display else None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._display is not None:
            self._display.close()
        if self._metrics is not None:
            self._metrics.close()

    def trajectories(
        self,
        step: int,
        groups: Sequence[RolloutGroup],
        advantages: Sequence[Sequence[float]],
        blocks: Sequence[Sequence[HindsightBlock]],
    ) -> None:
        """Write every trajectory of a step; ``step`` counts from 1."""
        if self._trajectories is not None:
            self._trajectories.write(step, groups, advantages, blocks)

    def step(self, step: int, values: Values, num_policy_tokens: int) -> None:
        """Write and show a finished step (``step`` counts from 1) with its times, and print warnings that are due.

        Evaluations, probes and checkpoints are listed among the phases, but not part of the step's time.
        """
        phases = {names.PHASE_PREFIX + name: seconds for name, seconds in self.timer.take().items()}
        seconds = sum(value for name, value in phases.items() if name not in _BESIDE_THE_STEP)
        times = {names.STEP_SECONDS: seconds, names.TOKENS_PER_SECOND: num_policy_tokens / seconds}
        self.add(step, {**values, **phases, **times})
        for line in due_warnings(self._metrics.rows) if self._metrics is not None else ():
            _log.warning("%s", line)

    def add(self, step: int, values: Values) -> None:
        """Add metrics to a step, such as an evaluation of the policy after it; step 0 is the starting policy."""
        if self._metrics is not None:
            self._metrics.log(step, values)
        if self._display is not None:
            self._display.step(step, values)
