"""Parameters and cache of published shapes against models that are built and counts by hand, and sizes that divide."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config

from megatron_sdsearch.config import ParallelConfig
from megatron_sdsearch.model.shape import ModelShape, head_dim, layout_problems, padded_vocab_size
from tests.unit.plan.models import MODELS, QWEN_3B, QWEN_7B, shape_of

SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}


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


@given(name=st.sampled_from(sorted(MODELS)), power=st.integers(0, 2), pp=st.sampled_from([1, 2, 4]))
def test_more_tensor_parallel_ranks_never_hold_more(name: str, power: int, pp: int) -> None:
    shape, tp = shape_of(MODELS[name]), 2**power
    for stage in range(pp):
        few, many = (shape.stage_params(stage, tp=size, pp=pp) for size in (tp, 2 * tp))
        assert many < few
        assert 2 * many >= few  # norms are not sharded, and padding is never negative


@given(tensor=st.integers(1, 8), pipeline=st.integers(1, 8))
def test_a_layout_is_taken_exactly_when_everything_divides(tensor: int, pipeline: int) -> None:
    shape = ModelShape.from_hf_config(Qwen2Config(**SIZES | {"num_key_value_heads": 6}))
    layout = ParallelConfig(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline)
    wrong = {
        "parallel.tensor_model_parallel_size": 6 % tensor or 96 % tensor,
        "parallel.pipeline_model_parallel_size": 4 % pipeline,
    }
    assert [problem.field for problem in layout_problems(shape, layout)] == [name for name in wrong if wrong[name]]


@pytest.mark.parametrize(
    ("changes", "layout", "message", "fix"),
    [
        (
            {"num_attention_heads": 6, "num_key_value_heads": 6},
            {"tensor_model_parallel_size": 4},
            "4 does not divide .* num_attention_heads = 6",
            "choose one of 1, 2, 3, 6",
        ),
        (
            {"num_attention_heads": 12, "num_key_value_heads": 6},
            {"tensor_model_parallel_size": 4},
            "4 is neither a divisor nor a multiple of .* num_key_value_heads = 6",
            "choose one of 1, 2, 3, 6, 12",
        ),
        (
            {"intermediate_size": 95},
            {"tensor_model_parallel_size": 2},
            "2 .* intermediate_size = 95",
            "choose one of 1",
        ),
        ({}, {"pipeline_model_parallel_size": 3}, "3 .* num_hidden_layers = 4", "choose one of 1, 2, 4"),
    ],
)
def test_a_layout_that_does_not_divide_names_both_figures(
    changes: dict[str, Any], layout: dict[str, int], message: str, fix: str
) -> None:
    shape = ModelShape.from_hf_config(Qwen2Config(**SIZES | changes))
    (problem,) = layout_problems(shape, ParallelConfig.model_validate(layout))
    assert problem.field == f"parallel.{next(iter(layout))}"
    assert re.search(message, problem.problem)
    assert problem.fix == fix


@pytest.mark.parametrize(("heads", "tensor"), [(1, 4), (2, 4), (4, 4), (8, 4)])
def test_key_value_heads_may_be_fewer_than_ranks(heads: int, tensor: int) -> None:
    hf_config = Qwen2Config(**SIZES | {"num_attention_heads": 8, "num_key_value_heads": heads})
    layout = ParallelConfig(tensor_model_parallel_size=tensor)
    assert layout_problems(ModelShape.from_hf_config(hf_config), layout) == []


@given(vocab_size=st.integers(1, 300_000), tp_size=st.integers(1, 16))
def test_the_padded_vocabulary_is_the_smallest_that_divides(vocab_size: int, tp_size: int) -> None:
    padded = padded_vocab_size(vocab_size, tp_size)
    assert padded % tp_size == 0
    assert vocab_size <= padded < vocab_size + tp_size


def test_head_dim_is_the_configured_one_or_follows_from_the_width() -> None:
    assert head_dim(Qwen3Config(**SIZES, head_dim=16)) == 16
    assert head_dim(Qwen2Config(**SIZES)) == 8
