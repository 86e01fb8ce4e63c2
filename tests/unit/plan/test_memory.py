"""Bytes of a rank counted by hand, and what must hold for every layout."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sdsearch.config import ObjectiveConfig, RunConfig
from megatron_sdsearch.model.shape import ModelShape
from megatron_sdsearch.plan.activations import HeadSize, layer_bytes, loss_bytes, target_bytes
from megatron_sdsearch.plan.memory import FRAMEWORK_BYTES, HEADROOM, MemoryPlan, busiest_rank
from megatron_sdsearch.plan.memory import plan_memory as plan_stages
from megatron_sdsearch.plan.workload import Layout, MicrobatchLoad, assume, largest_microbatch, step_load
from tests.unit.plan.models import QWEN_3B, QWEN_7B, layout_of, run, shape_of

GPU = 79 * 2**30
LOAD = MicrobatchLoad(num_tokens=100, policy_rows=8, query_rows=4, teacher_tokens=120, num_microbatches=3)
HEAD = HeadSize(columns=10, hidden=4, element=4)


def _layout(**changes: Any) -> Layout:
    return replace(layout_of(run()), **changes)


def plan_memory(config: RunConfig, shape: ModelShape, layout: Layout, gpu_bytes: int | None = None) -> MemoryPlan:
    return busiest_rank(plan_stages(config, shape, layout, gpu_bytes=gpu_bytes))


def _plan(layout: Layout, gpu_bytes: int = GPU, **sections: dict[str, Any]) -> MemoryPlan:
    return plan_memory(run(**sections), shape_of(QWEN_3B), layout, gpu_bytes=gpu_bytes)


def _load(config: RunConfig, layout: Layout) -> MicrobatchLoad:
    return largest_microbatch(config, layout, step_load(config, assume(config)))


def test_a_bf16_rank_holds_eighteen_bytes_a_weight_and_two_more_for_the_reference() -> None:
    standing, params = _plan(_layout()).standing, 3_085_938_688
    assert standing["weights"] == standing["reference"] == 2 * params
    assert standing["gradients"] == 4 * params
    assert standing["optimizer"] == 12 * params
    assert standing["framework"] == FRAMEWORK_BYTES


def test_an_fp32_rank_needs_no_second_weights() -> None:
    plan = plan_memory(run(model={"dtype": "float32"}), shape_of(QWEN_3B), _layout())
    assert plan.standing["weights"] == 4 * 3_085_938_688
    assert plan.standing["optimizer"] == 8 * 3_085_938_688
    assert "framework" not in plan.standing


def test_without_kl_there_is_no_reference() -> None:
    assert "reference" not in _plan(_layout(), objective={"kl_coef": 0.0}).standing


def test_the_distributed_optimizer_cuts_its_state_by_the_replicas() -> None:
    whole, cut = (_plan(_layout(distributed_optimizer=flag)).standing for flag in (False, True))
    assert cut["optimizer"] * 8 == pytest.approx(whole["optimizer"], abs=8)
    assert cut["gradients"] == whole["gradients"]


def test_a_transformer_engine_layer_by_hand() -> None:
    shape = shape_of(QWEN_3B)
    layer = layer_bytes(shape, "te", 1000, tp=2, sequence=True, element=2)
    hidden, gated, query, key = 2048, 11008 // 2, 2048 // 2, 256 // 2
    attention = (query + 2 * key) + query + key + query + 4 * 128  # qkv, rotated q and k, output, rotary
    per_token = 4 * hidden // 2 * 2 + attention * 2 + 4 * 8 + 5 * gated * 2
    assert layer.saved == 1000 * per_token
    assert layer.boundary == 1000 * hidden // 2 * 2


def test_ranks_that_share_a_key_head_hold_one_each_and_the_whole_projection() -> None:
    shape = shape_of(QWEN_3B)  # two key heads
    two, four = (
        layer_bytes(shape, "te", 1, tp=tp, sequence=False, element=2).saved
        - 2 * (4 * 2048 + 4 * 128 + 5 * 11008 // tp)
        - 4 * 16 // tp
        for tp in (2, 4)
    )
    assert two == 2 * ((2048 + 512) // 2 + 2 * 1024 + 128)
    assert four == 2 * (2048 + 512 + 2 * 512 + 128)


def test_the_loss_by_hand() -> None:
    objective = ObjectiveConfig(topk=2)
    # One chunk: 8 rows of hidden states; logits, the picked rows' gradient, the new one; three fp32 blocks.
    assert loss_bytes(HEAD, LOAD, 8, objective) == 8 * 16 + 3 * 8 * 40 + 3 * 8 * 40
    # Chunks of 4: hidden states and their gradient, the head's gradient, and the same of 4 rows.
    assert loss_bytes(HEAD, LOAD, 4, objective) == 2 * 100 * 16 + 10 * 16 + 6 * 4 * 40
    # Nothing is distilled: no picked rows.
    without = replace(LOAD, query_rows=0)
    assert loss_bytes(HEAD, without, 8, objective) == 8 * 16 + 5 * 8 * 40


def test_targets_are_ids_and_logprobs_or_whole_logits_of_all_microbatches() -> None:
    assert target_bytes(HEAD, LOAD, 50) == 12 * (50 * 12 + 4)
    assert target_bytes(HEAD, LOAD, None) == 12 * 40


def test_stages_ahead_of_the_others_hold_more_microbatches() -> None:
    layout = _layout(pp=4, dp=2)
    first, _, _, last = plan_stages(run(), shape_of(QWEN_3B), layout, gpu_bytes=GPU)
    assert "loss" in last.moments
    assert "loss" not in first.moments
    ratio = first.moments["backward"]["activations"] / last.moments["backward"]["activations"]
    assert ratio == pytest.approx(4, rel=0.02)


def test_the_embedded_engine_is_a_whole_model_on_every_rank_whatever_tp() -> None:
    config = run(rollout={"engine": "embedded"}, parallel={"tensor_model_parallel_size": 2})
    plan = plan_memory(config, shape_of(QWEN_3B), layout_of(config), gpu_bytes=GPU)
    assert plan.standing["embedded engine"] == 2 * 3_085_938_688
    assert plan.standing["embedded KV cache"] == 160 * 6656 * 36_864


def test_colocated_servers_are_cut_to_what_the_trainer_leaves_and_others_are_not() -> None:
    layout = _layout(recompute=True)
    colocated = _plan(layout)
    assert colocated.moments["rollout"]["server weights"] == 2 * 3_085_938_688
    assert sum(colocated.standing.values()) + sum(colocated.moments["rollout"].values()) <= GPU * (1 - HEADROOM)
    assert layout.servers is not None
    beside = _plan(replace(layout, servers=replace(layout.servers, placement="beside")))
    assert beside.kv_tokens > colocated.kv_tokens
    assert "rollout" not in beside.moments
    assert beside.server["server weights"] == 2 * 3_085_938_688


def test_a_server_of_several_gpus_holds_a_share_of_weights_and_heads() -> None:
    config = run(rollout={"engine": "sglang", "sglang": {"num_servers": 1, "tp_size": 4, "urls": ["http://a:1"]}})
    plan = plan_memory(config, shape_of(QWEN_7B), layout_of(config), gpu_bytes=GPU)
    assert plan.server["server weights"] == 2 * 7_615_616_512 // 4
    assert plan.kv_tokens == pytest.approx(plan.server["KV cache"] * 4 / shape_of(QWEN_7B).kv_bytes_per_token(2), abs=1)


@pytest.mark.parametrize(("tensor", "share"), [(1, 1), (2, 2), (4, 2), (8, 2)])
def test_ranks_that_share_a_key_head_cache_it_each(tensor: int, share: int) -> None:
    config = run(rollout={"engine": "sglang", "sglang": {"num_servers": 1, "tp_size": tensor, "urls": ["http://a:1"]}})
    shape = shape_of(QWEN_3B)  # two key heads
    plan = plan_memory(config, shape, layout_of(config), gpu_bytes=GPU)
    assert plan.kv_tokens == plan.server["KV cache"] // (shape.kv_bytes_per_token(2) // share)


def test_the_layers_are_those_of_the_configured_spec() -> None:
    auto, engine, local = (
        _plan(_layout(), model={"layer_spec": spec}).moments["backward"]["activations"]
        for spec in ("auto", "transformer_engine", "local")
    )
    assert auto == engine
    tokens = _layout().max_tokens
    layer = layer_bytes(shape_of(QWEN_3B), "local", tokens, tp=1, sequence=False, element=2)
    assert local == 36 * layer.saved + layer.boundary + (16 + 28) * tokens
    assert local > auto


def test_with_documents_the_teachers_row_holds_all_sequences_of_the_longest_trajectory() -> None:
    config = run(hindsight={"content": "documents"})
    layout = _layout(max_tokens=8704)
    students = (2560, 3584, 4608, 5632, 6656)  # up to each of five queries, all budgets full
    load = _load(config, layout)
    assert load.teacher_tokens == sum(students) + 5 * 512
    assert load.num_tokens == 8704
    # A mean one has 4,800 tokens, and fills a row; with one block of siblings it has 3,072, and a row holds two.
    assert load.num_microbatches == 2 * _load(run(), layout).num_microbatches
    several = _plan(layout, hindsight={"content": "documents"}).moments["teacher"]
    assert several["activations"] > _plan(layout).moments["teacher"]["activations"]


def test_what_does_not_fit_does_not() -> None:
    plan = _plan(_layout())
    assert plan.peak_moment == "loss"
    assert plan.total_bytes == sum(plan.parts.values())
    assert plan.why_not(GPU) is not None
    assert plan.why_not(int(plan.total_bytes / (1 - HEADROOM)) + 1) is None
    assert plan.why_not(int(plan.total_bytes / (1 - HEADROOM)) - 1) is not None


layouts = st.builds(
    lambda tp, pp, sequence, recompute, tokens, chunk: _layout(
        tp=tp, pp=pp, dp=2, sequence=sequence and tp > 1, recompute=recompute, max_tokens=tokens, chunk_rows=chunk
    ),
    tp=st.sampled_from([1, 2]),
    pp=st.sampled_from([1, 2, 4]),
    sequence=st.booleans(),
    recompute=st.booleans(),
    tokens=st.sampled_from([8704, 16384, 32768]),
    chunk=st.sampled_from([256, 4096, 65536]),
)


def _update(layout: Layout) -> int:
    """Without what an engine adds."""
    plan = plan_memory(run(), shape_of(QWEN_3B), replace(layout, servers=None), gpu_bytes=GPU)
    return plan.total_bytes


@given(layout=layouts)
def test_more_work_never_needs_less_memory(layout: Layout) -> None:
    total = _update(layout)
    assert _update(replace(layout, max_tokens=2 * layout.max_tokens)) > total
    assert _update(replace(layout, distributed_optimizer=True)) < total
    assert _update(replace(layout, recompute=True)) <= total
    if layout.tp == 2:
        assert _update(replace(layout, sequence=True)) <= _update(replace(layout, sequence=False))
        assert total < _update(replace(layout, tp=1, sequence=False))
