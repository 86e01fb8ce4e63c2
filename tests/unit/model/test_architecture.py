"""Which models and layouts are taken, which are refused, and attention over packed sequences."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from megatron_sdsearch.config import ModelConfig
from megatron_sdsearch.errors import ConfigError
from megatron_sdsearch.model.architecture import PackedAttention, RMSNorm, transformer_config
from megatron_sdsearch.model.hf_config import load_hf_config
from megatron_sdsearch.parallel.groups import ParallelState

# megatron warns of an option that it sets itself.
pytestmark = pytest.mark.filterwarnings("ignore:full scope is deprecated:UserWarning")

SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}


def write_config(folder: Path, content: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def qwen2(**changes: Any) -> dict[str, Any]:
    tree: dict[str, Any] = Qwen2Config(**SIZES).to_dict()
    return tree | changes


def qwen3(**changes: Any) -> dict[str, Any]:
    tree: dict[str, Any] = Qwen3Config(**SIZES, head_dim=16).to_dict()
    return tree | changes


def llama(**changes: Any) -> dict[str, Any]:
    tree: dict[str, Any] = LlamaConfig(**SIZES).to_dict()
    return tree | changes


KNOWN = "use one of llama, mistral, qwen2, qwen3"
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def make_parallel(**changes: Any) -> ParallelState:
    """A single process without groups, as far as a config is concerned."""
    single = {"rank": 0, "world_size": 1, "tp_rank": 0, "tp_size": 1, "pp_rank": 0, "pp_size": 1}
    others = {"dp_rank": 0, "dp_size": 1, "sequence_parallel": False, "tp_group": None, "pp_group": None}
    return ParallelState(**(single | others | {"device": torch.device("cpu")} | changes))


# What is taken and what is refused


@pytest.mark.parametrize(
    "tree",
    [qwen2(), qwen3(), llama(), llama(rope_parameters=LLAMA3), MistralConfig(**SIZES, sliding_window=None).to_dict()],
)
def test_supported_families_are_read(tmp_path: Path, tree: dict[str, Any]) -> None:
    config = load_hf_config(write_config(tmp_path, tree))
    assert config.model_type == tree["model_type"]
    assert config.intermediate_size == 96


@pytest.mark.parametrize(
    ("tree", "message", "fix"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported", KNOWN),
        ({"model_type": "gemma2"}, "model_type 'gemma2' is not supported", KNOWN),
        ({"model_type": "qwen3_moe"}, "model_type 'qwen3_moe' is not supported", KNOWN),
        (llama(attention_bias=True), "attention_bias is true in a llama", "use one without"),
        (llama(mlp_bias=True), "mlp_bias is true in a llama", "use one without"),
        (MistralConfig(**SIZES).to_dict(), "sliding_window is 4096", "use a model where it is null"),
        (
            qwen2(rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}),
            "rope_type 'yarn' is not supported",
            "default RoPE",
        ),
        (
            qwen3(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
            "rope_type 'linear' is not supported",
            "default RoPE",
        ),
        (qwen2(hidden_act="gelu"), "hidden_act 'gelu' is not supported", "use silu"),
        (qwen2(use_sliding_window=True), "some layers use sliding windows", "set use_sliding_window to false"),
        (qwen3(use_sliding_window=True), "some layers use sliding windows", "set use_sliding_window to false"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(
    tmp_path: Path, tree: dict[str, Any], message: str, fix: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_hf_config(write_config(tmp_path, tree))
    assert caught.value.field == "model.hf_dir"
    assert message in str(caught.value)
    assert fix in caught.value.fix


def test_rope_scaling_in_the_older_spelling_is_refused_too(tmp_path: Path) -> None:
    tree = qwen2(rope_scaling={"type": "yarn", "factor": 4.0}, rope_theta=1e6)
    del tree["rope_parameters"]
    with pytest.raises(ConfigError, match="rope_type 'yarn'"):
        load_hf_config(write_config(tmp_path, tree))


def test_a_folder_without_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no config\.json") as caught:
        load_hf_config(tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in str(caught.value)


@pytest.mark.parametrize("text", ["{", "{}", '{"model_type": "no-such-family"}'])
def test_a_config_that_transformers_cannot_read_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError):
        load_hf_config(tmp_path)


def test_a_config_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"num_hidden_layers.*layer_types"):
        load_hf_config(write_config(tmp_path, qwen2(layer_types=["full_attention"])))


def test_key_value_heads_that_no_group_shares_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="num_key_value_heads = 4 does not divide num_attention_heads"):
        load_hf_config(write_config(tmp_path, qwen2(num_key_value_heads=4)))


def test_biases_that_would_be_dropped_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="attention_bias"):
        load_hf_config(write_config(tmp_path, qwen3(attention_bias=True)))


# megatron's config


def test_the_families_differ_in_bias_and_norm_of_queries() -> None:
    two = transformer_config(Qwen2Config(**SIZES), ModelConfig(hf_dir=Path("m")), make_parallel())
    three = transformer_config(Qwen3Config(**SIZES, head_dim=16), ModelConfig(hf_dir=Path("m")), make_parallel())
    assert (two.add_qkv_bias, two.qk_layernorm, two.kv_channels) == (True, False, 8)
    assert (three.add_qkv_bias, three.qk_layernorm, three.kv_channels) == (False, True, 16)


def test_megatrons_config_follows_the_models_and_the_layout() -> None:
    hf_config = Qwen2Config(**SIZES, rms_norm_eps=1e-5)
    layout = make_parallel(tp_size=2, pp_size=2, sequence_parallel=True)
    config = transformer_config(hf_config, ModelConfig(hf_dir=Path("m"), recompute="full"), layout)
    sizes = (config.num_layers, config.hidden_size, config.ffn_hidden_size)
    assert sizes == (4, 48, 96)
    assert (config.num_attention_heads, config.num_query_groups) == (6, 2)
    assert config.layernorm_epsilon == 1e-5
    parallel = (config.tensor_model_parallel_size, config.pipeline_model_parallel_size, config.sequence_parallel)
    assert parallel == (2, 2, True)
    assert (config.recompute_granularity, config.params_dtype) == ("full", torch.float32)
    assert (config.hidden_dropout, config.attention_dropout) == (0.0, 0.0), "old and new log-probabilities must agree"


def test_norms_mark_their_weight_for_sequence_parallel() -> None:
    layout = make_parallel(tp_size=2, sequence_parallel=True)
    sharded = transformer_config(Qwen2Config(**SIZES), ModelConfig(hf_dir=Path("m")), layout)
    whole = transformer_config(Qwen2Config(**SIZES), ModelConfig(hf_dir=Path("m")), make_parallel())
    assert RMSNorm(sharded, 48).weight.sequence_parallel is True  # type: ignore[attr-defined]
    assert RMSNorm(whole, 48).weight.sequence_parallel is False  # type: ignore[attr-defined]


# Attention over packed sequences


def attend(inputs: list[Tensor], lengths: list[int]) -> Tensor:
    boundaries = torch.tensor([0, *lengths]).cumsum(0).int()
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=boundaries, cu_seqlens_kv=boundaries)
    attention = PackedAttention(SimpleNamespace())  # it only keeps its config
    return attention(*inputs, None, packed)  # type: ignore[no-any-return]


def oracle(inputs: list[Tensor], lengths: list[int]) -> Tensor:
    """One sequence and one head at a time, with a mask written out."""
    query, key, value = inputs
    repeats = query.shape[1] // key.shape[1]
    rows, start = [], 0
    for length in lengths:
        part = slice(start, start + length)
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        heads = []
        for head in range(query.shape[1]):
            scores = query[part, head] @ key[part, head // repeats].T / query.shape[2] ** 0.5
            heads.append(F.softmax(scores.masked_fill(~mask, -torch.inf), dim=-1) @ value[part, head // repeats])
        rows.append(torch.cat(heads, dim=1))
        start += length
    return torch.cat(rows)


@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    groups=st.integers(1, 3),
    repeats=st.integers(1, 3),
    seed=st.integers(0, 100),
)
def test_packed_attention_is_causal_attention_of_each_sequence_alone(
    lengths: list[int], groups: int, repeats: int, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    total, width = sum(lengths), 4
    shapes = [(total, groups * repeats, width), (total, groups, width), (total, groups, width)]
    inputs = [torch.randn(shape, generator=random, dtype=torch.float64, requires_grad=True) for shape in shapes]
    output, expected = attend(inputs, lengths), oracle(inputs, lengths)
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
    weights = torch.randn(expected.shape, generator=random, dtype=torch.float64)
    gradients = torch.autograd.grad((output * weights).sum(), inputs)
    for gradient, other in zip(gradients, torch.autograd.grad((expected * weights).sum(), inputs), strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-9, atol=1e-9)
