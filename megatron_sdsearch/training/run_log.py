"""What a run writes and shows, bundled: the main rank has the sinks, the others only the timer."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

from megatron_sdsearch.config import RunConfig
from megatron_sdsearch.errors import CheckpointError, ConfigError, raise_problems
from megatron_sdsearch.files import write_file
from megatron_sdsearch.logging import MetricsLog, PhaseTimer, ProgressDisplay, TrajectoryLog, names
from megatron_sdsearch.logging.metrics import read_metrics
from megatron_sdsearch.logging.stalls import due_warnings, num_stalled
from megatron_sdsearch.logging.summary import SUMMARY_FILE
from megatron_sdsearch.model.checkpoint_folder import CheckpointFolder, continuation_problems, read_manifest, step_of
from megatron_sdsearch.parallel.groups import ParallelState
from megatron_sdsearch.records import HindsightBlock, RolloutGroup
from megatron_sdsearch.tokenization.renderer import Renderer

Values = Mapping[str, float | int]
_log = logging.getLogger(__name__)
_BESIDE_THE_STEP = {names.PHASE_PREFIX + name for name in ("evaluate", "probe", "checkpoint")}


class RunLog:
    """Timer, metrics, trajectories and progress of one run; a context manager around the loop."""

    def __init__(self, config: RunConfig, parallel: ParallelState, first_step: int, renderer: Renderer) -> None:
        self._stack = ExitStack()
        self._config = config
        self._parallel = parallel
        self._metrics: MetricsLog | None = None
        self._trajectories: TrajectoryLog | None = None
        self._display: ProgressDisplay | None = None
        self._rows: list[Mapping[str, Any]] = []
        if parallel.is_main:
            run_dir, telemetry = config.run_dir, config.telemetry
            self._metrics = MetricsLog(run_dir, telemetry.tensorboard, resume_step=first_step)
            self._rows = [*read_metrics(run_dir)]
            self._display = ProgressDisplay(
                config.train.num_steps, first_step=first_step, is_enabled=telemetry.progress
            )
            if telemetry.trajectories and config.train.mode == "rl":
                self._trajectories = TrajectoryLog(run_dir, renderer.decode, resume_step=first_step)
        self.timer = PhaseTimer(self._display.phase if self._display else None)

    def __enter__(self) -> Self:
        if self._metrics is not None:
            self._stack.callback(self._metrics.close)
        if self._display is not None:
            self._stack.enter_context(self._display)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def trajectories(
        self,
        step: int,
        groups: Sequence[RolloutGroup],
        advantages: Sequence[Sequence[float]],
        blocks: Sequence[Sequence[HindsightBlock]],
    ) -> None:
        """Keep every trajectory of a step; ``step`` counts from 1."""
        if self._trajectories is not None:
            self._trajectories.write(step, groups, advantages, blocks)

    def step(self, step: int, values: Values, num_policy_tokens: int) -> None:
        """A step is done (``step`` counts from 1): add its times, write, show.

        Evaluations, probes and checkpoints are listed among the phases, and are no part of the step's time.
        """
        phases = self.timer.take_metrics()
        seconds = sum(value for name, value in phases.items() if name not in _BESIDE_THE_STEP)
        times = {names.STEP_SECONDS: seconds, names.TOKENS_PER_SECOND: num_policy_tokens / seconds}
        self.add(step, {**values, **phases, **times})
        self._warn({"step": step, **values, **times})

    def add(self, step: int, values: Values) -> None:
        """More numbers of a step, such as an evaluation of the policy that it gave; step 0 is the starting policy."""
        if self._metrics is not None and self._display is not None:
            self._metrics.log(step, values)
            self._display.step(step, values)

    def _warn(self, row: Mapping[str, Any]) -> None:
        """Of steps in a row that taught nothing, those before this process included."""
        if self._metrics is not None:
            self._rows.append(row)
            for line in due_warnings(self._rows):
                _log.warning("%s", line)


def is_finished(config: RunConfig) -> bool:
    """Whether an earlier start has done all that is asked for: the last step, its evaluation, the export, the summary.

    Raises:
        ContinuationError: it was another run, which this configuration does not continue.
        ConfigError: it has finished, and its checkpoints are gone: to begin anew would remove what is left of it.
    """
    run_dir, last = config.run_dir, config.train.num_steps
    newest = next(iter(CheckpointFolder(run_dir / "checkpoints").candidates()), None)
    if newest is None:
        if (run_dir / SUMMARY_FILE).is_file():
            raise ConfigError(
                "run_dir",
                f"{run_dir} holds a finished run whose checkpoints are gone",
                f"take another run_dir, or remove {SUMMARY_FILE} to begin anew in its place",
            )
        return False
    try:
        manifest = read_manifest(newest)
    except CheckpointError:
        return False  # loading it says more, or goes back to an older one
    raise_problems(continuation_problems(newest, manifest, config))
    if step_of(newest) != last or not (run_dir / SUMMARY_FILE).is_file():
        return False
    evaluated = {row["step"] for row in read_metrics(run_dir) if names.EVAL_EM in row}
    is_exported = (run_dir / "hf" / "config.json").is_file()
    return (last in evaluated or not config.evaluation.every) and (is_exported or not config.checkpoint.export_hf)


def write_summary(config: RunConfig, parallel: ParallelState, wall_s: float) -> dict[str, Any]:
    """What a run came to, from its metrics: returned on every rank, written to ``summary.json`` by the main one."""
    rows = read_metrics(config.run_dir)
    summary = {
        "steps": config.train.num_steps,
        "tp": parallel.tp_size,
        "pp": parallel.pp_size,
        "dp": parallel.dp_size,
        "seed": config.seed,
        "rl_wall_s" if config.train.mode == "rl" else "warm_start_wall_s": wall_s,
        **_step_figures(rows),
        **_evaluation_figures(rows),
        **_probe_figures(rows),
    }
    if parallel.is_main:
        write_file(config.run_dir / SUMMARY_FILE, json.dumps(summary, indent=1) + "\n")
    return summary


def _step_figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    seconds = [row[names.STEP_SECONDS] for row in rows if names.STEP_SECONDS in row]
    totals = {
        name: sum(row[metric] for row in rows if metric in row)
        for name, metric in (
            ("num_trajectories", "train/num_trajectories"),
            ("num_retrieval_failed", "train/num_retrieval_failed"),
            ("num_lost", names.NUM_LOST),
            ("num_prompt_too_long", names.NUM_PROMPT_TOO_LONG),
            ("num_eos_without_action", names.NUM_EOS_WITHOUT_ACTION),
            ("num_leaks", "hindsight/num_leaks"),
        )
    }
    without = {
        "steps_without_contrast": num_stalled(rows, "contrast"),
        "steps_without_gradient": num_stalled(rows, "gradient"),
    }
    return {"s_per_step": sum(seconds) / len(seconds) if seconds else None, **totals, **without}


def _evaluation_figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    evaluated = [row for row in rows if names.EVAL_EM in row]
    if not evaluated:
        return {}
    first, last = evaluated[0], evaluated[-1]
    figures = {
        "em": names.EVAL_EM,
        "f1": names.EVAL_F1,
        "hit": names.EVAL_HIT_RATE,
        "num_evaluated": names.EVAL_NUM_TRAJECTORIES,
        "num_lost": names.EVAL_NUM_LOST,
    }
    return {
        f"{name}_{when}": row[metric]
        for name, metric in figures.items()
        for when, row in (("start", first), ("end", last))
        if metric in row
    }


def _probe_figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    shares = ("student_hit", "teacher_hit", "student_hit_mixed", "teacher_hit_mixed")
    return dict.fromkeys(shares) | {
        name.removeprefix("probe/"): value for row in rows for name, value in row.items() if name.startswith("probe/")
    }
