"""Metrics of one step, under the names of ``logging/names.py``; equal on every rank."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from megatron_sdsearch.data.scoring import group_class
from megatron_sdsearch.evaluation.metrics import summarize
from megatron_sdsearch.evaluation.query_probe import QueryHitComparison
from megatron_sdsearch.logging import names
from megatron_sdsearch.records import GROUP_CLASSES, HindsightBlock, RolloutGroup, TrajectoryStatus
from megatron_sdsearch.training.policy import UpdateResult
from megatron_sdsearch.training.rollouts import StepRollouts

Values = dict[str, float | int]
# Fields of RolloutStats that are metrics under another name.
_METRIC_NAMES = {"hit": "hit_rate", "searches_per_question": "num_searches", "mean_response_tokens": "response_tokens"}


def measure_step(
    rollouts: StepRollouts,
    blocks: Sequence[Sequence[HindsightBlock]],
    advantages: Sequence[Sequence[float]],
    results: Sequence[UpdateResult],
) -> Values:
    """Measure rollouts, hindsight and updates of one step.

    Args:
        rollouts: of all ranks.
        blocks: per group, per trajectory.
        advantages: per group, per trajectory.
        results: one per update.
    """
    groups = rollouts.groups
    members = [(t, score) for group in groups for t, score in zip(group.trajectories, group.scores, strict=True)]
    rewards = [score.reward for trajectory, score in members if not trajectory.status.is_lost]
    statuses = [trajectory.status for trajectory, _ in members]
    classes = [group_class(group) for group in groups]
    values: Values = {
        names.REWARD: sum(rewards) / len(rewards),
        names.NUM_RETRIEVAL_FAILED: statuses.count(TrajectoryStatus.RETRIEVAL_FAILED),
        names.NUM_WITHOUT_CONTRAST: len(classes) - classes.count("mixed"),
        names.SHARE_WITHOUT_ADVANTAGE: sum(not any(own) for own in advantages) / len(groups),
        names.NUM_REFILLED: rollouts.num_refilled,
        **rollouts.engine_counts,
        **{f"train/share_{name}": classes.count(name) / len(classes) for name in GROUP_CLASSES},
        **measure_rollouts(groups, names.TRAIN_PREFIX),
    }
    spans = [span for trajectory, _ in members for span in trajectory.sampled_spans]
    queries = [[-span.logprobs[position] for position in span.query_positions] for span in spans]
    if num_tokens := sum(map(len, queries)):
        values[names.QUERY_TOKENS] = num_tokens / sum(bool(query) for query in queries)
        values[names.QUERY_ENTROPY] = math.fsum(value for query in queries for value in query) / num_tokens
    flat = [block for own in blocks for block in own]
    pairs = [(trajectory, block) for (trajectory, _), block in zip(members, flat, strict=True)]
    num_leaks = sum(trajectory.trajectory_id.sibling in block.leaks for trajectory, block in pairs)
    values |= {
        names.NUM_LEAKS: num_leaks,
        names.LEAK_SHARE: num_leaks / len(rewards),
        "hindsight/dropped_per_block": sum(len(block.dropped) for block in flat) / len(flat),
        names.NUM_EMPTIED: sum(block.is_emptied and trajectory.is_trainable for trajectory, block in pairs),
    }
    return values | measure_updates(results)


def measure_probe(result: QueryHitComparison) -> Values:
    """Measure hit rates of the teacher's and the student's queries."""
    return {f"{names.PROBE_PREFIX}{name}": value for name, value in asdict(result).items() if value is not None}


def measure_updates(results: Sequence[UpdateResult]) -> Values:
    """Average metrics over the step's updates; those that end in ``_max`` take the maximum."""
    reported = [result for result in results if result.metrics]
    if not reported:
        return {}
    values: Values = {}
    columns = [_class_means(result.metrics) for result in reported]
    if any("distill_loss" in column for column in columns):  # 0 for an update without a teacher
        columns = [{"distill_loss": 0.0, **column} for column in columns]
    for name in sorted({name for column in columns for name in column}):
        column = [metrics[name] for metrics in columns if name in metrics]
        key = f"loss/{name.removesuffix('_loss')}" if name != "loss" else "loss/total"
        values[key] = max(column) if name.endswith("_max") else sum(column) / len(column)
    values[names.GRAD_NORM] = sum(result.grad_norm for result in reported) / len(reported)
    values["optimizer/learning_rate"] = reported[-1].learning_rate
    return values


def _class_means(metrics: Mapping[str, float]) -> dict[str, float]:
    """Turn sums by group class into means of each class and of all; omits classes without a distilled token."""
    suffixes = tuple(f"_{name}" for name in GROUP_CLASSES)
    means = {name: value for name, value in metrics.items() if not name.endswith(suffixes)}
    weights = {name: metrics.get(f"distill_weight_{name}", 0.0) for name in GROUP_CLASSES}
    known = {name: weight for name, weight in weights.items() if weight}
    stems = {name.removesuffix(suffix) for name in metrics for suffix in suffixes if name.endswith(suffix)}
    for stem in stems - {"distill_weight"} if known else ():
        means[stem] = sum(metrics[f"{stem}_{name}"] for name in known) / sum(weights.values())
        means |= {f"{stem}_{name}": metrics[f"{stem}_{name}"] / weight for name, weight in known.items()}
    return means


def measure_rollouts(groups: Sequence[RolloutGroup], prefix: str) -> Values:
    """Measure rollouts: counts and status shares of all trajectories, means over those that were not lost."""
    stats = summarize(groups).to_dict()
    del stats["num_questions"]
    values: Values = {f"{prefix}status/{status.value}": share for status, share in stats.pop("status_shares").items()}
    return values | {prefix + _METRIC_NAMES.get(name, name): value for name, value in stats.items()}
