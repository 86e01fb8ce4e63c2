"""The training loop: publish, roll out, build hindsight, pack, update."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from typing import Any

import torch

from megatron_sdsearch.batching.advantages import group_advantages
from megatron_sdsearch.batching.samples import build_samples, demonstration_sample
from megatron_sdsearch.config import RunConfig, setting_warnings
from megatron_sdsearch.data.demonstrations import DemonstrationSampler, check_profile, read_demonstrations
from megatron_sdsearch.data.prompts import get_profile
from megatron_sdsearch.data.questions import QuestionSampler, read_questions
from megatron_sdsearch.errors import raise_problems
from megatron_sdsearch.files import writing
from megatron_sdsearch.hindsight.block import build_hindsight, skip_hindsight
from megatron_sdsearch.logging import names
from megatron_sdsearch.logging.run_log import RunLog
from megatron_sdsearch.logging.summary import SUMMARY_FILE, write_summary
from megatron_sdsearch.loss.objective import supervised_loss
from megatron_sdsearch.model.checkpoint_folder import run_date_of
from megatron_sdsearch.model.hf_config import load_hf_config
from megatron_sdsearch.model.hf_folder import write_hf_folder
from megatron_sdsearch.model.megatron_folder import forbid_pickles
from megatron_sdsearch.model.shape import ModelShape
from megatron_sdsearch.parallel.groups import ParallelState
from megatron_sdsearch.tokenization.renderer import Renderer
from megatron_sdsearch.training import step_metrics
from megatron_sdsearch.training.policy import Network, Policy
from megatron_sdsearch.training.preflight import read_files, refuse_start
from megatron_sdsearch.training.rollouts import DistributedRollouts
from megatron_sdsearch.training.run_lock import lock_run_dir
from megatron_sdsearch.training.run_record import is_finished, write_run_record
from megatron_sdsearch.training.saving import CheckpointScheduler
from megatron_sdsearch.training.stop_request import STOPPED_FILE, StopRequest, write_stopped
from megatron_sdsearch.training.updates import pack_samples, run_updates

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The outcome of one start of a run.

    Attributes:
        step: finished steps of the run.
        stopped_by: the signal after which the run was saved and stopped; "" for a finished run.
        summary: of a run that this start has finished, also in ``run_dir/summary.json``; None if it was stopped or
            nothing was left to do.
    """

    step: int
    stopped_by: str = ""
    summary: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Display:
    """Callbacks that show a run's progress to the user; they must not raise.

    Attributes:
        say: shows one line at the terminal; called on the main rank only.
        refresh_page: updates the report; called on every rank after each evaluation and at the end.
    """

    say: Callable[[str], None] = lambda _: None
    refresh_page: Callable[[], None] = lambda: None


NO_DISPLAY = Display()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """State shared by the steps of both modes."""

    config: RunConfig
    policy: Policy
    renderer: Renderer
    saving: CheckpointScheduler
    stop: StopRequest
    display: Display

    def load_checkpoint(self) -> int:
        """Load the newest checkpoint, report it, and return its step.

        Called right before the loop, because it restores the random state.
        """
        loaded = self.saving.load()
        if self.policy.parallel.is_main:
            begins = f"continues from step {loaded.step}" if loaded.step else "begins with step 1"
            changed = f"; changed: {', '.join(loaded.changes)}" if loaded.changes else ""
            self.display.say(f"{begins} of {self.config.train.num_steps}{changed}")
            for problem in setting_warnings(self.config):
                _log.warning("%s", problem)
        return loaded.step


def train(config: RunConfig, display: Display = NO_DISPLAY) -> Outcome:
    """Run ``train.mode`` up to ``train.num_steps``, continuing from the newest checkpoint of ``run_dir``.

    Called on every rank; torchrun's environment defines the ranks. No other run may use ``run_dir``.

    Args:
        config: of the run.
        display: of the run.

    Raises:
        ConfigError: a setting is wrong; raised before anything slow starts.
        SDSearchError: the run cannot continue; the newest checkpoint is unchanged.
    """
    start = time.monotonic()
    forbid_pickles()
    refuse_start(config)
    # Only rank 0 reads the files completely, before the process groups exist.
    if os.environ.get("RANK", "0") != "0":
        return _train(config, start, display, was_finished=False)
    raise_problems(read_files(config).problems)
    with lock_run_dir(config.run_dir):
        was_finished = is_finished(config)
        if not was_finished:
            for name in (SUMMARY_FILE, STOPPED_FILE):  # of an earlier start
                (config.run_dir / name).unlink(missing_ok=True)
            write_run_record(config)
            device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
            display.say(f"model: {_describe_model(config)}; device: {device}")
        return _train(config, start, display, was_finished=was_finished)


def _train(config: RunConfig, start: float, display: Display, *, was_finished: bool) -> Outcome:
    parallel = ParallelState.initialize(config.parallel, seed=config.seed)
    if parallel.all_gather_object(was_finished)[0]:
        parallel.shutdown()
        return Outcome(step=config.train.num_steps)
    # All ranks use the main rank's date: midnight may pass between two ranks, and nodes may see run_dir differently.
    run_date: date = parallel.all_gather_object(run_date_of(config.run_dir) if parallel.is_main else date.min)[0]
    # Before anything slow, because an unusable tokenizer or chat template ends the run here.
    renderer = Renderer.from_folder(
        config.model.hf_dir,
        profile=get_profile(config.data.prompt_profile),
        arguments=config.data.chat_template_arguments,
        run_date=run_date,
    )
    with StopRequest(parallel, display.say) as stop:
        policy = Policy(config, parallel)
        saving = CheckpointScheduler(config, policy, start, run_date)
        run = _Run(config=config, policy=policy, renderer=renderer, saving=saving, stop=stop, display=display)
        step = _warm_start(run) if config.train.mode == "warm_start" else _reinforce(run)
        saving.finish(step)
        is_stopped = step < config.train.num_steps
        if is_stopped and parallel.is_main:
            write_stopped(config.run_dir, stop.name, step)
            display.refresh_page()
        parallel.all_gather_object(None)  # ranks leave together: srun ends all nodes when the first one ends
    summary = None
    if not is_stopped:
        if config.checkpoint.export_hf:
            target = config.run_dir / "hf"
            with writing(target):
                write_hf_folder(policy.hf_weights(), config.model.hf_dir, target, is_writer=parallel.is_main)
        summary = write_summary(config, parallel, saving.wall_s)
        display.refresh_page()
    parallel.shutdown()
    return Outcome(step=step, stopped_by=stop.name if is_stopped else "", summary=summary)


def _describe_model(config: RunConfig) -> str:
    hf_config = load_hf_config(config.model.hf_dir)
    source = config.model.megatron_dir or config.model.hf_dir
    size = ModelShape.from_hf_config(hf_config).num_params / 1e6
    return f"{hf_config.model_type}, {size:,.1f} M parameters, {config.model.dtype}, from {source}"


def _reinforce(run: _Run) -> int:
    """Run reinforcement learning; returns the number of finished steps, fewer than ``num_steps`` after a stop request.

    ``step`` counts finished steps. Files and messages call the current step ``step + 1``; random streams and the
    schedule of alpha use ``step``, from 0.
    """
    config, policy, saving, stop = run.config, run.policy, run.saving, run.stop
    objective, profile = config.objective, get_profile(config.data.prompt_profile)
    parallel, num_steps = policy.parallel, config.train.num_steps
    assert config.data.train is not None  # RunConfig has checked it
    reference = Network(config, parallel) if objective.kl_coef > 0 else None
    rollouts = DistributedRollouts(config, parallel, run.renderer)
    questions = QuestionSampler(read_questions(config.data.train), config.seed, config.data.questions_per_step)
    heldout = read_questions(config.data.heldout)[: config.evaluation.num_questions] if config.data.heldout else ()
    has_warned = False
    step = run.load_checkpoint()

    with RunLog(config, parallel, step, run.renderer) as log:
        phase = log.timer.phase
        while step == num_steps or not stop.is_agreed():
            with phase("publish"):
                rollouts.source.publish(policy, version=step)
            every = config.evaluation.every
            if every > 0 and (step % every == 0 or step == num_steps):
                with phase("evaluate"):
                    evaluated = step_metrics.measure_rollouts(rollouts.evaluate(heldout, step=step), names.EVAL_PREFIX)
                log.add(step, evaluated)
                saving.score(step, evaluated)
                run.display.refresh_page()
            if step == num_steps or stop.is_agreed():
                break

            alpha = objective.alpha_at(step)
            with phase("rollout"):
                collected = rollouts.collect(questions, step=step)
                groups = collected.groups
            if stop.is_agreed():
                break  # the step was not learned from and will be repeated

            with phase("hindsight"):
                if alpha > 0:
                    blocks = build_hindsight(groups, run.renderer, profile, config.hindsight, seed=config.seed)
                else:
                    blocks = skip_hindsight(groups)
            probed = {}
            if config.telemetry.query_probe and step == objective.first_distilling_step:
                with phase("probe"):
                    probed = step_metrics.measure_probe(rollouts.probe(list(zip(groups, blocks, strict=True))))
            rollouts.source.release_memory()

            with phase("pack"):
                advantages = [group_advantages(group, objective.normalize_advantage_std) for group in groups]
                members = zip(groups, advantages, blocks, strict=True)
                samples = [sample for member in members for sample in build_samples(*member, objective)]
                batch = pack_samples(samples, config, parallel)
            results = run_updates(policy, reference, batch, objective, alpha, log.timer)

            step += 1
            log.trajectories(step, groups, advantages, blocks)
            measured = step_metrics.measure_step(collected, blocks, advantages, results)
            if (num_emptied := measured[names.NUM_EMPTIED]) and parallel.is_main and not has_warned:
                has_warned = True
                _log.warning(
                    "step %d: hindsight.max_block_tokens = %d leaves no room for the hindsight of %d trajectories, "
                    "which are not distilled; raise it (hindsight/num_emptied counts them in every step)",
                    step,
                    config.hindsight.max_block_tokens,
                    num_emptied,
                )
            log.step(step, measured | probed, batch.num_policy_tokens)
            with phase("checkpoint"):
                saving.after_step(step)
    rollouts.close()
    return step


def _warm_start(run: _Run) -> int:
    """Fine-tune on demonstrations with the same packing and updates; returns the number of finished steps."""
    config, policy = run.config, run.policy
    assert config.train.demonstrations is not None  # RunConfig has checked it
    demonstrations = read_demonstrations(config.train.demonstrations)
    check_profile(demonstrations, get_profile(config.data.prompt_profile))
    sampler = DemonstrationSampler(demonstrations, config.seed, config.train.demonstrations_per_step)
    budget = config.train.max_tokens_per_microbatch
    step = run.load_checkpoint()
    with RunLog(config, policy.parallel, step, run.renderer) as log:
        while step < config.train.num_steps and not run.stop.is_agreed():
            with log.timer.phase("update"):
                samples = [demonstration_sample(row, run.renderer, budget) for row in sampler.batch(step)]
                (minibatch,) = pack_samples(samples, config, policy.parallel).minibatches
                result = policy.update(minibatch, [supervised_loss] * len(minibatch.student))
            step += 1
            log.step(step, step_metrics.measure_updates([result]), minibatch.num_policy_tokens)
            with log.timer.phase("checkpoint"):
                run.saving.after_step(step)
    return step
