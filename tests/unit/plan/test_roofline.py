"""Lengths, and seconds that are counted by hand, and how they change with the layout and the hardware."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_sdsearch.config import RunConfig
from megatron_sdsearch.errors import ConfigError
from megatron_sdsearch.plan.memory import busiest_rank, plan_memory
from megatron_sdsearch.plan.roofline import HARDWARE, Estimator, Gpu
from megatron_sdsearch.plan.workload import StepLoad, assume, step_load
from tests.unit.plan.models import QWEN_3B, layout_of, run, shape_of

PARAMS = 3_085_938_688
REACHED = 8 * 0.4 * 989e12  # FLOPs per second of eight H100
LENGTHS = [
    *("prompt_tokens=200", "searches=2", "response_tokens=100", "observation_tokens=150"),
    *("query_tokens=10", "block_tokens=300", "search_s=0.25"),
]
DOCUMENTS = {"content": "documents"}


def _load(config: RunConfig) -> StepLoad:
    return step_load(config, assume(config, LENGTHS))


def _estimator(config: RunConfig, gpu: Gpu = HARDWARE["h100"], gpus_per_node: int = 8) -> Estimator:
    assumed = assume(config, LENGTHS)
    step = step_load(config, assumed)
    return Estimator(
        config=config, shape=shape_of(QWEN_3B), assumed=assumed, step=step, gpu=gpu, gpus_per_node=gpus_per_node
    )


def _phases(config: RunConfig, gpus_per_node: int = 8, gpu: Gpu = HARDWARE["h100"], **changes: Any) -> dict[str, float]:
    layout, estimator = replace(layout_of(config), **changes), _estimator(config, gpu, gpus_per_node)
    plans = plan_memory(config, estimator.shape, layout, step=estimator.step, gpu_bytes=gpu.memory_bytes)
    return estimator.phases(layout, busiest_rank(plans).kv_tokens)


def _pass(tokens: float, rows: float, layers: float = 1, head: float = 1) -> float:
    """Seconds of passes over the layers and of the head by their FLOPs: two per weight and token."""
    per_layer = 2048 * (2048 + 256 + 256 + 2048) + 3 * 2048 * 11008
    return 2 * 1280 * (layers * tokens * 36 * per_layer + head * rows * 151936 * 2048) / REACHED


def _reading(layers: float = 1, head: float = 1) -> float:
    return _pass(800, 300, layers, head)


def test_lengths_add_up() -> None:
    load = _load(run())
    assert (load.generated_tokens, load.student_tokens, load.distilled_tokens) == (300, 200 + 300 + 300, 20)
    assert load.teacher_tokens == 800 - 250 + 300  # what follows the last query is cut
    assert (load.num_trajectories, load.num_minibatches, load.has_reference) == (1280, 5, True)


def test_with_documents_the_teacher_reads_a_sequence_for_each_search() -> None:
    load = _load(run(hindsight=DOCUMENTS))
    up_to_queries = (200 + 100, 200 + 100 + 150 + 100)
    assert load.teacher_tokens == sum(up_to_queries) + 2 * 300
    assert _phases(run(hindsight=DOCUMENTS))["teacher"] == pytest.approx(_pass(load.teacher_tokens, 20))


def test_with_documents_a_block_is_as_long_as_an_observation() -> None:
    assert assume(run(hindsight=DOCUMENTS)).block_tokens == 256
    assert assume(run(hindsight={**DOCUMENTS, "max_block_tokens": 100})).block_tokens == 100
    assert assume(run()).block_tokens == 1024


def test_without_distillation_no_teacher_reads() -> None:
    assert assume(run(objective={"alpha": 0.0})).block_tokens == 0
    assert _load(run(objective={"alpha": 0.0})).teacher_tokens == 0
    assert _load(run(train={"mode": "warm_start", "demonstrations": "d"})).teacher_tokens == 0


def test_searches_are_fewer_where_trajectories_would_be_too_long() -> None:
    for total, searches in ((800, 2), (550, 1), (300, 0)):
        rollout = {"max_total_tokens": total, "max_prompt_tokens": 200, "max_response_tokens": 100}
        assert assume(run(rollout=rollout), LENGTHS).searches == searches


def test_assumptions_take_the_place_of_defaults() -> None:
    assumed = assume(run(), ["fill=0.25", "searches=1", "training=0.3"])
    assert (assumed.prompt_tokens, assumed.searches, assumed.training, assumed.memory) == (512, 1, 0.3, 0.6)


@pytest.mark.parametrize(
    "text", ["searches", "searches=many", "searchs=2", "training=0", "fill=-1", "fill=1.5", "fill=nan", "tail=inf"]
)
def test_an_assumption_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as raised:
        assume(run(), [text])
    assert raised.value.field == "--assume"


def test_a_reading_is_its_flops_over_what_is_reached() -> None:
    assert _phases(run())["reference"] == _phases(run())["old"] == pytest.approx(_reading())


def test_an_update_is_three_readings_four_with_recomputation_and_the_head_twice_in_chunks() -> None:
    gradients = 5 * 4 * PARAMS * (2 * 7 / 8) / (450e9 * 0.7)  # once a minibatch
    for recompute, passes in ((False, 3), (True, 4)):
        update = _phases(run(), recompute=recompute)["update"]
        assert update == pytest.approx(_reading(passes, 4) + gradients)


def test_gradients_go_by_the_slowest_link() -> None:
    inside, across = (_phases(run(), num)["update"] - _reading(3, 4) for num in (8, 4))
    assert across == pytest.approx(9 * inside)


def test_tensor_parallel_pays_two_all_reduces_a_layer() -> None:
    tokens_of_a_replica = 1280 * 800 / 4
    all_reduces = 36 * 2 * tokens_of_a_replica * 2048 * 2 * (2 * 1 / 2) / (450e9 * 0.7)
    assert _phases(run(), tp=2, dp=4)["reference"] == pytest.approx(_reading() + all_reduces)


def test_the_stage_with_the_head_sets_the_pace_and_stages_wait_for_one_another() -> None:
    # 128 trajectories a rank and minibatch, ten of 850 tokens in a row of 8704: 13 microbatches
    reading = _phases(run(), pp=4, dp=2, max_tokens=8704)["reference"]
    assert reading == pytest.approx(4 * _reading(1 / 4, 1) * (1 + 3 / 13))


def test_decoding_reads_weights_and_half_of_the_cache_each_step() -> None:
    urls = [f"http://a:{i}" for i in range(1, 9)]
    config = run(rollout={"engine": "sglang", "sglang": {"num_servers": 8, "urls": urls}})
    token_s = (PARAMS * 2 + 160 * 400 * 36_864) / (3350e9 * 0.6) + 3e-3
    searches = 2 * 2 * 0.25  # a wave and the tail
    assert _phases(config)["rollout"] == pytest.approx(1.5 * 300 * token_s + searches)


def test_phases_that_do_not_happen_take_no_time() -> None:
    config = run(objective={"alpha": 0.0, "kl_coef": 0.0}, train={"trajectories_per_minibatch": None})
    assert set(_phases(config)) == {"rollout", "update"}
    assert set(_phases(run())) == {"rollout", "reference", "old", "teacher", "update"}


def test_slower_hardware_is_slower() -> None:
    fast, slow = _phases(run()), _phases(run(), gpu=HARDWARE["a100"])
    assert all(slow[name] > fast[name] for name in fast)
