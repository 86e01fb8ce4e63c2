"""Seconds counted by hand, and how they move with what is changed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_sdsearch.config import RunConfig
from megatron_sdsearch.plan.hardware import HARDWARE, Efficiency
from megatron_sdsearch.plan.layout import Layout
from megatron_sdsearch.plan.memory import plan_memory
from megatron_sdsearch.plan.timing import Machine, TimePlan, plan_time
from megatron_sdsearch.plan.workload import StepLoad, Workload
from tests.unit.plan.models import QWEN_3B, run, shape_of

MACHINE = Machine(gpu=HARDWARE["h100"], gpus_per_node=8, efficiency=Efficiency())
LENGTHS = Workload(
    prompt_tokens=200,
    searches=2,
    response_tokens=100,
    observation_tokens=150,
    query_tokens=10,
    block_tokens=300,
    search_s=0.25,
)
DOCUMENTS = {"content": "documents"}


def _time(config: RunConfig, machine: Machine = MACHINE, lengths: Workload = LENGTHS, **changes: Any) -> TimePlan:
    layout = replace(Layout.of(config, 8), **changes)
    shape, step = shape_of(QWEN_3B), StepLoad.of(config, lengths)
    memory = plan_memory(config, shape, layout, workload=lengths, gpu_bytes=machine.gpu.memory_bytes)
    return plan_time(config, shape, layout, step, memory, machine)


def test_lengths_add_up() -> None:
    assert LENGTHS.generated_tokens == 300
    assert LENGTHS.student_tokens == 200 + 300 + 300
    assert LENGTHS.teacher_tokens == 800 - 250 + 300  # what follows the last query is cut
    assert LENGTHS.distilled_tokens == 20


def test_with_documents_the_teacher_reads_a_sequence_for_each_search() -> None:
    up_to_queries = (200 + 100, 200 + 100 + 150 + 100)
    assert LENGTHS.document_teacher_tokens == sum(up_to_queries) + 2 * 300
    step = StepLoad.of(run(hindsight=DOCUMENTS), LENGTHS)
    assert (step.teacher_tokens, step.teacher_sequences) == (LENGTHS.document_teacher_tokens, 2)
    shape, num = shape_of(QWEN_3B), 1280
    flops = shape.forward_flops(num * 1450, 1450 / 2 / 2) + shape.head_flops(num * 20)
    assert _time(run(hindsight=DOCUMENTS)).phases["teacher"] == {"compute": pytest.approx(flops / 8 / (0.4 * 989e12))}


def test_with_documents_a_block_is_as_long_as_an_observation() -> None:
    assert Workload.of(run(hindsight=DOCUMENTS)).block_tokens == 256
    assert Workload.of(run(hindsight={**DOCUMENTS, "max_block_tokens": 100})).block_tokens == 100
    assert Workload.of(run()).block_tokens == 1024


def test_searches_are_fewer_where_trajectories_would_be_too_long() -> None:
    assert LENGTHS.within(800) == LENGTHS
    assert LENGTHS.within(550).searches == 1
    assert LENGTHS.within(300).searches == 0


def test_a_reading_is_its_flops_over_what_is_reached() -> None:
    shape, num = shape_of(QWEN_3B), 1280
    flops = shape.forward_flops(num * 800, 400) + shape.head_flops(num * 300)
    assert _time(run()).phases["reference"] == {"compute": pytest.approx(flops / 8 / (0.4 * 989e12))}


def test_an_update_is_three_readings_four_with_recomputation_and_the_head_twice_in_chunks() -> None:
    shape, num = shape_of(QWEN_3B), 1280
    layers, head = shape.forward_flops(num * 800, 400), shape.head_flops(num * 300)
    for recompute, passes in ((False, 3), (True, 4)):
        expected = (passes * layers + 4 * head) / 8 / (0.4 * 989e12)
        assert _time(run(), recompute=recompute).phases["update"]["compute"] == pytest.approx(expected)


def test_gradients_travel_once_per_minibatch_by_the_slowest_link() -> None:
    params, ring = 3_085_938_688, 2 * 7 / 8
    inside = _time(run()).phases["update"]["gradient reduction"]
    assert inside == pytest.approx(5 * 4 * params * ring / (450e9 * 0.7))
    across = _time(run(), replace(MACHINE, gpus_per_node=4)).phases["update"]["gradient reduction"]
    assert across == pytest.approx(9 * inside)


def test_tensor_parallel_pays_two_all_reduces_a_layer() -> None:
    tokens_of_a_replica = 1280 * 800 / 4
    one = 36 * 2 * tokens_of_a_replica * 2048 * 2 * (2 * 1 / 2) / (450e9 * 0.7)
    time = _time(run(), tp=2, dp=4)
    assert time.phases["reference"]["tensor parallel"] == pytest.approx(one)
    assert time.phases["update"]["tensor parallel"] == pytest.approx(2 * one)
    assert "tensor parallel" not in _time(run()).phases["update"]


def test_the_stage_with_the_head_sets_the_pace_and_stages_wait_for_one_another() -> None:
    shape, num = shape_of(QWEN_3B), 1280
    parts = _time(run(), pp=4, dp=2, max_tokens=8704).phases["reference"]
    flops = shape.forward_flops(num * 800, 400) / 4 + shape.head_flops(num * 300)
    assert parts["compute"] == pytest.approx(flops / 2 / (0.4 * 989e12))
    # 128 trajectories a rank and minibatch, ten of 850 tokens in a row of 8704
    assert parts["pipeline bubble"] == pytest.approx(parts["compute"] * 3 / 13)


@pytest.mark.parametrize(("weight_sync", "part"), [("disk", "disk"), ("tensor", "http"), ("distributed", "broadcast")])
def test_weights_travel_as_configured(weight_sync: str, part: str) -> None:
    sglang = {"colocated": True, "num_servers": 8, "weight_sync": weight_sync}
    publish = _time(run(rollout={"engine": "sglang", "sglang": sglang})).phases["publish"]
    whole = 2 * 3_085_938_688
    seconds = {"disk": 9 * whole / 2e9, "http": 8 * whole * 4 / 3 / 1e9, "broadcast": whole / (450e9 * 0.7)}
    assert publish == {"gather": 0, part: pytest.approx(seconds[part])}


def test_decoding_reads_weights_and_half_of_the_cache_each_step() -> None:
    config = run(
        rollout={"engine": "sglang", "sglang": {"num_servers": 8, "urls": [f"http://a:{i}" for i in range(1, 9)]}}
    )
    read = 3_085_938_688 * 2 + 160 * 400 * 36_864
    assert _time(config).phases["rollout"]["decoding"] == pytest.approx(1.5 * 300 * read / (3350e9 * 0.6))


def test_phases_that_do_not_happen_take_no_time() -> None:
    config = run(objective={"alpha": 0.0, "kl_coef": 0.0}, train={"trajectories_per_minibatch": None})
    assert set(_time(config).phases) == {"publish", "rollout", "update"}
    assert set(_time(run()).phases) == {"publish", "rollout", "reference", "old", "teacher", "update"}
    assert _time(config).phase_s("teacher") == 0


def test_a_step_is_the_sum_of_its_phases_and_slower_hardware_is_slower() -> None:
    time = _time(run())
    assert time.step_s == pytest.approx(sum(time.phase_s(name) for name in time.phases))
    slow = _time(run(), replace(MACHINE, gpu=HARDWARE["a100"]))
    for name in time.phases:
        assert slow.phase_s(name) > time.phase_s(name), name
