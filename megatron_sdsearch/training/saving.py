"""When a run saves, and what it knows of itself besides the policy: its time and its scores."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import date

from megatron_sdsearch.config import RunConfig
from megatron_sdsearch.logging import names
from megatron_sdsearch.model.checkpoint import CheckpointStore, TrainingState
from megatron_sdsearch.parallel.groups import ParallelState
from megatron_sdsearch.training.policy import Policy


class SaveSchedule:
    """When a save is due: after so many steps, after so many minutes, and after the last step.

    Args:
        config: of the run.
        parallel: its ranks; the first one's clock counts for all of them.
        clock: seconds, monotonic.
    """

    def __init__(self, config: RunConfig, parallel: ParallelState, clock: Callable[[], float] = time.monotonic) -> None:
        self._every = config.checkpoint.every
        self._every_s = config.checkpoint.every_minutes * 60
        self._num_steps = config.train.num_steps
        self._parallel = parallel
        self._clock = clock
        self._last_save = clock()

    def is_due(self, step: int) -> bool:
        """A collective: whether the state after ``step`` finished steps is to be saved. Minutes count from here on."""
        is_due = step == self._num_steps or (self._every > 0 and step % self._every == 0)
        if not is_due and self._every_s > 0:
            is_due = self._parallel.all_gather_object(self._clock() - self._last_save >= self._every_s)[0]
        if is_due:
            self._last_save = self._clock()
        return is_due


class Saving:
    """The run's checkpoints as the loop sees them. All methods are called on all ranks together.

    Args:
        config: of the run.
        policy: saved and loaded.
        start: when this process began, by ``time.monotonic``.
        run_date: when the run began, which its prompts may tell.
    """

    def __init__(self, config: RunConfig, policy: Policy, start: float, run_date: date) -> None:
        self._schedule = SaveSchedule(config, policy.parallel)
        self._store = CheckpointStore(config.run_dir / "checkpoints", policy, policy.parallel, config)
        self._start = start
        self._run_date = run_date
        self._scores: dict[int, float] = {}

    @property
    def wall_s(self) -> float:
        """Spent on the finished steps: of this process, and of those before it up to the checkpoint it began from."""
        return time.monotonic() - self._start

    def load(self) -> TrainingState:
        """Go on from the newest checkpoint, if there is one."""
        state = self._store.load()
        self._start -= state.wall_s
        self._scores = {step: score for step, score in state.scores.items() if step <= state.step}
        return state

    def score(self, step: int, evaluated: Mapping[str, float | int]) -> None:
        """Remember the held-out EM of a step."""
        if names.EVAL_EM in evaluated:
            self._scores[step] = float(evaluated[names.EVAL_EM])

    def after_step(self, step: int) -> None:
        """Begin a save if one is due; else complete one that has been written meanwhile."""
        if self._schedule.is_due(step):
            self._store.save(self._state(step))
        else:
            self._store.poll()

    def finish(self, step: int) -> None:
        """At the end, or where the run was asked to stop: everything is saved, complete, and no more than is kept."""
        if step:
            self._store.save(self._state(step))
        self._store.finish()
        self._store.prune(self._state(step))

    def _state(self, step: int) -> TrainingState:
        return TrainingState(step=step, wall_s=self.wall_s, scores=dict(self._scores), run_date=self._run_date)
