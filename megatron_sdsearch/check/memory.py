"""Whether the run fits into its GPUs, by the formulas of ``plan``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from megatron_sdsearch.check.findings import Attempt, Finding
from megatron_sdsearch.check.subject import Subject
from megatron_sdsearch.check.world import World
from megatron_sdsearch.model.hf_config import ARCHITECTURES, is_layout
from megatron_sdsearch.plan.allocation import Allocation, servers_in
from megatron_sdsearch.plan.hardware import HARDWARE
from megatron_sdsearch.plan.layout import Layout
from megatron_sdsearch.plan.memory import GIB, HEADROOM, plan_memory
from megatron_sdsearch.plan.shape import ModelShape

_ASSUMED = "h100"


def check(subject: Subject) -> Iterator[Finding]:
    """The busiest GPU of trainers and servers; nothing where there is no GPU, or where the layout is wrong already."""
    config, hf_config = subject.config, subject.hf_config.value
    is_known = hf_config is not None and hf_config.model_type in ARCHITECTURES
    if hf_config is None or not is_known or not subject.world.has_gpu:
        return
    parallel = config.parallel
    if not is_layout(hf_config, parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size):
        return
    if any(config.world_problems(subject.world.size, has_gpu=True)):
        return
    servers = Attempt.at(lambda: servers_in(config, _allocation(subject.world)))
    if servers.error is not None:  # the sglang section says it
        return
    gpu_bytes, whose = _gpu()
    shape = ModelShape.of(hf_config, ARCHITECTURES[hf_config.model_type])
    layout = replace(Layout.of(config, subject.world.size), servers=servers.value)
    plan = plan_memory(config, shape, layout, gpu_bytes=gpu_bytes)
    needed, largest = max(plan.total_bytes, plan.server_parts_needed), max(plan.parts, key=plan.parts.__getitem__)
    told = (
        f"{needed / GIB:.1f} GiB planned on the busiest GPU, most of it for {largest}; {whose} has "
        f"{gpu_bytes / GIB:.1f}, of which {HEADROOM:.0%} are left to fragmentation"
    )
    if plan.fits(gpu_bytes):
        yield Finding.note("model", told)
    else:
        yield Finding.warning(
            "model", told, "see faster layouts and what fits: python -m megatron_sdsearch plan CONFIG"
        )


def _allocation(world: World) -> Allocation:
    return Allocation(
        num_nodes=world.num_nodes + world.num_sglang_nodes,
        gpus_per_node=world.gpus_per_node,
        num_sglang_nodes=world.num_sglang_nodes,
    )


def _gpu() -> tuple[int, str]:
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory, "this machine's"
    return HARDWARE[_ASSUMED].memory_bytes, f"an assumed {_ASSUMED.upper()}"
