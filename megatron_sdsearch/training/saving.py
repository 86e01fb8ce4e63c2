"""When a run saves, and what it knows of itself besides the policy: its time and its scores."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import date

from megatron_sdsearch.config import RunConfig
from megatron_sdsearch.model.checkpoint import CheckpointStore, TrainingState
from megatron_sdsearch.telemetry import names
from megatron_sdsearch.training.policy import Policy


class Saving:
    """The run's checkpoints as the loop sees them. All methods are called on all ranks together.

    Args:
        config: of the run.
        policy: saved and loaded.
        start: when this process began, by ``time.monotonic``.
        run_date: when the run began, which its prompts may tell.
    """

    def __init__(self, config: RunConfig, policy: Policy, start: float, run_date: date) -> None:
        self._config = config
        self._store = CheckpointStore(config.run_dir / "checkpoints", policy, policy.parallel, config)
        self._start = start
        self._run_date = run_date
        self._scores: dict[int, float] = {}

    @property
    def wall_s(self) -> float:
        """Spent on the finished steps: of this process, and of those before it up to the checkpoint it began from."""
        return time.monotonic() - self._start

    def load(self) -> int:
        """Go on from the newest checkpoint; the number of finished steps."""
        state = self._store.load()
        self._start -= state.wall_s
        self._scores = {step: score for step, score in state.scores.items() if step <= state.step}
        return state.step

    def score(self, step: int, evaluated: Mapping[str, float | int]) -> None:
        """Remember the held-out EM of a step."""
        if names.EVAL_EM in evaluated:
            self._scores[step] = float(evaluated[names.EVAL_EM])

    def after_step(self, step: int) -> None:
        """Begin a save if one is due; else complete one that has been written meanwhile."""
        every = self._config.checkpoint.every
        if step == self._config.train.num_steps or (every > 0 and step % every == 0):
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
