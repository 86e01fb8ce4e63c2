"""Seconds of one step by phase, from a roofline: FLOPs and bytes over assumed shares of the peaks of GPUs and links.

UNCALIBRATED: no share was ever compared with a run on GPUs, and nothing is assumed to overlap. Good for comparing
layouts; a run's own metrics, which name the same phases, are the measure of its hours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_sdsearch.config import RunConfig
from megatron_sdsearch.model.shape import ModelShape
from megatron_sdsearch.plan.workload import Assumptions, Layout, StepLoad, largest_microbatch


@dataclass(frozen=True, slots=True)
class Gpu:
    """One model of GPU, by its vendor's figures (docs/planning.md names the sources).

    Attributes:
        name: as the command line has it.
        tflops: dense bf16, peak.
        memory_bytes: as CUDA reports them, rounded down.
        hbm_gbs: GB/s of its memory, peak.
        nvlink_gbs: GB/s that one GPU sends within the node, one direction.
        network_gbs: GB/s that one GPU sends to other nodes, one direction.
    """

    name: str
    tflops: float
    memory_bytes: int
    hbm_gbs: float
    nvlink_gbs: float
    network_gbs: float

    @property
    def is_cpu(self) -> bool:
        """No GPU: memory of processes is planned, and no time."""
        return self.name == "cpu"


HARDWARE = {
    "h100": Gpu("h100", 989, 79 * 2**30, 3350, 450, 50),
    "h800": Gpu("h800", 989, 79 * 2**30, 3350, 200, 50),
    "h200": Gpu("h200", 989, 139 * 2**30, 4800, 450, 50),
    "a100": Gpu("a100", 312, 79 * 2**30, 2039, 300, 25),
    "cpu": Gpu("cpu", 0, 0, 0, 0, 0),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimator:
    """Estimates the seconds of steps of one run on one kind of machine.

    Attributes:
        config: of the run, in bf16.
        shape: of its model.
        assumed: lengths of its trajectories, and what is reached of the peaks.
        step: counts that follow from the lengths.
        gpu: of all nodes.
        gpus_per_node: links within are NVLink, between nodes the network.
    """

    config: RunConfig
    shape: ModelShape
    assumed: Assumptions
    step: StepLoad
    gpu: Gpu
    gpus_per_node: int

    def phases(self, layout: Layout, kv_tokens: int) -> dict[str, float]:
        """Seconds by phase of a step that distils, without publishing, evaluation and checkpoint.

        Args:
            layout: of the ranks.
            kv_tokens: that the cache of one SGLang server holds.
        """
        step, phases = self.step, dict[str, float]()
        if self.config.is_rl:
            phases["rollout"] = self._rollout(layout, kv_tokens)
        reading = self._pass(layout, step.student_tokens, step.generated_tokens)
        if step.has_reference:
            phases["reference"] = reading
        if step.num_minibatches > 1:
            phases["old"] = reading
        if step.teacher_tokens:
            phases["teacher"] = self._pass(layout, step.teacher_tokens, step.distilled_tokens)
        num_head = 3 + (layout.max_tokens > layout.chunk_rows)  # logits that come in chunks are projected twice
        update = self._pass(layout, step.student_tokens, step.generated_tokens, 3 + layout.recompute, num_head)
        gradients = 4 * self.shape.stage_params(0, tp=layout.tp, pp=layout.pp) * 2 * (layout.dp - 1) / layout.dp
        phases["update"] = update + step.num_minibatches * gradients / self._link(layout.num_ranks // layout.pp)
        return phases

    def _pass(self, layout: Layout, tokens: float, rows: float, num: int = 1, num_head: int = 1) -> float:
        """``num`` forward passes over ``tokens`` of each trajectory, and ``num_head`` of the head over ``rows``.

        Two FLOPs per weight and token; a backward pass counts as two in FLOPs, and as one on links. The last stage has
        the head besides its layers, and sets the pace of all. Sequence parallel moves as much as the two all-reduces of
        a layer.
        """
        shape, tp, pp, num_trajectories = self.shape, layout.tp, layout.pp, self.step.num_trajectories
        layers = num * tokens * shape.num_layers * shape.layer_matrix_params / pp
        flops = 2 * num_trajectories * (layers + num_head * rows * shape.vocab * shape.hidden)
        compute = flops / (tp * layout.dp) / (self.gpu.tflops * 1e12 * self.assumed.training)
        bubble = (pp - 1) / largest_microbatch(self.config, layout, self.step).num_microbatches
        all_reduces = 2 * max(1, num - 1) * (shape.num_layers // pp)
        sent = all_reduces * num_trajectories * tokens / layout.dp * shape.hidden * 2 * 2 * (tp - 1) / tp
        return compute * (1 + bubble) + sent / self._link(tp)

    def _rollout(self, layout: Layout, kv_tokens: int) -> float:
        """Waves of as many trajectories as cache and open requests allow; each token reads weights and half the cache.

        The last wave takes as long as the longest trajectory.
        """
        step, assumed, servers = self.step, self.assumed, layout.servers
        num_engines, tp = (servers.num, servers.tp_size) if servers is not None else (layout.num_ranks, 1)
        per_engine = at_once = step.num_trajectories / num_engines
        if servers is not None:
            by_requests = self.config.rollout.sglang.max_concurrency * layout.num_ranks
            at_once = min(per_engine, by_requests, max(1.0, kv_tokens / step.student_tokens))
        waves = per_engine / at_once + assumed.tail - 1
        cache = at_once * step.student_tokens / 2 * self.shape.kv_bytes_per_token(2, tp)
        read_s = (2 * self.shape.num_params / tp + cache) / (self.gpu.hbm_gbs * 1e9 * assumed.memory)
        searches_s = math.ceil(waves) * assumed.searches * assumed.search_s
        return waves * step.generated_tokens * (read_s + assumed.decode_step_s) + searches_s

    def _link(self, span: int) -> float:
        """Bytes per second and GPU in a group whose members are within ``span`` consecutive ranks."""
        gbs = self.gpu.nvlink_gbs if span <= self.gpus_per_node else self.gpu.network_gbs
        return gbs * 1e9 * self.assumed.links
