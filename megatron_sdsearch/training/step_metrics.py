"""The numbers of one step, under the names of ``logging/names.py``; computed alike on every rank."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from megatron_sdsearch.batching.advantages import group_advantages
from megatron_sdsearch.config import RunConfig
from megatron_sdsearch.data.scoring import group_class
from megatron_sdsearch.evaluation import Metrics, summarize
from megatron_sdsearch.logging import names
from megatron_sdsearch.query_probe import ProbeResult
from megatron_sdsearch.records import GROUP_CLASSES, RolloutGroup, TrajectoryStatus
from megatron_sdsearch.training.policy import UpdateResult
from megatron_sdsearch.training.rollouts import StepRollouts

Values = dict[str, float | int]
_BY_CLASS = ("jsd", "entropy_gap")


def of_step(collected: StepRollouts, results: Sequence[UpdateResult], config: RunConfig) -> Values:
    """Rollouts, hindsight and updates of one step."""
    groups, counts = collected.groups, collected.counts
    rollouts = [group for group, _ in groups]
    metrics = summarize(rollouts).overall
    rewards = [
        score.reward
        for group in rollouts
        for trajectory, score in zip(group.trajectories, group.scores, strict=True)
        if not trajectory.status.is_lost
    ]
    classes = [group_class(group, config.hindsight.rho) for group in rollouts]
    values: Values = {
        names.REWARD: sum(rewards) / len(rewards),
        "train/num_retrieval_failed": _count(rollouts, TrajectoryStatus.RETRIEVAL_FAILED),
        names.NUM_WITHOUT_CONTRAST: len(classes) - classes.count("mixed"),
        names.SHARE_WITHOUT_ADVANTAGE: _share_without_advantage(rollouts),
        names.NUM_REFILLED: counts.num_refilled,
        names.NUM_ABANDONED: counts.num_abandoned,
        **collected.engine_counts,
        **{f"train/share_{name}": classes.count(name) / len(classes) for name in GROUP_CLASSES},
        **_rollout_values(metrics, names.TRAIN_PREFIX),
        **_query_values(rollouts),
    }
    return values | _hindsight_values(collected) | of_updates(results)


def of_evaluation(groups: Sequence[RolloutGroup]) -> Values:
    """A greedy evaluation."""
    return _rollout_values(summarize(groups).overall, names.EVAL_PREFIX)


def of_probe(result: ProbeResult) -> Values:
    """Hit rates of queries sampled from teacher and student."""
    shares = ("student_hit", "teacher_hit", "student_hit_mixed", "teacher_hit_mixed")
    known = {name: getattr(result, name) for name in shares}
    counts = {"num_turns": result.num_turns, "num_turns_mixed": result.num_turns_mixed, "num_failed": result.num_failed}
    return {f"probe/{name}": value for name, value in (known | counts).items() if value is not None}


def of_updates(results: Sequence[UpdateResult]) -> Values:
    """Means over the step's updates; maxima of what is a maximum."""
    reported = [result for result in results if result.metrics]
    if not reported:
        return {}
    values: Values = {}
    columns = [_distillation_means(result.metrics) for result in reported]
    if any("distill_loss" in column for column in columns):  # 0 where no trajectory of the update has a teacher
        columns = [{"distill_loss": 0.0, **column} for column in columns]
    for name in sorted({name for column in columns for name in column}):
        column = [metrics[name] for metrics in columns if name in metrics]
        key = f"loss/{name.removesuffix('_loss')}" if name != "loss" else "loss/total"
        values[key] = max(column) if name.endswith("_max") else sum(column) / len(column)
    values[names.GRAD_NORM] = sum(result.grad_norm for result in reported) / len(reported)
    values["optimizer/learning_rate"] = reported[-1].learning_rate
    return values


def _distillation_means(metrics: Mapping[str, float]) -> dict[str, float]:
    """Sums by group class become means, of each class and of all; a class without a distilled token is left out."""
    sums = {name: {kind: f"{name}_{kind}" for kind in GROUP_CLASSES} for name in ("distill_weight", *_BY_CLASS)}
    own = {column for by_class in sums.values() for column in by_class.values()}
    means = {name: value for name, value in metrics.items() if name not in own}
    weights = {kind: metrics.get(column, 0.0) for kind, column in sums["distill_weight"].items()}
    for name in _BY_CLASS if any(weights.values()) else ():
        known = {kind: metrics[sums[name][kind]] for kind, weight in weights.items() if weight}
        means[name] = sum(known.values()) / sum(weights.values())
        means |= {sums[name][kind]: value / weights[kind] for kind, value in known.items()}
    return means


def _rollout_values(metrics: Metrics, prefix: str) -> Values:
    """Counts and status shares of all trajectories, beside the means over those that were not lost."""
    values: Values = {
        f"{prefix}num_trajectories": metrics.num_trajectories,
        f"{prefix}num_lost": metrics.num_lost,
        f"{prefix}num_prompt_too_long": metrics.num_prompt_too_long,
        f"{prefix}num_eos_without_action": metrics.num_eos_without_action,
        **{f"{prefix}status/{status.value}": share for status, share in metrics.status_shares.items()},
    }
    known = {
        "em": metrics.em,
        "f1": metrics.f1,
        "hit_rate": metrics.hit,
        "num_searches": metrics.searches_per_question,
        "response_tokens": metrics.mean_response_tokens,
    }
    return values | {prefix + name: value for name, value in known.items() if value is not None}


def _query_values(groups: Sequence[RolloutGroup]) -> Values:
    spans = [s for group in groups for trajectory in group.trajectories for s in trajectory.sampled_spans]
    queries = [[-span.logprobs[position] for position in span.query_positions] for span in spans]
    lengths = [len(query) for query in queries if query]
    if not lengths:
        return {}
    return {
        names.QUERY_TOKENS: sum(lengths) / len(lengths),
        names.QUERY_ENTROPY: math.fsum(value for query in queries for value in query) / sum(lengths),
    }


def _hindsight_values(collected: StepRollouts) -> Values:
    groups = collected.groups
    num_trajectories = sum(len(group.trajectories) for group, _ in groups)
    num_kept = sum(not trajectory.status.is_lost for group, _ in groups for trajectory in group.trajectories)
    leaks = sum(
        trajectory.trajectory_id.sibling in block.leaks
        for group, blocks in groups
        for trajectory, block in zip(group.trajectories, blocks, strict=True)
    )
    dropped = sum(len(block.dropped) for _, blocks in groups for block in blocks)
    return {
        "hindsight/num_leaks": leaks,
        names.LEAK_SHARE: leaks / num_kept if num_kept else 0.0,
        "hindsight/dropped_per_block": dropped / num_trajectories,
        names.NUM_EMPTIED: collected.num_emptied,
    }


def _share_without_advantage(groups: Sequence[RolloutGroup]) -> float:
    # Divided by the deviation or not, an advantage is 0 in the same groups.
    return sum(not any(group_advantages(group, normalize_std=False)) for group in groups) / len(groups)


def _count(groups: Sequence[RolloutGroup], status: TrajectoryStatus) -> int:
    return sum(trajectory.status is status for group in groups for trajectory in group.trajectories)
