"""Seconds of one step by phase, from a roofline: FLOPs, bytes of memory, bytes on links, each over what is reached.

A phase's parts add up: nothing is assumed to overlap, but for the trajectories of a batch with one another. The names
are the loop's own phases (``telemetry``), so that a run's metrics can be laid beside the plan.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_sdsearch.config import RunConfig
from megatron_sdsearch.plan.hardware import Efficiency, Hardware
from megatron_sdsearch.plan.layout import Layout
from megatron_sdsearch.plan.memory import MemoryPlan
from megatron_sdsearch.plan.shape import ModelShape
from megatron_sdsearch.plan.workload import StepLoad

_FP32 = 4
_BF16 = 2
_KERNELS_PER_LAYER = 15  # of a transformers decoder layer: norms, projections, rotation, attention, gated MLP


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Where a run is to run.

    Attributes:
        gpu: each of them.
        gpus_per_node: links inside are NVLink, between nodes the network.
        efficiency: what is reached.
    """

    gpu: Hardware
    gpus_per_node: int
    efficiency: Efficiency

    @property
    def training_flops(self) -> float:
        """Per second and GPU."""
        return self.gpu.tflops * 1e12 * self.efficiency.training

    @property
    def prefill_flops(self) -> float:
        """Per second and GPU."""
        return self.gpu.tflops * 1e12 * self.efficiency.prefill

    @property
    def memory_bytes_s(self) -> float:
        """Per GPU."""
        return self.gpu.hbm_gbs * 1e9 * self.efficiency.memory

    def link_bytes_s(self, span: int) -> float:
        """Per GPU in a group whose members stand within ``span`` consecutive ranks."""
        gbs = self.gpu.nvlink_gbs if span <= self.gpus_per_node else self.gpu.network_gbs
        return gbs * 1e9 * self.efficiency.links


@dataclass(frozen=True, slots=True, kw_only=True)
class TimePlan:
    """Seconds of one step.

    Attributes:
        phases: seconds by the loop's phase, each by what it is spent on.
    """

    phases: Mapping[str, Mapping[str, float]]

    @property
    def step_s(self) -> float:
        """All phases, one after the other."""
        return sum(sum(parts.values()) for parts in self.phases.values())

    def phase_s(self, name: str) -> float:
        """One phase; 0 when it does not occur."""
        return sum(self.phases.get(name, {}).values())


def plan_time(
    config: RunConfig, shape: ModelShape, layout: Layout, step: StepLoad, memory: MemoryPlan, machine: Machine
) -> TimePlan:
    """Of a step in which everything configured happens: with distillation, without evaluation and checkpoint."""
    trainer = _Trainer(shape=shape, layout=layout, step=step, machine=machine)
    students, generated = step.workload.student_tokens, step.workload.generated_tokens
    phases: dict[str, dict[str, float]] = {}
    if config.train.mode == "rl":
        phases["publish"] = _publish(config, shape, layout, machine)
        phases["rollout"] = _rollout(config, shape, layout, step, memory, machine)
    if step.has_reference:
        phases["reference"] = trainer.reading(students, generated)
    if step.num_minibatches > 1:
        phases["old"] = trainer.reading(students, generated)
    if step.is_distilled:
        phases["teacher"] = trainer.teacher()
    phases["update"] = trainer.update(students, generated)
    return TimePlan(phases=phases)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trainer:
    shape: ModelShape
    layout: Layout
    step: StepLoad
    machine: Machine

    def reading(self, tokens: float, rows: float) -> dict[str, float]:
        """A forward pass over all trajectories, logits at ``rows`` of each."""
        return self._passes(tokens, rows, layer_passes=1, head_passes=1)

    def teacher(self) -> dict[str, float]:
        """The same of the teacher, with logits at the distilled tokens: one sequence per trajectory or several."""
        step = self.step
        rows, num_sequences = step.workload.distilled_tokens, step.teacher_sequences
        return self._passes(step.teacher_tokens, rows, layer_passes=1, head_passes=1, num_sequences=num_sequences)

    def update(self, tokens: float, rows: float) -> dict[str, float]:
        """Forward and backward over all trajectories, and the optimizer once per minibatch."""
        is_chunked = self.layout.max_tokens > self.layout.chunk_rows  # then logits are projected twice
        parts = self._passes(tokens, rows, layer_passes=3 + self.layout.recompute, head_passes=3 + is_chunked)
        return {**parts, **self._gradients(), "optimizer": self._optimizer()}

    def _passes(
        self, tokens: float, rows: float, *, layer_passes: int, head_passes: int, num_sequences: float = 1.0
    ) -> dict[str, float]:
        layout, num = self.layout, self.step.num_trajectories
        # The last stage has the head besides its layers, and sets the pace of all.
        flops = layer_passes * self.shape.forward_flops(num * tokens, tokens / num_sequences / 2) / layout.pp
        flops += head_passes * self.shape.head_flops(num * rows)
        compute = flops / (layout.tp * layout.dp) / self.machine.training_flops
        bubble = compute * (layout.pp - 1) / self.step.num_microbatches(layout)
        parts = {"compute": compute, "pipeline bubble": bubble, "tensor parallel": self._tensor(tokens, layer_passes)}
        return {name: seconds for name, seconds in parts.items() if seconds}

    def _tensor(self, tokens: float, layer_passes: int) -> float:
        """Two all-reduces of the hidden states per layer and pass; sequence parallel splits each, and moves as much.

        A backward pass counts as two passes in FLOPs, and as one here.
        """
        layout = self.layout
        if layout.tp == 1:
            return 0.0
        passes = layer_passes if layer_passes == 1 else layer_passes - 1
        row_bytes = self.step.num_trajectories * tokens / layout.dp * self.shape.hidden * _BF16
        ring = 2 * (layout.tp - 1) / layout.tp
        layers = self.shape.num_layers // layout.pp
        return 2 * passes * layers * row_bytes * ring / self.machine.link_bytes_s(layout.tp)

    def _gradients(self) -> dict[str, float]:
        """The fp32 buffer over data-parallel ranks, once per minibatch; nothing overlaps with the backward pass."""
        layout = self.layout
        if layout.dp == 1:
            return {}
        ring = 2 * (layout.dp - 1) / layout.dp
        num_bytes = self._params * _FP32 * ring
        return {
            "gradient reduction": self.step.num_minibatches
            * num_bytes
            / self.machine.link_bytes_s(layout.num_trainers // layout.pp)
        }

    def _optimizer(self) -> float:
        """Reads gradient, weights and two moments in fp32 and writes three of them, and the bf16 weights."""
        touched = self._params * (7 * _FP32 + _BF16)
        shards = self.layout.dp if self.layout.distributed_optimizer else 1
        return self.step.num_minibatches * touched / shards / self.machine.memory_bytes_s

    @property
    def _params(self) -> int:
        return self.shape.stage_params(0, tp=self.layout.tp, pp=self.layout.pp)


def _publish(config: RunConfig, shape: ModelShape, layout: Layout, machine: Machine) -> dict[str, float]:
    whole, efficiency = shape.num_params * _BF16, machine.efficiency
    # Stages of a pipeline stand as far apart as they can.
    span = layout.tp if layout.pp == 1 else layout.num_trainers
    gather = whole * (1 - 1 / (layout.tp * layout.pp)) / machine.link_bytes_s(span)
    if layout.servers is None:
        return {"gather": gather, "copy": 2 * whole / machine.memory_bytes_s}
    if config.rollout.sglang.weight_sync == "disk":
        # Written once; all servers read it through one file system.
        return {"gather": gather, "disk": whole * (1 + layout.servers.num) / (efficiency.disk_gbs * 1e9)}
    if config.rollout.sglang.weight_sync == "tensor":
        # Base64 makes four bytes of three; each rank of each server gets a copy from the one rank that sends.
        return {"gather": gather, "http": whole * 4 / 3 * layout.servers.num_gpus / (efficiency.http_gbs * 1e9)}
    span = layout.num_gpus if layout.servers.place != "attached" else machine.gpus_per_node + 1
    return {"gather": gather, "broadcast": whole / machine.link_bytes_s(span)}


def _rollout(
    config: RunConfig, shape: ModelShape, layout: Layout, step: StepLoad, memory: MemoryPlan, machine: Machine
) -> dict[str, float]:
    """Trajectories in waves: as many at one time as cache and open requests allow."""
    workload, efficiency, servers = step.workload, machine.efficiency, layout.servers
    num_engines = servers.num if servers is not None else layout.num_trainers
    tensor = servers.tensor if servers is not None else 1
    per_engine = step.num_trajectories / num_engines
    at_once = per_engine
    if servers is not None:
        by_cache = max(1.0, memory.kv_tokens / workload.student_tokens)
        at_once = min(per_engine, by_cache, config.rollout.sglang.max_concurrency * layout.num_trainers)
    waves = per_engine / at_once + efficiency.tail - 1
    kv = shape.kv_bytes_per_token(_BF16, tensor)
    read = shape.num_params * _BF16 / tensor + at_once * workload.student_tokens / 2 * kv
    flops = at_once * 2 * shape.num_params / tensor
    roofline = max(read / machine.memory_bytes_s, flops / machine.prefill_flops)
    # Two all-reduces per layer, each too small to be bound by anything but its start.
    overhead = efficiency.decode_step_s + 2 * shape.num_layers * efficiency.all_reduce_s * (tensor > 1)
    if servers is None:
        overhead = shape.num_layers * _KERNELS_PER_LAYER * efficiency.embedded_kernel_s
    # All siblings of a group share the prompt's cache.
    fresh = workload.prompt_tokens / config.rollout.group_size + workload.observed_tokens
    prefill = shape.forward_flops(per_engine * fresh, workload.student_tokens / 2) / tensor / machine.prefill_flops
    return {
        "decoding": waves * workload.generated_tokens * roofline,
        "decoding overhead": waves * workload.generated_tokens * overhead,
        "prefill": prefill,
        "searches": math.ceil(waves) * workload.searches * workload.search_s,
    }
