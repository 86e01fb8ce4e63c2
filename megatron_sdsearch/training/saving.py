"""When a run saves, and what it knows of itself besides the policy: its time and its scores."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import date

from megatron_sdsearch.config import RunConfig
from megatron_sdsearch.logging import names
from megatron_sdsearch.model.checkpoint import CheckpointStore, TrainingState
from megatron_sdsearch.training.policy import Policy


class CheckpointScheduler:
    """The run's checkpoints as the loop sees them: loaded at the start, saved when due. All methods are collectives.

    A save is due after so many steps, after so many minutes by the first rank's clock, and after the last step.

    Args:
        config: of the run.
        policy: saved and loaded.
        start: when this process began, by ``clock``.
        run_date: when the run began, which its prompts may mention.
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
        """Seconds spent on the finished steps: by this process, and by those before it up to its checkpoint."""
        return self._clock() - self._start

    def load(self) -> TrainingState:
        """Continue from the newest checkpoint, if there is one."""
        state = self._store.load()
        self._start -= state.wall_s
        self._scores = {step: score for step, score in state.scores.items() if step <= state.step}
        return state

    def score(self, step: int, evaluated: Mapping[str, float | int]) -> None:
        """Remember the held-out EM of a step."""
        if names.EVAL_EM in evaluated:
            self._scores[step] = float(evaluated[names.EVAL_EM])

    def after_step(self, step: int) -> None:
        """Begin a save if one is due after ``step`` steps; else complete one that has been written meanwhile."""
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
        """Save and complete the state in which the run ends or was asked to stop; remove what is not kept."""
        if step:
            self._store.save(self._state(step))
        self._store.finish()
        self._store.prune(self._state(step))

    def _state(self, step: int) -> TrainingState:
        return TrainingState(step=step, wall_s=self.wall_s, scores=dict(self._scores), run_date=self._run_date)
