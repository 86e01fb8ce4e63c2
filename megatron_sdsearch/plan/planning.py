"""From a configuration and a machine to its plan: what the command line, and ``check``, call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any

from megatron_sdsearch.config import RunConfig, world_problems
from megatron_sdsearch.errors import ConfigError, raise_problems
from megatron_sdsearch.model.hf_config import ARCHITECTURES, check_layout, is_layout, load_hf_config
from megatron_sdsearch.plan.allocation import Allocation, check_sglang_nodes, servers_in
from megatron_sdsearch.plan.hardware import Efficiency, hardware_of
from megatron_sdsearch.plan.layout import Layout, servers_of
from megatron_sdsearch.plan.memory import MemoryPlan, plan_memory
from megatron_sdsearch.plan.report import ProcessPlan, RunPlan
from megatron_sdsearch.plan.search import IsLegal, Planner
from megatron_sdsearch.plan.shape import ModelShape
from megatron_sdsearch.plan.timing import Machine
from megatron_sdsearch.plan.workload import DEFAULT_FILL, Workload

_FIELD = "--assume"


def plan_config(
    config: RunConfig, allocation: Allocation, hardware: str | None = None, assumptions: Sequence[str] = ()
) -> RunPlan | ProcessPlan:
    """What the command line prints; of the model's folder config.json is read.

    Args:
        config: of the run.
        allocation: nodes and GPUs; without GPUs, processes.
        hardware: a name of ``hardware.HARDWARE``, or ``cpu``; by default what ``model.dtype`` is for, as in ``check``.
        assumptions: ``name=value``, see ``assume``.

    Raises:
        ConfigError: the model is not supported, or see ``plan_run``.
    """
    hf_config = load_hf_config(config.model.hf_dir)
    check_layout(hf_config, config.parallel)
    shape = ModelShape.of(hf_config, ARCHITECTURES[hf_config.model_type])
    if hardware is None:
        hardware = "cpu" if config.model.dtype == "float32" else "h100"
    if hardware == "cpu":
        return ProcessPlan(memory=plan_on_cpu(config, shape, allocation, assumptions=assumptions))
    is_legal = partial(is_layout, hf_config)
    return plan_run(config, shape, allocation, hardware=hardware, is_legal=is_legal, assumptions=assumptions)


def plan_run(
    config: RunConfig,
    shape: ModelShape,
    allocation: Allocation,
    *,
    hardware: str,
    is_legal: IsLegal,
    assumptions: Sequence[str] = (),
) -> RunPlan:
    """Memory, time and better layouts.

    Args:
        config: of the run.
        shape: of its model.
        allocation: nodes and GPUs.
        hardware: a name of ``hardware.HARDWARE``.
        is_legal: sizes that may be suggested.
        assumptions: ``name=value``, see ``assume``.

    Raises:
        ConfigError: the layout does not fit the allocation, or a name or a value is unknown.
    """
    workload, efficiency = assume(config, assumptions)
    machine = Machine(gpu=hardware_of(hardware), gpus_per_node=allocation.gpus_per_node, efficiency=efficiency)
    servers = servers_in(config, allocation)
    trainers = allocation.num_trainers(servers)
    raise_problems(world_problems(config, trainers, has_gpu=True))
    planner = Planner(
        config=config,
        shape=shape,
        workload=workload,
        machine=machine,
        allocation=allocation,
        is_legal=is_legal,
    )
    return RunPlan.of(planner, replace(Layout.of(config, trainers), servers=servers))


def plan_on_cpu(
    config: RunConfig, shape: ModelShape, allocation: Allocation, *, assumptions: Sequence[str] = ()
) -> MemoryPlan:
    """Memory of one process without a GPU; time is not planned there. Servers take no trainer's place.

    Raises:
        ConfigError: see ``plan_run``.
    """
    check_sglang_nodes(servers_of(config), allocation)
    processes = (allocation.num_nodes - allocation.num_sglang_nodes) * allocation.gpus_per_node
    raise_problems(world_problems(config, processes, has_gpu=False))
    workload, _ = assume(config, assumptions)
    return plan_memory(config, shape, Layout.of(config, processes), workload=workload)


def assume(config: RunConfig, assumptions: Sequence[str]) -> tuple[Workload, Efficiency]:
    """Lengths and efficiencies: the defaults, and what ``name=value`` puts in their place.

    ``fill`` fills every budget of the configuration to another share than the default; the other names are fields of
    ``Workload`` and ``Efficiency``.

    Raises:
        ConfigError: a name is unknown, or a value is no number, or below 0.
    """
    given = dict(_parse(text) for text in assumptions)
    fill = given.pop("fill", DEFAULT_FILL)
    if fill > 1:
        raise ConfigError(_FIELD, f"'fill={fill:g}' is out of range", "give a share of the budgets, at most 1")
    of_workload, of_efficiency = _names(Workload), _names(Efficiency)
    for name in given:
        if name not in of_workload | of_efficiency:
            known = ", ".join(sorted({"fill", *of_workload, *of_efficiency}))
            raise ConfigError(_FIELD, f"{name!r} is not known", f"use one of {known}")
    workload = replace(Workload.of(config, fill=fill), **{k: v for k, v in given.items() if k in of_workload})
    efficiency = replace(Efficiency(), **{k: v for k, v in given.items() if k in of_efficiency})
    return workload.within(config.rollout.max_total_tokens), efficiency


def _names(record: type[Any]) -> set[str]:
    return {field.name for field in fields(record)}


def _parse(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        number = float(value)
    except ValueError as error:
        raise ConfigError(_FIELD, f"{text!r} is not name=number", "write e.g. response_tokens=200") from error
    is_possible = number > 0 if name in _names(Efficiency) else number >= 0
    if not is_possible or number == float("inf"):
        raise ConfigError(_FIELD, f"{text!r} is out of range", "give a positive number")
    return name, number
