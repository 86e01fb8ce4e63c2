"""Estimate seconds of a step by phase from a roofline: FLOPs and bytes over assumed shares of peak rates.

UNCALIBRATED: no share was compared with a run on GPUs, and phases do not overlap. Use it to compare layouts; to predict
hours, use the metrics of a run, which name the same phases.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_sdsearch.config import RunConfig
from megatron_sdsearch.model.shape import ModelShape
from megatron_sdsearch.plan.workload import Assumptions, Layout, StepLoad, largest_microbatch


@dataclass(frozen=True, slots=True)
class Gpu:
    """A model of GPU, with its vendor's figures (sources: docs/planning.md).

    Attributes:
        name: name on the command line.
        tflops: peak dense bf16 TFLOPS.
        memory_bytes: as CUDA reports them, rounded down.
        hbm_gbs: peak memory bandwidth in GB/s.
        nvlink_gbs: GB/s from one GPU within the node, one direction.
        network_gbs: GB/s from one GPU to other nodes, one direction.
    """

    name: str
    tflops: float
    memory_bytes: int
    hbm_gbs: float
    nvlink_gbs: float
    network_gbs: float

    @property
    def is_cpu(self) -> bool:
        """True for the entry without a GPU: only memory is planned, not time."""
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
    """Estimates seconds per step of one run on one type of GPU.

    Attributes:
        config: of the run, in bf16.
        shape: of its model.
        assumed: lengths of its trajectories, and shares of the peak rates.
        step: work of a step with these lengths.
        gpu: type of all GPUs.
        gpus_per_node: GPUs linked by NVLink; others are linked by the network.
    """

    config: RunConfig
    shape: ModelShape
    assumed: Assumptions
    step: StepLoad
    gpu: Gpu
    gpus_per_node: int

    def phases(self, layout: Layout, kv_tokens: int) -> dict[str, float]:
        """Estimate seconds by phase of a step that distils, without publishing, evaluation and checkpoint.

        Args:
            layout: of the ranks.
            kv_tokens: tokens in the cache of one SGLang server.
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
        num_head = 3 + (layout.max_tokens > layout.chunk_rows)  # chunked logits are projected twice
        update = self._pass(layout, step.student_tokens, step.generated_tokens, 3 + layout.recompute, num_head)
        gradients = 4 * self.shape.stage_params(0, tp=layout.tp, pp=layout.pp) * 2 * (layout.dp - 1) / layout.dp
        phases["update"] = update + step.num_minibatches * gradients / self._link(layout.num_ranks // layout.pp)
        return phases

    def _pass(self, layout: Layout, tokens: float, rows: float, num: int = 1, num_head: int = 1) -> float:
        """Estimate ``num`` passes over ``tokens`` of each trajectory, and ``num_head`` of the head over ``rows``.

        Two FLOPs per weight and token; a backward pass counts as two passes in FLOPs, and as one on links. The last
        stage also has the head, and limits all others. Sequence parallel sends as much as a layer's two all-reduces.
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
        """Estimate waves of as many trajectories as cache and open requests allow.

        Each token reads the weights and half the cache. The last wave lasts as long as the longest trajectory.
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
        """Return bytes per second and GPU in a group within ``span`` consecutive ranks."""
        gbs = self.gpu.nvlink_gbs if span <= self.gpus_per_node else self.gpu.network_gbs
        return gbs * 1e9 * self.assumed.links
