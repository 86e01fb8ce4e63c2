"""Compare the run's sizes with the cluster: processes and GPUs, memory, ranks without work."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megatron_sdsearch.allocation import allocation_problems, assign_roles
from megatron_sdsearch.check.findings import Finding, note, warning
from megatron_sdsearch.check.run_under_test import RunUnderTest
from megatron_sdsearch.model.hf_config import hf_config_problems
from megatron_sdsearch.model.shape import ModelShape, layout_problems
from megatron_sdsearch.plan.memory import GIB, HEADROOM, busiest_rank, plan_memory
from megatron_sdsearch.plan.roofline import HARDWARE
from megatron_sdsearch.plan.workload import Layout
from megatron_sdsearch.rollout.requests import rollout_ranks

_ASSUMED = "h100"


def check_sizes(run: RunUnderTest) -> Iterator[Finding]:
    """Check layout, memory and shares of the ranks."""
    yield from _layout(run)
    yield from _memory(run)
    yield from _shares(run)


def _layout(run: RunUnderTest) -> Iterator[Finding]:
    cluster, tensor = run.cluster, run.config.parallel.tensor_model_parallel_size
    if cluster.num_idle_gpus:
        yield warning(
            "model.dtype",
            f"{run.config.model.dtype} is for CPUs, but Slurm gives {cluster.num_idle_gpus} GPUs per node: they would "
            "not be used",
            "set model.dtype=bfloat16; for a run on CPUs, add --device cpu",
        )
    if tensor > cluster.ranks_per_node:
        yield warning(
            "parallel.tensor_model_parallel_size",
            f"{tensor} is more than the {cluster.ranks_per_node} processes of a node: every layer's all-reduce would "
            "go over the network",
            "keep it within a node, and raise parallel.pipeline_model_parallel_size instead",
        )


def _memory(run: RunUnderTest) -> Iterator[Finding]:
    """Plan the busiest GPU of trainers and servers; skipped without GPUs, or if the layout is wrong."""
    config, hf_config, cluster = run.config, run.files.hf_config, run.cluster
    if hf_config is None or hf_config_problems(hf_config) or not cluster.has_gpu:
        return
    shape = ModelShape.from_hf_config(hf_config)
    if layout_problems(shape, config.parallel) or allocation_problems(config, cluster):
        return
    gpu_bytes, owner = HARDWARE[_ASSUMED].memory_bytes, f"an assumed {_ASSUMED.upper()}"
    if torch.cuda.is_available():
        gpu_bytes, owner = torch.cuda.get_device_properties(0).total_memory, "this machine's"
    layout = Layout.from_config(config, assign_roles(config, cluster))
    plan = busiest_rank(plan_memory(config, shape, layout, gpu_bytes=gpu_bytes))
    needed, largest = max(plan.total_bytes, plan.server_parts_needed), max(plan.parts, key=plan.parts.__getitem__)
    problem = (
        f"{needed / GIB:.1f} GiB planned on the busiest GPU, most of it for {largest}; {owner} has "
        f"{gpu_bytes / GIB:.1f}, of which {HEADROOM:.0%} is reserved for fragmentation"
    )
    if plan.why_not(gpu_bytes) is None:
        yield note("model", problem)
    else:
        yield warning("model", problem, "see which layouts fit: python -m megatron_sdsearch plan CONFIG")


def _shares(run: RunUnderTest) -> Iterator[Finding]:
    """Check that every rank has work in a step."""
    config, num_processes, num_questions = run.config, run.cluster.world_size, len(run.files.train)
    num_replicas = max(1, num_processes // config.parallel.model_parallel_size)
    smallest, field = config.train.demonstrations_per_step, "train.demonstrations_per_step"
    if config.is_rl:
        per_step, refills = config.data.questions_per_step, config.rollout.max_refills
        smallest = config.trajectories_per_step // config.updates_per_step
        field = "train.trajectories_per_minibatch"
        if per_step <= num_questions < per_step * (1 + refills):
            yield warning(
                "rollout.max_refills",
                f"{refills} for each of {per_step} questions may need {per_step * (1 + refills)} in one step, but "
                f"there are {num_questions}: some would be asked twice in it",
                f"lower it to {num_questions // per_step - 1}, or give more questions",
            )
        num_ranks = len(rollout_ranks(config, num_processes))
        if per_step < num_ranks:
            problem = f"{per_step} for {num_ranks} processes that roll out: {num_ranks - per_step} of them wait"
            yield warning("data.questions_per_step", problem, f"set it to at least {num_ranks}")
    if smallest < num_replicas:
        problem = f"an update of {smallest} samples for {num_replicas} data-parallel ranks: some have no samples"
        yield warning(field, problem, f"set it to at least {num_replicas}, better many times that")
