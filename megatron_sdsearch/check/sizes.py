"""Sizes against the cluster: processes and GPUs, memory, and ranks that have nothing to do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from megatron_sdsearch.check.findings import Finding, errors, note, warning
from megatron_sdsearch.check.run_under_test import Cluster, RunUnderTest
from megatron_sdsearch.config import world_problems
from megatron_sdsearch.errors import ConfigError
from megatron_sdsearch.model.hf_config import ARCHITECTURES, layout_problems
from megatron_sdsearch.plan.allocation import Allocation, check_sglang_nodes, servers_in
from megatron_sdsearch.plan.hardware import HARDWARE
from megatron_sdsearch.plan.layout import Layout, servers_of
from megatron_sdsearch.plan.memory import GIB, HEADROOM, plan_memory
from megatron_sdsearch.plan.shape import ModelShape
from megatron_sdsearch.training.preflight import attempt

_ASSUMED = "h100"


def check_sizes(run: RunUnderTest) -> Iterator[Finding]:
    """What the run needs, against what it is meant for."""
    yield from errors(_gpu_problems(run))
    yield from _layout(run)
    yield from _memory(run)
    yield from _shares(run)


def _gpu_problems(run: RunUnderTest) -> list[ConfigError]:
    """Who gets which GPU."""
    config, cluster = run.config, run.cluster
    problems: list[ConfigError] = []
    if not cluster.has_gpu:
        attempt(lambda: check_sglang_nodes(servers_of(config), _allocation(cluster)), "rollout.sglang", problems)
        return problems
    attempt(lambda: servers_in(config, _allocation(cluster)), "rollout.sglang", problems)
    taken = 0 if cluster.num_sglang_nodes else config.num_own_server_gpus
    if cluster.ranks_per_node + taken > cluster.gpus_per_node and not problems:
        problem = f"{cluster.ranks_per_node} trainer processes and {taken} GPUs of servers per node of "
        fix = f"start at most {cluster.gpus_per_node - taken} per node, each takes one"
        problems.append(ConfigError("--nproc-per-node", f"{problem}{cluster.gpus_per_node} GPUs", fix))
    return problems


def _layout(run: RunUnderTest) -> Iterator[Finding]:
    cluster, tensor = run.cluster, run.config.parallel.tensor_model_parallel_size
    if cluster.num_idle_gpus:
        yield warning(
            "model.dtype",
            f"{run.config.model.dtype} is for CPUs, and Slurm gives {cluster.num_idle_gpus} GPUs per node: they would "
            "not be used",
            "set model.dtype=bfloat16; for a run on CPUs say --device cpu",
        )
    if tensor > cluster.ranks_per_node:
        yield warning(
            "parallel.tensor_model_parallel_size",
            f"{tensor} is more than the {cluster.ranks_per_node} processes of a node: every layer's all-reduce would "
            "go over the network",
            "keep tensor within a node, and take parallel.pipeline_model_parallel_size beyond it",
        )


def _memory(run: RunUnderTest) -> Iterator[Finding]:
    """The busiest GPU of trainers and servers by ``plan``; nothing without GPUs, or where the layout is wrong."""
    config, hf_config, cluster = run.config, run.files.hf_config, run.cluster
    if hf_config is None or hf_config.model_type not in ARCHITECTURES or not cluster.has_gpu:
        return
    if [*layout_problems(hf_config, config.parallel), *world_problems(config, cluster.world_size, has_gpu=True)]:
        return
    unfit: list[ConfigError] = []
    servers = attempt(lambda: servers_in(config, _allocation(cluster)), "rollout.sglang", unfit)
    if unfit:
        return
    gpu_bytes, owner = HARDWARE[_ASSUMED].memory_bytes, f"an assumed {_ASSUMED.upper()}"
    if torch.cuda.is_available():
        gpu_bytes, owner = torch.cuda.get_device_properties(0).total_memory, "this machine's"
    shape = ModelShape.of(hf_config, ARCHITECTURES[hf_config.model_type])
    layout = replace(Layout.of(config, cluster.world_size), servers=servers)
    plan = plan_memory(config, shape, layout, gpu_bytes=gpu_bytes)
    needed, largest = max(plan.total_bytes, plan.server_parts_needed), max(plan.parts, key=plan.parts.__getitem__)
    problem = (
        f"{needed / GIB:.1f} GiB planned on the busiest GPU, most of it for {largest}; {owner} has "
        f"{gpu_bytes / GIB:.1f}, of which {HEADROOM:.0%} are left to fragmentation"
    )
    if plan.fits(gpu_bytes):
        yield note("model", problem)
    else:
        yield warning("model", problem, "see faster layouts and what fits: python -m megatron_sdsearch plan CONFIG")


def _shares(run: RunUnderTest) -> Iterator[Finding]:
    """Whether every rank has work in a step."""
    config, num_processes, num_questions = run.config, run.cluster.world_size, len(run.files.train)
    per_replica = config.parallel.tensor_model_parallel_size * config.parallel.pipeline_model_parallel_size
    num_replicas = max(1, num_processes // per_replica)
    smallest, field = config.train.demonstrations_per_step, "train.demonstrations_per_step"
    if run.is_rl:
        per_step, refills = config.data.questions_per_step, config.rollout.max_refills
        smallest = per_step * config.rollout.group_size // config.updates_per_step
        field = "train.trajectories_per_minibatch"
        if per_step <= num_questions < per_step * (1 + refills):
            yield warning(
                "rollout.max_refills",
                f"{refills} for each of {per_step} questions may ask for {per_step * (1 + refills)} in one step, and "
                f"there are {num_questions}: some would be asked twice in it",
                f"lower it to {num_questions // per_step - 1}, or give more questions",
            )
        # Every trainer process, tensor-parallel ones too, rolls out its own share of the step's questions.
        if per_step < num_processes:
            problem = f"{per_step} for {num_processes} processes that roll out: {num_processes - per_step} of them wait"
            yield warning("data.questions_per_step", problem, f"set it to at least {num_processes}")
    if smallest < num_replicas:
        problem = (
            f"an update of {smallest} samples for {num_replicas} data-parallel ranks: some have nothing to learn from"
        )
        yield warning(field, problem, f"set it to at least {num_replicas}, and better many times that")


def _allocation(cluster: Cluster) -> Allocation:
    return Allocation(
        num_nodes=cluster.num_nodes,
        gpus_per_node=cluster.gpus_per_node,
        num_sglang_nodes=cluster.num_sglang_nodes,
    )
