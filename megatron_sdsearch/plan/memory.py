"""Memory of the busiest rank: what always stands there, and what comes on top at each moment of a step.

Exact: weights, gradients, optimizer state. Formulas that tests hold to torch's allocator on CPU: activations and loss.
Stated, never measured: what CUDA and NCCL take, and transformer-engine's activations (``activations.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_sdsearch.config import RunConfig
from megatron_sdsearch.plan import loss_memory
from megatron_sdsearch.plan.activations import LayerBytes, LayerSpec
from megatron_sdsearch.plan.layout import Layout, MicrobatchLoad
from megatron_sdsearch.plan.loss_memory import HeadSize
from megatron_sdsearch.plan.shape import ModelShape
from megatron_sdsearch.plan.workload import StepLoad, Workload

GIB = 2**30
FRAMEWORK_BYTES = 3 * GIB
"""CUDA context, cuBLAS workspaces and NCCL buffers of one trainer process. An assumption: no GPU was at hand."""
SERVER_FRAMEWORK_BYTES = 3 * GIB
"""The same of an SGLang process, with its CUDA graphs; released memory does not include it. An assumption, too."""
HEADROOM = 0.08
"""Share of a GPU that is left to the allocator's fragmentation."""
_FP32 = 4
Parts = Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes on one GPU.

    Attributes:
        stage: pipeline stage of the busiest rank, which all parts speak of.
        standing: there from the first step to the last.
        moments: what each moment of a step adds.
        server: GPUs of servers that share with no trainer; empty without such.
        kv_tokens: tokens that the cache of one SGLang server holds; 0 without one.
        server_parts_needed: least bytes of ``server`` with which one trajectory can be sampled.
    """

    stage: int
    standing: Parts
    moments: Mapping[str, Parts]
    server: Parts
    kv_tokens: int
    server_parts_needed: int

    @property
    def peak_moment(self) -> str:
        """The one that needs most."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def parts(self) -> Parts:
        """Everything that exists at the peak."""
        return {**self.standing, **self.moments[self.peak_moment]}

    @property
    def total_bytes(self) -> int:
        """At the peak, on a trainer's GPU."""
        return sum(self.parts.values())

    def fits(self, gpu_bytes: int, headroom: float = HEADROOM) -> bool:
        """Whether trainer and server both leave ``headroom`` of their GPUs."""
        return max(self.total_bytes, self.server_parts_needed) <= gpu_bytes * (1 - headroom)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rank:
    """Everything that a formula below reads."""

    config: RunConfig
    shape: ModelShape
    layout: Layout
    load: MicrobatchLoad
    stage: int
    element: int
    spec: LayerSpec

    @property
    def is_last(self) -> bool:
        return self.stage == self.layout.pp - 1

    @property
    def num_layers(self) -> int:
        return self.shape.num_layers // self.layout.pp

    @property
    def num_params(self) -> int:
        return self.shape.stage_params(self.stage, tp=self.layout.tp, pp=self.layout.pp)

    @property
    def table_bytes(self) -> int:
        """Embedding or head, the largest tensor, in fp32."""
        return self.shape.vocab_columns(self.layout.tp) * self.shape.hidden * _FP32

    @property
    def head(self) -> HeadSize:
        columns = self.shape.vocab_columns(self.layout.tp)
        return HeadSize(columns=columns, hidden=self.shape.hidden, element=self.element)

    def layer(self, num_tokens: int) -> LayerBytes:
        layout = self.layout
        return LayerBytes.of(
            self.shape, self.spec, num_tokens, tp=layout.tp, sequence=layout.sequence, element=self.element
        )


def plan_memory(
    config: RunConfig,
    shape: ModelShape,
    layout: Layout,
    *,
    load: MicrobatchLoad | None = None,
    workload: Workload | None = None,
    gpu_bytes: int | None = None,
) -> MemoryPlan:
    """What the busiest rank holds.

    Args:
        config: of the run.
        shape: of its model.
        layout: ``Layout.of(config, num_trainers)``, or another to try.
        load: the largest microbatch; by default a full row, every token of which is the policy's.
        workload: assumed lengths, for caches and the share of query tokens.
        gpu_bytes: memory of one GPU, which the caches of SGLang are cut to; None on CPU, where nothing is added for
            CUDA and layers are those of the local spec, as they are with ``model.layer_spec=local``.
    """
    plans = plan_stages(config, shape, layout, load=load, workload=workload, gpu_bytes=gpu_bytes)
    return max(plans, key=lambda plan: plan.total_bytes)


def plan_stages(
    config: RunConfig,
    shape: ModelShape,
    layout: Layout,
    *,
    load: MicrobatchLoad | None = None,
    workload: Workload | None = None,
    gpu_bytes: int | None = None,
) -> list[MemoryPlan]:
    """The same for a rank of every pipeline stage, first to last."""
    workload = workload or Workload.of(config)
    step = StepLoad.of(config, workload)
    load = load or step.largest_microbatch(layout, distills_all=config.objective.distill_positions == "all")
    element = 2 if config.model.dtype == "bfloat16" else _FP32
    spec: LayerSpec = "te" if gpu_bytes is not None and config.model.layer_spec != "local" else "local"
    ranks = [
        _Rank(config=config, shape=shape, layout=layout, load=load, stage=stage, element=element, spec=spec)
        for stage in range(layout.pp)
    ]
    return [_plan_rank(rank, step, gpu_bytes) for rank in ranks]


def _plan_rank(rank: _Rank, step: StepLoad, gpu_bytes: int | None) -> MemoryPlan:
    standing = _standing(rank, step, gpu_bytes is not None)
    moments = {**_update(rank, step), **_readings(rank, step), "optimizer": {"temporaries": 2 * rank.table_bytes}}
    weights, wanted, least = _server_bytes(rank, step)
    servers = rank.layout.servers
    if servers is None:
        return _finish(rank, standing, moments, server={}, cache=0, needed=0)
    if servers.place != "colocated":
        server = {"framework": SERVER_FRAMEWORK_BYTES if gpu_bytes is not None else 0, "server weights": weights}
        needed = sum(server.values()) + least
        room = wanted if gpu_bytes is None else int(gpu_bytes * (1 - HEADROOM)) - sum(server.values())
        cache = max(least, min(wanted, room))
        moments["publish"] = _publish(rank)
        return _finish(rank, standing, moments, server={**server, "KV cache": cache}, cache=cache, needed=needed)
    standing["server framework"] = SERVER_FRAMEWORK_BYTES
    room = int((gpu_bytes or 0) * (1 - HEADROOM)) - sum(standing.values()) - weights
    cache = max(least, min(wanted, room))
    moments["publish"] = {"server weights": weights, **_publish(rank)}
    moments["rollout"] = {"server weights": weights, "KV cache": cache}
    return _finish(rank, standing, moments, server={}, cache=cache, needed=0)


def _finish(
    rank: _Rank, standing: Parts, moments: Mapping[str, Parts], *, server: Parts, cache: int, needed: int
) -> MemoryPlan:
    servers = rank.layout.servers
    return MemoryPlan(
        stage=rank.stage,
        standing={name: size for name, size in standing.items() if size},
        moments=moments,
        server=server,
        kv_tokens=cache // rank.shape.kv_bytes_per_token(rank.element, servers.tensor) if servers is not None else 0,
        server_parts_needed=needed,
    )


def _standing(rank: _Rank, step: StepLoad, on_gpu: bool) -> dict[str, int]:
    layout, params, element = rank.layout, rank.num_params, rank.element
    # Adam's two moments; in bf16 the fp32 weights besides (megatron's Float16OptimizerWithFloat16Params).
    state = params * _FP32 * (3 if element < _FP32 else 2)
    longest = max(rank.load.num_tokens, rank.load.teacher_tokens)
    return {
        "weights": params * element,
        "gradients": params * _FP32,
        "optimizer": -(-state // layout.dp) if layout.distributed_optimizer else state,
        "reference": params * element * step.has_reference,
        "sequence gather buffer": longest * rank.shape.hidden * element * layout.sequence,
        **_embedded(rank, step),
        "framework": FRAMEWORK_BYTES * on_gpu,
    }


def _embedded(rank: _Rank, step: StepLoad) -> dict[str, int]:
    """The embedded engine: a whole model on every rank, and a slot as long as the longest trajectory per trajectory."""
    config = rank.config
    if config.train.mode != "rl" or config.rollout.engine != "embedded":
        return {}
    slots = -(-step.num_trajectories // rank.layout.num_trainers)
    tokens = slots * config.rollout.max_total_tokens
    return {
        "embedded engine": rank.shape.num_params * rank.element,
        "embedded KV cache": tokens * rank.shape.kv_bytes_per_token(rank.element),
    }


def _update(rank: _Rank, step: StepLoad) -> dict[str, dict[str, int]]:
    """Two moments: all activations and the loss; all activations and a layer on its way back."""
    load, layer = rank.load, rank.layer(rank.load.num_tokens)
    # 1F1B: a stage is ahead of its backward pass by the stages behind it.
    in_flight = min(rank.layout.pp - rank.stage, load.num_microbatches)
    kept = layer.boundary if rank.layout.recompute else layer.saved
    activations = in_flight * (rank.num_layers * kept + layer.boundary) + _indices(load)
    recomputed = layer.saved - layer.boundary if rank.layout.recompute else 0
    is_whole = rank.shape.is_tied and rank.layout.pp == 1  # the head's gradient waits for the embedding's
    backward = layer.backward + recomputed + rank.head.weight_bytes * is_whole
    targets = loss_memory.target_bytes(rank.head, load, loss_memory.kept_entries(rank.config.objective)) * rank.is_last
    common = {"activations": activations, "teacher targets": targets}
    moments = {"backward": {**common, "one layer's backward": backward}}
    if rank.is_last:
        final_norm = layer.boundary if rank.spec == "local" else 0  # keeps its normalised input besides
        loss = loss_memory.update_bytes(rank.head, load, rank.layout.chunk_rows, rank.config.objective)
        moments["loss"] = {**common, "activations": activations + final_norm, "logits": loss}
    return moments


def _indices(load: MicrobatchLoad) -> int:
    """Ids and positions (int64), and what is known of each policy row: two int64, three fp32."""
    return 16 * load.num_tokens + 28 * load.policy_rows


def _readings(rank: _Rank, step: StepLoad) -> dict[str, dict[str, int]]:
    """Passes without gradient: the teacher's, and that of reference or old policy.

    Each is at its peak in a layer, or behind the last one at the logits: there no layer holds anything any more.
    """
    load, chunk = rank.load, rank.layout.chunk_rows
    topk = loss_memory.kept_entries(rank.config.objective)
    moments = {}
    if load.teacher_tokens:
        targets = loss_memory.target_bytes(rank.head, load, topk) * rank.is_last
        earlier = targets * (load.num_microbatches - 1) // load.num_microbatches
        logits = loss_memory.teacher_bytes(rank.head, load, chunk, topk) * rank.is_last
        moments["teacher"] = {**_peak_of_pass(rank, load.teacher_tokens, logits), "teacher targets": earlier}
    if step.has_reference or step.num_minibatches > 1:
        logits = loss_memory.reading_bytes(rank.head, load, chunk) * rank.is_last
        moments["reference"] = _peak_of_pass(rank, load.num_tokens, logits)
    return moments


def _peak_of_pass(rank: _Rank, num_tokens: int, logits: int) -> dict[str, int]:
    layer = rank.layer(num_tokens)
    sharded = layer.boundary * rank.layout.sequence  # the hidden states before they are gathered
    before = layer.boundary * (rank.load.num_microbatches > 1)  # the last output is let go when there is a new one
    peak = {"activations": layer.forward} if layer.forward > logits else {"logits": logits + sharded}
    return {name: size + before for name, size in peak.items()}


def _server_bytes(rank: _Rank, step: StepLoad) -> tuple[int, int, int]:
    """On one GPU of a server: weights; cache of all its trajectories at once; cache of the longest one."""
    servers = rank.layout.servers
    if servers is None:
        return 0, 0, 0
    per_token = rank.shape.kv_bytes_per_token(rank.element, servers.tensor)
    concurrent = -(-step.num_trajectories // servers.num)
    wanted = int(concurrent * step.workload.student_tokens * per_token)
    longest = rank.config.longest_rollout.num_tokens * per_token
    return rank.shape.num_params * rank.element // servers.tensor, max(wanted, longest), longest


def _publish(rank: _Rank) -> dict[str, int]:
    """The largest tensor, gathered; two buckets, being filled and under way (``sglang/transports.py``)."""
    sglang = rank.config.rollout.sglang
    whole = rank.shape.vocab * rank.shape.hidden * rank.element
    buckets = 0 if sglang.weight_sync == "disk" else 2 * sglang.weight_bucket_mb * 2**20
    return {"whole tensors": 2 * whole, "weight buckets": buckets}
