"""From a configuration and a machine to its plan: what the command line, and ``check``, call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from megatron_sdsearch.config import RunConfig
from megatron_sdsearch.errors import ConfigError
from megatron_sdsearch.plan.hardware import Efficiency, hardware_of
from megatron_sdsearch.plan.layout import Layout, servers_of
from megatron_sdsearch.plan.memory import MemoryPlan, plan_memory
from megatron_sdsearch.plan.report import RunPlan
from megatron_sdsearch.plan.search import IsLegal, Planner
from megatron_sdsearch.plan.shape import ModelShape
from megatron_sdsearch.plan.timing import Machine
from megatron_sdsearch.plan.workload import DEFAULT_FILL, Workload

_FIELD = "--assume"


def num_trainers(config: RunConfig, num_gpus: int) -> int:
    """Ranks of torchrun on ``num_gpus`` GPUs: those that no server stands on.

    Raises:
        ConfigError: the servers take all of them.
    """
    servers = servers_of(config)
    if servers is None or servers.place == "attached":
        return num_gpus
    if servers.place == "colocated":
        if servers.num_gpus > num_gpus:
            told = f"{servers.num} servers of {servers.tensor} GPUs share {num_gpus}"
            raise ConfigError("rollout.sglang.num_servers", told, "lower it, or rollout.sglang.tensor")
        return num_gpus
    if servers.num_gpus >= num_gpus:
        told = f"{servers.num} servers of {servers.tensor} GPUs leave none of {num_gpus} to the trainer"
        raise ConfigError(
            "rollout.sglang.num_servers", told, "lower it, or set rollout.sglang.colocated=true, or take more GPUs"
        )
    return num_gpus - servers.num_gpus


def plan_run(
    config: RunConfig,
    shape: ModelShape,
    *,
    nodes: int,
    gpus_per_node: int,
    hardware: str,
    is_legal: IsLegal,
    assumptions: Sequence[str] = (),
) -> RunPlan:
    """Memory, time and better layouts.

    Args:
        config: of the run.
        shape: of its model.
        nodes: of the allocation.
        gpus_per_node: of each.
        hardware: a name of ``hardware.HARDWARE``.
        is_legal: sizes that may be suggested.
        assumptions: ``name=value``, see ``assume``.

    Raises:
        ConfigError: the layout does not fit the allocation, or a name or a value is unknown.
    """
    workload, efficiency = assume(config, assumptions)
    machine = Machine(gpu=hardware_of(hardware), gpus_per_node=gpus_per_node, efficiency=efficiency)
    trainers = num_trainers(config, nodes * gpus_per_node)
    config.check_world(trainers, has_gpu=True)
    planner = Planner(
        config=config,
        shape=shape,
        workload=workload,
        machine=machine,
        num_gpus=nodes * gpus_per_node,
        is_legal=is_legal,
    )
    return RunPlan.of(planner, Layout.of(config, trainers))


def plan_on_cpu(
    config: RunConfig, shape: ModelShape, *, num_processes: int, assumptions: Sequence[str] = ()
) -> MemoryPlan:
    """Memory of one process without a GPU; time is not planned there.

    Raises:
        ConfigError: see ``plan_run``.
    """
    config.check_world(num_processes, has_gpu=False)
    workload, _ = assume(config, assumptions)
    return plan_memory(config, shape, Layout.of(config, num_processes), workload=workload)


def assume(config: RunConfig, assumptions: Sequence[str]) -> tuple[Workload, Efficiency]:
    """Lengths and efficiencies: the defaults, and what ``name=value`` puts in their place.

    ``fill`` fills every budget of the configuration to another share than the default; the other names are fields of
    ``Workload`` and ``Efficiency``.

    Raises:
        ConfigError: a name is unknown, or a value is no number, or below 0.
    """
    given = dict(_parse(text) for text in assumptions)
    fill = given.pop("fill", DEFAULT_FILL)
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
