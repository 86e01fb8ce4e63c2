"""Plan the memory of the busiest rank: a constant part, and the additions at each moment of a step.

Exact: weights, gradients, optimizer state. Tested against torch's allocator on CPU: activations and loss. Assumed and
never measured: CUDA and NCCL, and transformer-engine's activations (``activations.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_sdsearch.config import RunConfig
from megatron_sdsearch.model.shape import ModelShape
from megatron_sdsearch.plan import activations
from megatron_sdsearch.plan.activations import HeadSize, LayerBytes, LayerSpec, kept_entries
from megatron_sdsearch.plan.workload import Layout, MicrobatchLoad, StepLoad, assume, largest_microbatch, step_load

GIB = 2**30
# CUDA context, cuBLAS workspaces and NCCL buffers of one trainer process. Assumed, never measured.
FRAMEWORK_BYTES = 3 * GIB
# The same of an SGLang process, with its CUDA graphs; not among the memory that it releases. Assumed as well.
SERVER_FRAMEWORK_BYTES = 3 * GIB
HEADROOM = 0.08  # share of a GPU reserved for the allocator's fragmentation
_FP32 = 4
Parts = Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes on one GPU.

    Attributes:
        stage: pipeline stage of the rank that all parts belong to.
        standing: parts that exist during the whole run.
        moments: parts that each moment of a step adds.
        server: parts on a GPU that only servers use; empty if there is none.
        kv_tokens: tokens in the cache of one SGLang server; 0 without one.
        server_parts_needed: least bytes of ``server`` that can sample one trajectory.
    """

    stage: int
    standing: Parts
    moments: Mapping[str, Parts]
    server: Parts
    kv_tokens: int
    server_parts_needed: int

    @property
    def peak_moment(self) -> str:
        """Moment with the most bytes."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def parts(self) -> Parts:
        """All parts that exist at the peak."""
        return {**self.standing, **self.moments[self.peak_moment]}

    @property
    def total_bytes(self) -> int:
        """Bytes at the peak, on a rank's GPU."""
        return sum(self.parts.values())

    def why_not(self, gpu_bytes: int) -> str | None:
        """Explain, with the largest parts, if rank or server exceed a GPU less ``HEADROOM``; None if both fit."""
        limit, total = gpu_bytes * (1 - HEADROOM), readable_size(gpu_bytes)
        usable = f"{readable_size(limit)} of the GPU's {total} are usable"
        if self.server_parts_needed > limit:
            return f"a server needs {readable_size(self.server_parts_needed)} for one trajectory, but {usable}"
        if self.total_bytes <= limit:
            return None
        largest = sorted(self.parts.items(), key=lambda part: -part[1])[:3]
        parts = ", ".join(f"{name} {readable_size(size)}" for name, size in largest)
        return f"{readable_size(self.total_bytes)} at {self.peak_moment!r}, but {usable}; largest: {parts}"


def readable_size(num_bytes: float) -> str:
    """Format bytes for people, in GiB as CUDA counts, or in MiB if few."""
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB / 10 else f"{num_bytes / 2**20:.1f} MiB"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rank:
    """Inputs of the formulas below."""

    config: RunConfig
    shape: ModelShape
    layout: Layout
    step: StepLoad
    load: MicrobatchLoad
    stage: int
    element: int
    spec: LayerSpec
    head: HeadSize
    num_params: int

    @property
    def is_last(self) -> bool:
        return self.stage == self.layout.pp - 1

    def layer(self, num_tokens: int) -> LayerBytes:
        layout = self.layout
        return activations.layer_bytes(
            self.shape, self.spec, num_tokens, tp=layout.tp, sequence=layout.sequence, element=self.element
        )


def plan_memory(
    config: RunConfig,
    shape: ModelShape,
    layout: Layout,
    *,
    step: StepLoad | None = None,
    load: MicrobatchLoad | None = None,
    gpu_bytes: int | None = None,
) -> list[MemoryPlan]:
    """Plan the memory of one rank per pipeline stage; ``busiest_rank`` picks the stage that counts.

    Args:
        config: of the run.
        shape: of its model.
        layout: the configured or another one.
        step: work of a step; by default that of the assumed mean lengths.
        load: the largest microbatch; by default a full row of the policy's tokens.
        gpu_bytes: memory of one GPU, to which SGLang's caches are limited; None on CPU, where nothing is added for CUDA
            and layers have the local spec.
    """
    step = step or step_load(config, assume(config))
    element = 2 if config.model.dtype == "bfloat16" else _FP32
    ranks = [
        _Rank(
            config=config,
            shape=shape,
            layout=layout,
            step=step,
            load=load or largest_microbatch(config, layout, step),
            stage=stage,
            element=element,
            spec="te" if gpu_bytes is not None and config.model.layer_spec != "local" else "local",
            head=HeadSize(columns=shape.vocab_columns(layout.tp), hidden=shape.hidden, element=element),
            num_params=shape.stage_params(stage, tp=layout.tp, pp=layout.pp),
        )
        for stage in range(layout.pp)
    ]
    return [_plan_rank(rank, gpu_bytes) for rank in ranks]


def busiest_rank(plans: list[MemoryPlan]) -> MemoryPlan:
    """Return the plan of the stage with the most bytes."""
    return max(plans, key=lambda plan: plan.total_bytes)


def _plan_rank(rank: _Rank, gpu_bytes: int | None) -> MemoryPlan:
    """Plan the trainer, then the servers, on GPUs of their own or on what the trainer leaves."""
    standing = _standing(rank, on_gpu=gpu_bytes is not None)
    table = rank.head.columns * rank.head.hidden * _FP32  # embedding or head, the largest tensor
    moments = {**_update(rank), **_passes(rank), "optimizer": {"temporaries": 2 * table}}
    servers, server, needed, kv_tokens = rank.layout.servers, dict[str, int](), 0, 0
    if servers is not None:
        framework = SERVER_FRAMEWORK_BYTES if gpu_bytes is not None else 0
        weights = rank.shape.num_params * rank.element // servers.tp_size
        per_token = rank.shape.kv_bytes_per_token(rank.element, servers.tp_size)
        longest = rank.config.longest_rollout.num_tokens * per_token
        concurrent = -(-rank.step.num_trajectories // servers.num)
        wanted = max(longest, int(concurrent * rank.step.student_tokens * per_token))
        moments["publish"] = _publish(rank)
        taken = framework + weights
        if servers.placement == "colocated":
            standing["server framework"] = framework
            taken = sum(standing.values()) + weights
            moments["publish"] |= {"server weights": weights}
        room = int(gpu_bytes * (1 - HEADROOM)) - taken if gpu_bytes is not None else wanted
        cache = max(longest, min(wanted, room))
        kv_tokens = cache // per_token
        if servers.placement == "colocated":
            moments["rollout"] = {"server weights": weights, "KV cache": cache}
        else:
            server = {"framework": framework, "server weights": weights, "KV cache": cache}
            needed = taken + longest
    return MemoryPlan(
        stage=rank.stage,
        standing={name: size for name, size in standing.items() if size},
        moments=moments,
        server=server,
        kv_tokens=kv_tokens,
        server_parts_needed=needed,
    )


def _standing(rank: _Rank, *, on_gpu: bool) -> dict[str, int]:
    config, layout, params, element = rank.config, rank.layout, rank.num_params, rank.element
    # Adam's two moments; in bf16 also fp32 weights (megatron's Float16OptimizerWithFloat16Params).
    state = params * _FP32 * (3 if element < _FP32 else 2)
    standing = {
        "weights": params * element,
        "gradients": params * _FP32,
        "optimizer": -(-state // layout.dp) if layout.distributed_optimizer else state,
        "reference": params * element * rank.step.has_reference,
        "sequence gather buffer": (
            max(rank.load.num_tokens, rank.load.teacher_tokens) * rank.shape.hidden * element * layout.sequence
        ),
        "framework": FRAMEWORK_BYTES * on_gpu,
    }
    if config.is_rl and config.rollout.engine == "embedded":
        # A whole model on every rank, and a slot of maximal length for each trajectory.
        tokens = -(-rank.step.num_trajectories // layout.num_ranks) * config.longest_rollout.num_tokens
        standing["embedded engine"] = rank.shape.num_params * element
        standing["embedded KV cache"] = tokens * rank.shape.kv_bytes_per_token(element)
    return standing


def _update(rank: _Rank) -> dict[str, dict[str, int]]:
    """Plan two moments: all activations with the loss, or with one layer in its backward pass."""
    load, layout, layer = rank.load, rank.layout, rank.layer(rank.load.num_tokens)
    in_flight = min(layout.pp - rank.stage, load.num_microbatches)  # 1F1B: as many as stages follow, plus one
    kept = layer.boundary if layout.recompute else layer.saved
    # Ids and positions (int64); per policy row, two int64 and three fp32.
    indices = 16 * load.num_tokens + 28 * load.policy_rows
    saved = in_flight * (rank.shape.num_layers // layout.pp * kept + layer.boundary) + indices
    recomputed = layer.saved - layer.boundary if layout.recompute else 0
    is_whole = rank.shape.is_tied and layout.pp == 1  # the head's gradient is kept until the embedding's
    backward = layer.backward + recomputed + rank.head.weight_bytes * is_whole
    targets = activations.target_bytes(rank.head, load, kept_entries(rank.config.objective)) * rank.is_last
    common = {"activations": saved, "teacher targets": targets}
    moments = {"backward": {**common, "one layer's backward": backward}}
    if rank.is_last:
        final_norm = layer.boundary if rank.spec == "local" else 0  # it also keeps its normalised input
        loss = activations.loss_bytes(rank.head, load, layout.chunk_rows, rank.config.objective)
        moments["loss"] = {**common, "activations": saved + final_norm, "logits": loss}
    return moments


def _passes(rank: _Rank) -> dict[str, dict[str, int]]:
    """Plan passes without gradient: of the teacher, and of the reference or the old policy."""
    head, load, chunk, topk = rank.head, rank.load, rank.layout.chunk_rows, kept_entries(rank.config.objective)
    moments = {}
    if load.teacher_tokens:
        targets = activations.target_bytes(head, load, topk) * rank.is_last
        earlier = targets * (load.num_microbatches - 1) // load.num_microbatches
        logits = activations.teacher_bytes(head, load, chunk, topk) * rank.is_last
        moments["teacher"] = {**_peak_of_pass(rank, load.teacher_tokens, logits), "teacher targets": earlier}
    if rank.step.has_reference or rank.step.num_minibatches > 1:
        logits = activations.logprobs_bytes(head, load, chunk) * rank.is_last
        moments["reference"] = _peak_of_pass(rank, load.num_tokens, logits)
    return moments


def _peak_of_pass(rank: _Rank, num_tokens: int, logits: int) -> dict[str, int]:
    """Find the peak: in a layer, or at the logits after the last layer, which holds nothing by then."""
    layer = rank.layer(num_tokens)
    sharded = layer.boundary * rank.layout.sequence  # the hidden states before they are gathered
    before = layer.boundary * (rank.load.num_microbatches > 1)  # the last output stays until there is a new one
    peak = {"activations": layer.forward} if layer.forward > logits else {"logits": logits + sharded}
    return {name: size + before for name, size in peak.items()}


def _publish(rank: _Rank) -> dict[str, int]:
    """Plan a publish: the largest tensor, gathered, and buckets being filled and sent (``sglang/transports.py``)."""
    sglang = rank.config.rollout.sglang
    whole = rank.shape.vocab * rank.shape.hidden * rank.element
    buckets = 0 if sglang.weight_sync == "disk" else 2 * sglang.weight_bucket_mb * 2**20
    return {"whole tensors": 2 * whole, "weight buckets": buckets}
