"""Whether the run fits into its GPUs, by the formulas of ``plan``."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megatron_sdsearch.allocation import allocation_problems, assign_roles
from megatron_sdsearch.check.findings import Finding
from megatron_sdsearch.check.subject import Subject
from megatron_sdsearch.model.hf_config import hf_config_problems
from megatron_sdsearch.model.shape import ModelShape, layout_problems
from megatron_sdsearch.plan.memory import GIB, HEADROOM, busiest_rank, plan_memory
from megatron_sdsearch.plan.roofline import HARDWARE
from megatron_sdsearch.plan.workload import Layout

_ASSUMED = "h100"


def check(subject: Subject) -> Iterator[Finding]:
    """The busiest GPU of trainers and servers; nothing where there is no GPU, or where the layout is wrong already."""
    config, hf_config, allocation = subject.config, subject.hf_config.value, subject.world.allocation
    if hf_config is None or not subject.world.has_gpu or hf_config_problems(hf_config):
        return
    shape = ModelShape.from_hf_config(hf_config)
    if layout_problems(shape, config.parallel) or allocation_problems(config, allocation):
        return  # the layout section lists them
    gpu_bytes, whose = _gpu()
    layout = Layout.from_config(config, assign_roles(config, allocation))
    plan = busiest_rank(plan_memory(config, shape, layout, gpu_bytes=gpu_bytes))
    needed, largest = max(plan.total_bytes, plan.server_parts_needed), max(plan.parts, key=plan.parts.__getitem__)
    told = (
        f"{needed / GIB:.1f} GiB planned on the busiest GPU, most of it for {largest}; {whose} has "
        f"{gpu_bytes / GIB:.1f}, of which {HEADROOM:.0%} are left to fragmentation"
    )
    if plan.why_not(gpu_bytes) is None:
        yield Finding.note("model", told)
    else:
        yield Finding.warning(
            "model", told, "see faster layouts and what fits: python -m megatron_sdsearch plan CONFIG"
        )


def _gpu() -> tuple[int, str]:
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory, "this machine's"
    return HARDWARE[_ASSUMED].memory_bytes, f"an assumed {_ASSUMED.upper()}"
