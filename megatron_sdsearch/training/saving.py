"""Schedules checkpoints, and keeps the run's state besides the policy: its wall time and scores."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import date

from megatron_sdsearch.config import RunConfig
from megatron_sdsearch.logging import names
from megatron_sdsearch.model.checkpoint import CheckpointStore, TrainingState
from megatron_sdsearch.training.policy import Policy


class CheckpointScheduler:
    """Loads a checkpoint at the start and saves when due. All methods are collectives.

    A save is due every ``checkpoint.every`` steps, every ``checkpoint.every_minutes`` by the first rank's clock, and
    after the last step.

    Args:
        config: of the run.
        policy: saved and loaded.
        start: start of this process, by ``clock``.
        run_date: start of the run, which prompts may mention.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        config: RunConfig,
        policy: Policy,
        start: float,
        run_date: date,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._checkpoint = config.checkpoint
        self._num_steps = config.train.num_steps
        self._parallel = policy.parallel
        self._store = CheckpointStore(config.run_dir / "checkpoints", policy, policy.parallel, config)
        self._start = start
        self._run_date = run_date
        self._clock = clock
        self._last_save = clock()
        self._scores: dict[int, float] = {}

    @property
    def wall_s(self) -> float:
        """Seconds that the run has taken: in this process, and in earlier ones up to the checkpoint."""
        return self._clock() - self._start

    def load(self) -> TrainingState:
        """Load the newest checkpoint, if there is one."""
        state = self._store.load()
        self._start -= state.wall_s
        self._scores = {step: score for step, score in state.scores.items() if step <= state.step}
        return state

    def score(self, step: int, evaluated: Mapping[str, float | int]) -> None:
        """Record the held-out EM of a step."""
        if names.EVAL_EM in evaluated:
            self._scores[step] = float(evaluated[names.EVAL_EM])

    def after_step(self, step: int) -> None:
        """Begin a save if one is due after ``step`` steps; else complete one that has been written."""
        every, every_s = self._checkpoint.every, self._checkpoint.every_minutes * 60
        is_due = step == self._num_steps or (every > 0 and step % every == 0)
        if not is_due and every_s > 0:
            # The first rank decides: a save is a collective, and clocks differ.
            is_due = self._parallel.all_gather_object(self._clock() - self._last_save >= every_s)[0]
        if not is_due:
            self._store.poll()
            return
        self._last_save = self._clock()
        self._store.save(self._state(step))

    def finish(self, step: int) -> None:
        """Save and complete the last state of this process; remove checkpoints that are not kept."""
        if step:
            self._store.save(self._state(step))
        self._store.finish()
        self._store.prune(self._state(step))

    def _state(self, step: int) -> TrainingState:
        return TrainingState(step=step, wall_s=self.wall_s, scores=dict(self._scores), run_date=self._run_date)
