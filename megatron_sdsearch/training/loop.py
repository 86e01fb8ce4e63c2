"""The loop: publish, roll out, look back, learn."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_sdsearch.batching.advantages import group_advantages
from megatron_sdsearch.batching.samples import build_samples
from megatron_sdsearch.config import RunConfig
from megatron_sdsearch.data.questions import QuestionSampler, read_questions
from megatron_sdsearch.model.hf_config import check_layout, check_lengths, load_hf_config
from megatron_sdsearch.model.hf_folder import write_hf_folder
from megatron_sdsearch.model.hf_weights import check_weights
from megatron_sdsearch.model.safe_load import forbid_pickles
from megatron_sdsearch.parallel.groups import ParallelState
from megatron_sdsearch.records import Question, TrainBatch
from megatron_sdsearch.telemetry.files import writing
from megatron_sdsearch.training import step_metrics
from megatron_sdsearch.training.policy import Network, Policy, starting_weights
from megatron_sdsearch.training.rollouts import DistributedRollouts, HindsightGroup
from megatron_sdsearch.training.run_lock import RunLock
from megatron_sdsearch.training.run_log import SUMMARY_FILE, RunLog, write_summary
from megatron_sdsearch.training.saving import Saving
from megatron_sdsearch.training.stop_request import STOPPED_FILE, StopRequest, write_stopped
from megatron_sdsearch.training.teacher import HindsightTeacher
from megatron_sdsearch.training.updates import Learner, pack_samples
from megatron_sdsearch.training.warm_start import WarmStart


def train(config: RunConfig) -> dict[str, Any] | None:
    """Run ``train.mode`` to ``train.num_steps``, continuing from the newest checkpoint of ``run_dir``.

    Every rank of the run calls it; ranks come from torchrun's environment.

    No other run may be at work in ``run_dir``.

    Returns:
        The summary, which is also ``run_dir/summary.json``; None when a signal asked to stop: the run is saved.

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
    config.check_world(int(os.environ.get("WORLD_SIZE", "1")), torch.cuda.is_available())
    # Rank 0 speaks for all, before they meet: it fails as each of them does for a wrong setting.
    if os.environ.get("RANK", "0") != "0":
        return _train(config, start)
    tensors, source = starting_weights(config.model, hf_config)
    check_weights(tensors, hf_config, source)
    with RunLock(config.run_dir):
        for name in (SUMMARY_FILE, STOPPED_FILE):  # how a process before this one ended
            (config.run_dir / name).unlink(missing_ok=True)
        return _train(config, start)


def _train(config: RunConfig, start: float) -> dict[str, Any] | None:
    parallel = ParallelState.initialize(config.parallel, seed=config.seed)
    with StopRequest(parallel) as stop:
        policy = Policy.build(config, parallel)
        saving = Saving(config, policy, start)
        step = (_warm_start if config.train.mode == "warm_start" else _reinforce)(config, policy, saving, stop)
        saving.finish(step)
    summary = None
    if step < config.train.num_steps:
        if parallel.is_main:
            write_stopped(config.run_dir, stop.name, step)
        parallel.all_gather_object(None)  # nobody leaves before: srun ends all nodes when the first one ends
    else:
        if config.checkpoint.export_hf:
            target = config.run_dir / "hf"
            with writing(target):
                write_hf_folder(policy.hf_weights(), config.model.hf_dir, target, is_writer=parallel.is_main)
        summary = write_summary(config, parallel, saving.wall_s)
    parallel.shutdown()
    return summary


def _reinforce(config: RunConfig, policy: Policy, saving: Saving, stop: StopRequest) -> int:
    """Returns the number of finished steps: fewer than asked for when all ranks were asked to stop."""
    parallel = policy.parallel
    reference = Network.load(config, parallel) if config.objective.kl_coef > 0 else None
    learner = Learner(policy, reference, HindsightTeacher(policy, config.objective), config)
    rollouts = DistributedRollouts(config, parallel)
    questions = QuestionSampler(_questions(config.data.train), config.seed, config.data.questions_per_step)
    heldout = _questions(config.data.heldout)[: config.evaluation.num_questions]
    step = saving.load()

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


def _warm_start(config: RunConfig, policy: Policy, saving: Saving, stop: StopRequest) -> int:
    """Returns the number of finished steps, as ``_reinforce`` does."""
    warm_start = WarmStart(config, policy, policy.parallel)
    step = saving.load()
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
