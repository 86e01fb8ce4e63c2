"""Parameters, cache and FLOPs of published shapes against models that are built, and counts by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from tests.unit.plan.models import LLAMA_1B, MODELS, QWEN_3B, QWEN_7B, shape_of


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_the_built_model(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(MODELS[name])
    assert shape_of(MODELS[name]).num_params == sum(each.numel() for each in model.parameters())


def test_parameters_of_the_paper_models_are_the_published_ones() -> None:
    assert shape_of(QWEN_3B).num_params == 3_085_938_688
    assert shape_of(QWEN_7B).num_params == 7_615_616_512


def test_stages_share_the_layers_and_hold_a_table_at_each_end() -> None:
    shape, table = shape_of(QWEN_7B), 152064 * 3584
    first, middle, last = (shape.stage_params(stage, tp=1, pp=4) for stage in (0, 1, 3))
    assert first == middle + table
    assert last == middle + table + 3584  # the final norm
    assert middle == 7 * shape.layer_params()


def test_a_tied_model_has_its_table_twice_only_when_it_has_stages() -> None:
    shape = shape_of(QWEN_3B)
    stages = [shape.stage_params(stage, tp=1, pp=2) for stage in (0, 1)]
    assert sum(stages) == shape.num_params + 151936 * 2048


def test_cache_of_the_3b_model_by_hand() -> None:
    # keys and values, 36 layers, 2 groups of 128, 2 bytes
    assert shape_of(QWEN_3B).kv_bytes_per_token(2) == 2 * 36 * 2 * 128 * 2 == 36_864


def test_flops_are_two_per_weight_and_token() -> None:
    shape = shape_of(LLAMA_1B)
    per_layer = 2048 * (2048 + 512 + 512 + 2048) + 3 * 2048 * 8192
    assert shape.forward_flops(10, 0) == 10 * 2 * 16 * per_layer
    assert shape.forward_flops(1, 100) - shape.forward_flops(1, 0) == 4 * 100 * 2048 * 16
    assert shape.head_flops(3) == 2 * 3 * 128256 * 2048


@given(name=st.sampled_from(sorted(MODELS)), power=st.integers(0, 2), pp=st.sampled_from([1, 2, 4]))
def test_more_tensor_parallel_ranks_never_hold_more(name: str, power: int, pp: int) -> None:
    shape, tp = shape_of(MODELS[name]), 2**power
    for stage in range(pp):
        few, many = (shape.stage_params(stage, tp=size, pp=pp) for size in (tp, 2 * tp))
        assert many < few
        assert 2 * many >= few  # norms are not sharded, and padding is never negative
