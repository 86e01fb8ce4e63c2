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
from megatron_sdsearch.errors import ConfigError
from megatron_sdsearch.model import checkpoint
from megatron_sdsearch.model.architecture import check_layout, load_hf_config
from megatron_sdsearch.model.hf_folder import write_hf_folder
from megatron_sdsearch.parallel.groups import ParallelState
from megatron_sdsearch.records import Question, TrainBatch
from megatron_sdsearch.training import step_metrics
from megatron_sdsearch.training.policy import Network, Policy
from megatron_sdsearch.training.rollouts import DistributedRollouts, HindsightGroup
from megatron_sdsearch.training.run_log import RunLog, write_summary
from megatron_sdsearch.training.teacher import HindsightTeacher
from megatron_sdsearch.training.updates import Learner, pack_samples
from megatron_sdsearch.training.warm_start import WarmStart


def train(config: RunConfig) -> dict[str, Any]:
    """Run ``train.mode`` to ``train.num_steps``, continuing from the newest checkpoint of ``run_dir``.

    Every rank of the run calls it; ranks come from torchrun's environment.

    Returns:
        The summary, which is also ``run_dir/summary.json``.

    Raises:
        ConfigError: before anything slow has started.
        SDSearchError: the run cannot go on; the newest checkpoint stays as it was.
    """
    config.check_files()
    hf_config = load_hf_config(config.model.hf_dir)
    check_layout(hf_config, config.parallel)
    _check_lengths(config, hf_config.max_position_embeddings)
    config.check_world(int(os.environ.get("WORLD_SIZE", "1")), torch.cuda.is_available())
    parallel = ParallelState.initialize(config.parallel, seed=config.seed)
    start = time.monotonic()
    policy = Policy.build(config, parallel)
    if config.train.mode == "warm_start":
        _warm_start(config, parallel, policy)
    else:
        _reinforce(config, parallel, policy)
    if config.checkpoint.export_hf:
        write_hf_folder(policy.hf_weights(), config.model.hf_dir, config.run_dir / "hf", is_writer=parallel.is_main)
    summary = write_summary(config, parallel, time.monotonic() - start)
    parallel.shutdown()
    return summary


def _check_lengths(config: RunConfig, max_positions: int) -> None:
    longest = config.rollout.max_total_tokens + config.hindsight.max_block_tokens
    if config.train.mode == "rl" and longest > max_positions:
        raise ConfigError(
            "rollout.max_total_tokens",
            f"with hindsight.max_block_tokens it makes {longest} tokens, the model has {max_positions} positions",
            "lower one of the two",
        )


def _reinforce(config: RunConfig, parallel: ParallelState, policy: Policy) -> None:
    reference = Network.load(config, parallel) if config.objective.kl_coef > 0 else None
    learner = Learner(policy, reference, HindsightTeacher(policy, config.objective), config)
    rollouts = DistributedRollouts(config, parallel)
    questions = QuestionSampler(_questions(config.data.train), config.seed, config.data.questions_per_step)
    heldout = _questions(config.data.heldout)[: config.evaluation.num_questions]
    step = checkpoint.load_latest(config.run_dir / "checkpoints", policy, parallel, config)

    with RunLog(config, parallel, step, rollouts.renderer) as log:
        phase = log.timer.phase
        while True:
            with phase("publish"):
                rollouts.publish(policy, version=step)
            if _is_evaluation_due(step, config):
                with phase("evaluate"):
                    log.add(step, step_metrics.of_evaluation(rollouts.evaluate(heldout, step=step)))
            if step == config.train.num_steps:
                break
            with phase("rollout"):
                collected = rollouts.collect(questions, step=step)
                groups = collected.groups
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
            if _is_checkpoint_due(step, config):
                with phase("checkpoint"):
                    _save(config, policy, parallel, step)
    rollouts.close()


def _warm_start(config: RunConfig, parallel: ParallelState, policy: Policy) -> None:
    warm_start = WarmStart(config, policy, parallel)
    step = checkpoint.load_latest(config.run_dir / "checkpoints", policy, parallel, config)
    with RunLog(config, parallel, step, warm_start.renderer) as log:
        while step < config.train.num_steps:
            with log.timer.phase("update"):
                minibatch = warm_start.minibatch(step)
                result = warm_start.learn(minibatch)
            step += 1
            log.step(step, step_metrics.of_updates([result]), minibatch.num_policy_tokens)
            if _is_checkpoint_due(step, config):
                _save(config, policy, parallel, step)


def _pack(
    groups: Sequence[HindsightGroup],
    advantages: Sequence[Sequence[float]],
    alpha: float,
    config: RunConfig,
    parallel: ParallelState,
) -> TrainBatch:
    samples = [
        sample if alpha > 0 else replace(sample, teacher_prompt_ids=())  # nothing to distil: no teacher pass
        for (group, blocks), own in zip(groups, advantages, strict=True)
        for sample in build_samples(group, own, blocks, config.objective, rho=config.hindsight.rho)
    ]
    return pack_samples(samples, config, parallel)


def _questions(path: Path | None) -> tuple[Question, ...]:
    return read_questions(path) if path is not None else ()


def _is_evaluation_due(step: int, config: RunConfig) -> bool:
    every = config.evaluation.every
    return every > 0 and (step % every == 0 or step == config.train.num_steps)


def _is_checkpoint_due(step: int, config: RunConfig) -> bool:
    every = config.checkpoint.every
    return step == config.train.num_steps or (every > 0 and step % every == 0)


def _save(config: RunConfig, policy: Policy, parallel: ParallelState, step: int) -> None:
    state = checkpoint.TrainingState(step=step)
    checkpoint.save_checkpoint(config.run_dir / "checkpoints", policy, state, parallel, config)
