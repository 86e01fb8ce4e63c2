"""The memory plan against torch's own CPU allocator, on real policies: weights, update, teacher and reference passes.

What is compared is the local layer spec, the one that runs without CUDA; transformer-engine's is not.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core import parallel_state
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from megatron_sdsearch.allocation import Allocation, assign_roles
from megatron_sdsearch.batching.packing import Minibatch, TrainBatch, pack
from megatron_sdsearch.config import RunConfig
from megatron_sdsearch.model.shape import ModelShape
from megatron_sdsearch.parallel.groups import ParallelState
from megatron_sdsearch.plan.memory import MemoryPlan, plan_memory
from megatron_sdsearch.plan.workload import Layout, MicrobatchLoad
from megatron_sdsearch.records import TeacherPrompt, TrainingSample
from megatron_sdsearch.training.policy import Network, Policy
from megatron_sdsearch.training.updates import minibatch_losses, teacher_targets
from tests.distributed.launch import run_distributed
from tests.distributed.oracle import CONFIGS, make_config

VOCAB = 2000
TOLERANCE = 0.10
SMALLEST = 4096  # allocations below are not counted
NUM_SAMPLES, LENGTH, PROMPT, QUERY, BLOCK = 4, 512, 64, 64, 128
Case = dict[str, Any]
Sizes = dict[str, int]

PLAIN: Case = {"family": "qwen2", "row": 4 * (LENGTH + BLOCK)}
# One sample a row: stages need several microbatches to be ahead of each other.
PIPELINE: Case = {**PLAIN, "row": LENGTH + BLOCK, "parallel": {"pipeline_model_parallel_size": 2}}
SEQUENCE: Case = {**PLAIN, "parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True}}
CASES: dict[int, dict[str, Case]] = {
    1: {
        "one chunk of logits": PLAIN,
        "recompute, many chunks": {**PLAIN, "recompute": "full", "chunk": 64},
        "entropy, whole distributions": {**PLAIN, "objective": {"entropy_coef": 0.01, "topk": None}},
        "recompute, all distilled": {**PLAIN, "recompute": "full", "objective": {"distill_positions": "all"}},
        "no distillation": {**PLAIN, "objective": {"alpha": 0.0}},
        "untied, norms of queries, chunks": {**PLAIN, "family": "qwen3", "chunk": 200},
    },
    2: {
        "TP": {**PLAIN, "parallel": {"tensor_model_parallel_size": 2}},
        "TP, sequence": SEQUENCE,
        "TP, sequence, recompute, chunks": {**SEQUENCE, "recompute": "full", "chunk": 64},
        "PP": PIPELINE,
        "PP, untied, recompute": {**PIPELINE, "family": "qwen3", "recompute": "full"},
        "DP": {**PLAIN, "row": LENGTH + BLOCK},
    },
}


def _make_model(folder: Path, family: str) -> None:
    config = CONFIGS[family](
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        tie_word_embeddings=family == "qwen2",
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def _sample(index: int) -> TrainingSample:
    """A prompt, a query, and other sampled tokens: almost every row is the policy's."""
    random = np.random.default_rng(index)
    token_class = np.ones(LENGTH, dtype=np.int64)
    token_class[:PROMPT], token_class[PROMPT : PROMPT + QUERY] = 0, 2
    token_ids, shifted = random.integers(0, VOCAB, LENGTH), np.append(token_class[1:], 0)
    return TrainingSample(
        sample_id=str(index),
        token_ids=token_ids,
        labels=np.append(token_ids[1:], 0),
        loss_mask=shifted > 0,
        distill_mask=shifted == 2,
        rollout_logprobs=np.where(shifted > 0, -7.6, 0.0),
        advantage=float(random.normal()),
        prompt_length=PROMPT,
        teacher_prompts=(
            TeacherPrompt(token_ids=tuple(random.integers(0, VOCAB, PROMPT + BLOCK).tolist()), start=0, end=LENGTH),
        ),
    )


def _config(folder: Path, case: Case) -> RunConfig:
    model = {"hf_dir": str(folder / case["family"]), "recompute": case.get("recompute", "none")}
    return make_config(
        folder,
        folder / "run",
        {"alpha": 0.5, "alpha_warmup_steps": 0, "kl_coef": 0.1, "topk": 20, **case.get("objective", {})},
        model={**model, "logits_chunk_tokens": case.get("chunk", 4096)},
        parallel=case.get("parallel", {}),
        rollout={"max_prompt_tokens": 64, "max_response_tokens": 64, "max_total_tokens": 256},
        hindsight={"max_block_tokens": 256},
        train={"trajectories_per_minibatch": None, "max_tokens_per_microbatch": case["row"]},
    )


def _pack(config: RunConfig, parallel: ParallelState) -> TrainBatch:
    samples = [_sample(index) for index in range(NUM_SAMPLES)]
    if config.objective.alpha == 0:
        samples = [TrainingSample(**{**_fields(each), "teacher_prompts": ()}) for each in samples]
    if config.objective.distill_positions == "all":
        samples = [TrainingSample(**{**_fields(each), "distill_mask": each.loss_mask}) for each in samples]
    return pack(
        samples,
        num_ranks=parallel.dp_size,
        rank=parallel.dp_rank,
        num_minibatches=1,
        max_tokens=config.train.max_tokens_per_microbatch,
        alignment=parallel.alignment,
        equal_lengths=parallel.pp_size > 1,
        objective=config.objective,
    )


def _fields(sample: TrainingSample) -> dict[str, Any]:
    return {name: getattr(sample, name) for name in TrainingSample.__slots__}


def _load(minibatch: Minibatch) -> MicrobatchLoad:
    return MicrobatchLoad(
        num_tokens=max(len(batch.token_ids) for batch in minibatch.student),
        policy_rows=max(int(batch.loss_mask.sum()) for batch in minibatch.student),
        query_rows=max(int(batch.distill_mask.sum()) for batch in minibatch.student),
        teacher_tokens=max((len(batch.token_ids) for batch in minibatch.teacher), default=0),
        num_microbatches=len(minibatch.student),
    )


def _peak(work: Callable[[], Any]) -> int:
    """Most bytes that ``work`` has allocated and not yet freed, by torch's CPU allocator.

    torch records what this thread does. A tensor that gloo's threads let go of has no end there: it is left out, for it
    lived about as long as its collective.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    assert recorded.profiler is not None
    events = _allocations(recorded.profiler.kineto_results.experimental_event_tree())
    changes, is_open = [0] * len(events), dict[int, int]()  # the latest allocation at an address
    for index, (address, size) in enumerate(events):
        if size > 0:
            is_open[address] = index
        elif address in is_open:
            changes[is_open.pop(address)], changes[index] = -size, size
    return int(np.cumsum(changes).max(initial=0))


def _allocations(roots: list[Any]) -> list[tuple[int, int]]:
    """Address and size of every allocation, negative where it is freed, in order of time."""
    found, nodes = [], list(roots)
    while nodes:
        node = nodes.pop()
        nodes += node.children
        if node.tag == _EventType.Allocation and abs(node.extra_fields.alloc_size) >= SMALLEST:
            found.append((node.start_time_ns, node.extra_fields.ptr, node.extra_fields.alloc_size))
    return [(address, size) for _, address, size in sorted(found, key=lambda each: each[0])]


def _standing(policy: Policy, reference: Network) -> Sizes:
    states = policy.optimizer.optimizer.state.values()
    buffers = parallel_state.get_global_memory_buffer().buffer.values()
    return {
        "weights": sum(each.nbytes for each in policy.gpt.parameters()),
        "gradients": sum(buffer.grad_data.nbytes for buffer in policy.ddp.buffers),
        # without the step counters, 4 bytes a tensor
        "optimizer": sum(state[name].nbytes for state in states for name in ("exp_avg", "exp_avg_sq")),
        "reference": sum(each.nbytes for each in reference.gpt.parameters()),
        "sequence gather buffer": sum(each.nbytes for each in buffers),
    }


def _measure(config: RunConfig) -> tuple[Sizes, Sizes, MicrobatchLoad]:
    parallel = ParallelState.initialize(config.parallel, seed=1)
    policy, reference = Policy(config, parallel), Network(config, parallel)
    minibatch = _pack(config, parallel).minibatches[0]

    def update() -> None:
        targets = teacher_targets(policy, minibatch, config.objective)
        ref = reference.logprobs(minibatch)
        policy.update(minibatch, minibatch_losses(minibatch, config.objective, 0.5, ref=ref, targets=targets))

    update()  # makes the optimizer's state
    passes = {
        "update": _peak(update),
        "teacher": _peak(lambda: teacher_targets(policy, minibatch, config.objective)),
        "reference": _peak(lambda: reference.logprobs(minibatch)),
    }
    standing = _standing(policy, reference)
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_global_memory_buffer()
    return standing, passes, _load(minibatch)


def measure_all(rank: int, world_size: int, folder: Path, cases: list[Case]) -> list[tuple[Sizes, Sizes, Any]]:
    return [_measure(_config(folder, case)) for case in cases]


def _plans(folder: Path, case: Case, world_size: int, load: MicrobatchLoad) -> list[MemoryPlan]:
    """Of every rank: a stage has the next half of the ranks, or all ranks are alike."""
    config = _config(folder, case)
    hf_config = CONFIGS[case["family"]].from_pretrained(folder / case["family"])  # type: ignore[attr-defined]
    shape = ModelShape.from_hf_config(hf_config)
    layout = Layout.from_config(config, assign_roles(config, Allocation(gpus_per_node=0, ranks_per_node=world_size)))
    stages = plan_memory(config, shape, layout, load=load)
    return [stages[rank * layout.pp // world_size] for rank in range(world_size)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory")
    for family in ("qwen2", "qwen3"):
        _make_model(folder / family, family)
    return folder


@pytest.fixture(scope="module", params=CASES)
def measured(request: pytest.FixtureRequest, folder: Path) -> tuple[int, dict[str, list[Any]]]:
    """World size, and by case what every rank measured."""
    world_size: int = request.param
    cases = CASES[world_size]
    by_rank = run_distributed(measure_all, world_size, folder, list(cases.values()), timeout_s=500)
    return world_size, dict(zip(cases, zip(*by_rank, strict=True), strict=True))  # type: ignore[arg-type]


@pytest.mark.timeout(600)  # the first to ask waits for the processes
def test_what_stands_there_is_planned_to_the_byte(folder: Path, measured: tuple[int, dict[str, list[Any]]]) -> None:
    world_size, by_case = measured
    for name, ranks in by_case.items():
        for plan, (standing, _, _) in zip(
            _plans(folder, CASES[world_size][name], world_size, ranks[0][2]), ranks, strict=True
        ):
            for part in ("weights", "optimizer", "reference"):
                assert plan.standing[part] == standing[part], f"{name}: {part}"
            # megatron pads the buffer's end
            assert plan.standing["gradients"] == pytest.approx(standing["gradients"], abs=4096), name
            assert plan.standing.get("sequence gather buffer", 0) == standing["sequence gather buffer"], name


@pytest.mark.timeout(600)
def test_peaks_are_planned_within_a_tenth(folder: Path, measured: tuple[int, dict[str, list[Any]]]) -> None:
    world_size, by_case = measured
    misses, rows = [], []
    for name, ranks in by_case.items():
        plans = _plans(folder, CASES[world_size][name], world_size, ranks[0][2])
        for rank, (plan, (_, passes, _)) in enumerate(zip(plans, ranks, strict=True)):
            planned = {moment: sum(parts.values()) for moment, parts in plan.moments.items()}
            planned["update"] = max(planned.values())  # its measure holds all moments of a step
            for moment, actual in passes.items():
                off = (planned.get(moment, 0) - actual) / max(actual, 1)
                rows.append(f"{name:34} rank {rank} {moment:9} {planned.get(moment, 0):12,} {actual:12,} {off:+7.1%}")
                if abs(off) > TOLERANCE and actual > 2**14:
                    misses.append(f"{name}: {moment} of rank {rank} is {off:+.1%} off {actual:,} bytes")
    assert not misses, "\n".join([*misses, "case, rank, pass, planned bytes, measured bytes:", *rows])
