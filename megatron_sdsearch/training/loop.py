"""The loop: publish, roll out, look back, learn."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from megatron_sdsearch.batching.advantages import group_advantages
from megatron_sdsearch.batching.samples import build_samples
from megatron_sdsearch.config import RunConfig
from megatron_sdsearch.data.prompts import get_profile
from megatron_sdsearch.data.questions import QuestionSampler, read_questions
from megatron_sdsearch.errors import DataError, raise_first
from megatron_sdsearch.files import writing
from megatron_sdsearch.logging.summary import SUMMARY_FILE
from megatron_sdsearch.model.checkpoint_folder import run_date_of
from megatron_sdsearch.model.hf_config import check_layout, check_lengths, load_hf_config
from megatron_sdsearch.model.hf_folder import write_hf_folder
from megatron_sdsearch.model.hf_weights import SafetensorsFolder, check_weights
from megatron_sdsearch.model.safe_load import forbid_pickles
from megatron_sdsearch.parallel.groups import ParallelState
from megatron_sdsearch.records import Question, TrainBatch
from megatron_sdsearch.sglang.rules import own_server_problems
from megatron_sdsearch.tokenization.renderer import Renderer
from megatron_sdsearch.training import step_metrics
from megatron_sdsearch.training.policy import Network, Policy, starting_weights
from megatron_sdsearch.training.rollouts import DistributedRollouts, HindsightGroup, check_questions
from megatron_sdsearch.training.run_lock import RunLock
from megatron_sdsearch.training.run_log import RunLog, is_finished, write_summary
from megatron_sdsearch.training.run_record import write_run_record
from megatron_sdsearch.training.saving import Saving
from megatron_sdsearch.training.stop_request import STOPPED_FILE, StopRequest, write_stopped
from megatron_sdsearch.training.teacher import HindsightTeacher
from megatron_sdsearch.training.updates import Learner, pack_samples
from megatron_sdsearch.training.warm_start import WarmStart

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a start of a run ended.

    Attributes:
        step: finished steps of the run.
        stopped_by: the signal that asked to stop, whereupon the run was saved; "" for a run that is finished.
        summary: of a run that this start has finished, also in ``run_dir/summary.json``; None when it was stopped, or
            when nothing was left to do.
    """

    step: int
    stopped_by: str = ""
    summary: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Display:
    """What a person sees of a run while it goes on; neither call may raise.

    Attributes:
        say: shows one line at the terminal; called on the main rank alone.
        refresh_page: called on every rank after each evaluation, and when the run has finished or stopped.
    """

    say: Callable[[str], None] = lambda _: None
    refresh_page: Callable[[], None] = lambda: None


NO_DISPLAY = Display()


def train(config: RunConfig, display: Display = NO_DISPLAY) -> Outcome:
    """Run ``train.mode`` to ``train.num_steps``, continuing from the newest checkpoint of ``run_dir``.

    Every rank of the run calls it; ranks come from torchrun's environment.

    No other run may be at work in ``run_dir``.

    Args:
        config: of the run.
        display: of the run.

    Raises:
        ConfigError: before anything slow has started.
        SDSearchError: the run cannot go on; the newest checkpoint stays as it was.
    """
    start = time.monotonic()
    forbid_pickles()
    config.check_files()
    hf_config = load_hf_config(config.model.hf_dir)
    check_layout(hf_config, config.parallel)
    check_lengths(hf_config, config)
    raise_first(own_server_problems(config, hf_config))
    config.check_world(int(os.environ.get("WORLD_SIZE", "1")), torch.cuda.is_available())
    # Rank 0 speaks for all, before they meet: it fails as each of them does for a wrong setting.
    if os.environ.get("RANK", "0") != "0":
        return _train(config, start, display, was_finished=False)
    tensors, source = starting_weights(config.model, hf_config)
    check_weights(tensors, hf_config, source)
    check_questions(config)
    with RunLock(config.run_dir):
        was_finished = is_finished(config)
        if not was_finished:
            for name in (SUMMARY_FILE, STOPPED_FILE):  # how a process before this one ended
                (config.run_dir / name).unlink(missing_ok=True)
            write_run_record(config)
            display.say(f"model: {_model_words(config, hf_config)}; device: {_device_words()}")
        return _train(config, start, display, was_finished=was_finished)


def _train(config: RunConfig, start: float, display: Display, *, was_finished: bool) -> Outcome:
    parallel = ParallelState.initialize(config.parallel, seed=config.seed)
    if parallel.all_gather_object(was_finished)[0]:
        parallel.shutdown()
        return Outcome(step=config.train.num_steps)
    run_date = _agreed_run_date(config, parallel)
    # Before anything slow: a tokenizer or a chat template that cannot be used ends the run here.
    renderer = Renderer.from_folder(
        config.model.hf_dir,
        profile=get_profile(config.data.prompt_profile),
        arguments=config.data.chat_template_arguments,
        run_date=run_date,
    )
    with StopRequest(parallel, display.say) as stop:
        policy = Policy.build(config, parallel)
        saving = Saving(config, policy, start, run_date)
        learn = _warm_start if config.train.mode == "warm_start" else _reinforce
        step = learn(config, policy, saving, stop, renderer, display)
        saving.finish(step)
        is_stopped = step < config.train.num_steps
        if is_stopped and parallel.is_main:
            write_stopped(config.run_dir, stop.name, step)
            display.refresh_page()
        parallel.all_gather_object(None)  # no rank leaves before: srun ends all nodes when the first one ends
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


def _agreed_run_date(config: RunConfig, parallel: ParallelState) -> date:
    """The main rank's: midnight may pass between two ranks, and a folder look different from two nodes."""
    dates: list[date | None] = parallel.all_gather_object(run_date_of(config.run_dir) if parallel.is_main else None)
    assert dates[0] is not None
    return dates[0]


def _model_words(config: RunConfig, hf_config: PretrainedConfig) -> str:
    source = config.model.megatron_dir or config.model.hf_dir
    try:
        size = f"{SafetensorsFolder(config.model.hf_dir).num_parameters / 1e6:,.1f} M parameters, "
    except DataError:  # with model.megatron_dir the folder need not hold weights; else loading them says more
        size = ""
    return f"{hf_config.model_type}, {size}{config.model.dtype}, from {source}"


def _device_words() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _begin(config: RunConfig, saving: Saving, parallel: ParallelState, display: Display) -> int:
    """Load the newest checkpoint and say so; its step. Right before the loop, for random numbers go on from there."""
    loaded = saving.load()
    if parallel.is_main:
        begins = f"continues from step {loaded.step}" if loaded.step else "begins at step 0"
        changed = f"; changed: {', '.join(loaded.changes)}" if loaded.changes else ""
        display.say(f"{begins} of {config.train.num_steps}{changed}")
        if (problem := config.saving_problem()) is not None:
            _log.warning("%s", problem)
    return loaded.step


def _reinforce(
    config: RunConfig,
    policy: Policy,
    saving: Saving,
    stop: StopRequest,
    renderer: Renderer,
    display: Display,
) -> int:
    """Returns the number of finished steps: fewer than asked for when all ranks were asked to stop."""
    parallel = policy.parallel
    reference = Network.load(config, parallel) if config.objective.kl_coef > 0 else None
    learner = Learner(policy, reference, HindsightTeacher(policy, config.objective), config)
    rollouts = DistributedRollouts(config, parallel, renderer)
    questions = QuestionSampler(_questions(config.data.train), config.seed, config.data.questions_per_step)
    heldout = _questions(config.data.heldout)[: config.evaluation.num_questions]
    step = _begin(config, saving, parallel, display)

    with RunLog(config, parallel, step, rollouts.renderer) as log:
        phase = log.timer.phase
        while step == config.train.num_steps or not stop.is_agreed():
            with phase("publish"):
                rollouts.publish(policy, version=step)
            if _is_evaluation_due(step, config):
                with phase("evaluate"):
                    evaluated = step_metrics.of_evaluation(rollouts.evaluate(heldout, step=step))
                log.add(step, evaluated)
                saving.score(step, evaluated)
                display.refresh_page()
            if step == config.train.num_steps or stop.is_agreed():
                break
            with phase("rollout"):
                collected = rollouts.collect(questions, step=step)
                groups = collected.groups
            if stop.is_agreed():
                break  # nothing was learned from them: the step will begin anew
            probe = {}
            if config.telemetry.query_probe and step == config.objective.first_distilling_step:
                with phase("probe"):
                    probe = step_metrics.of_probe(rollouts.probe(groups))
            rollouts.rest()
            advantages = [group_advantages(g, config.objective.normalize_advantage_std) for g, _ in groups]
            with phase("pack"):
                batch = _pack(groups, advantages, config.objective.alpha_at(step), config, parallel)
            results = learner.learn(batch, step, log.timer)
            step += 1
            log.trajectories(step, [g for g, _ in groups], advantages, [b for _, b in groups])
            log.step(step, step_metrics.of_step(collected, results, config) | probe, batch.num_policy_tokens)
            with phase("checkpoint"):
                saving.after_step(step)
    rollouts.close()
    return step


def _warm_start(
    config: RunConfig,
    policy: Policy,
    saving: Saving,
    stop: StopRequest,
    renderer: Renderer,
    display: Display,
) -> int:
    """Returns the number of finished steps, as ``_reinforce`` does."""
    warm_start = WarmStart(config, policy, policy.parallel, renderer)
    step = _begin(config, saving, policy.parallel, display)
    with RunLog(config, policy.parallel, step, warm_start.renderer) as log:
        while step < config.train.num_steps and not stop.is_agreed():
            with log.timer.phase("update"):
                minibatch = warm_start.minibatch(step)
                result = warm_start.learn(minibatch)
            step += 1
            log.step(step, step_metrics.of_updates([result]), minibatch.num_policy_tokens)
            with log.timer.phase("checkpoint"):
                saving.after_step(step)
    return step


def _pack(
    groups: Sequence[HindsightGroup],
    advantages: Sequence[Sequence[float]],
    alpha: float,
    config: RunConfig,
    parallel: ParallelState,
) -> TrainBatch:
    samples = [
        sample if alpha > 0 else replace(sample, teacher_prompts=())  # nothing to distil: no teacher pass
        for (group, blocks), own in zip(groups, advantages, strict=True)
        for sample in build_samples(group, own, blocks, config.objective, rho=config.hindsight.rho)
    ]
    return pack_samples(samples, config, parallel)


def _questions(path: Path | None) -> tuple[Question, ...]:
    return read_questions(path) if path is not None else ()


def _is_evaluation_due(step: int, config: RunConfig) -> bool:
    every = config.evaluation.every
    return every > 0 and (step % every == 0 or step == config.train.num_steps)
