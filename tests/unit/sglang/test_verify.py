"""The hashes that a server with the trainer's weights reports, against a plain account of SGLang's model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config

from megatron_sdsearch.sglang.publish import probe_ids
from megatron_sdsearch.sglang.transports import WeightHashes
from tests.loopback.fake_weights import FakeWeights


def model_weights(family: str, *, is_tied: bool, vocab_size: int = 101) -> dict[str, Tensor]:
    torch.manual_seed(0)
    config_class = {"qwen2": Qwen2Config, "qwen3": Qwen3Config}[family]
    config = config_class(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        tie_word_embeddings=is_tied,
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    return {name: p.detach() for name, p in model.named_parameters()}


def hashes_of(weights: dict[str, Tensor]) -> dict[str, str]:
    hashes = WeightHashes(is_needed=True)
    passed = list(hashes.watch(weights.items()))
    assert all(tensor is weights[name] for name, tensor in passed)
    assert [name for name, _ in passed] == list(weights)
    return hashes.by_name()


def served(weights: dict[str, Tensor]) -> dict[str, str]:
    fake = FakeWeights()
    fake.tensors = weights
    return fake.checksums()


@pytest.mark.parametrize("vocab_size", [101, 128])
@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_hashes_are_those_of_sglangs_tensors(family: str, is_tied: bool, vocab_size: int) -> None:
    weights = model_weights(family, is_tied=is_tied, vocab_size=vocab_size)
    assert hashes_of(weights) == served(weights)
    halves = {name: tensor.bfloat16() for name, tensor in weights.items()}
    assert hashes_of(halves) == served(halves)


def test_fused_tensors_have_one_name_each() -> None:
    names = hashes_of(model_weights("qwen2", is_tied=True)).keys()
    layer = "model.layers.1."
    assert {name.removeprefix(layer) for name in names if name.startswith(layer)} == {
        "input_layernorm.weight",
        "mlp.down_proj.weight",
        "mlp.gate_up_proj.weight",
        "post_attention_layernorm.weight",
        "self_attn.o_proj.weight",
        "self_attn.qkv_proj.bias",
        "self_attn.qkv_proj.weight",
    }
    assert "lm_head.weight" not in names


def test_a_change_of_any_tensor_changes_one_hash() -> None:
    weights = model_weights("qwen2", is_tied=False)
    before = hashes_of(weights)
    for name, tensor in weights.items():
        changed = tensor.clone()
        changed.view(-1)[-1] += 1
        after = hashes_of(weights | {name: changed})
        assert sum(before[other] != after[other] for other in before) == 1, name


def test_the_sequence_of_the_probe_is_fixed_and_inside_the_vocabulary() -> None:
    assert probe_ids(50) == probe_ids(50)
    assert len(probe_ids(50)) == 64
    assert set(probe_ids(50)) <= set(range(50))
