"""Shapes of published models, and runs of them."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from megatron_sdsearch.allocation import Allocation, assign_roles
from megatron_sdsearch.config import RunConfig, parse_config
from megatron_sdsearch.model.shape import ModelShape
from megatron_sdsearch.plan.workload import Layout

QWEN_3B = Qwen2Config(
    vocab_size=151936,
    hidden_size=2048,
    intermediate_size=11008,
    num_hidden_layers=36,
    num_attention_heads=16,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)
QWEN_7B = Qwen2Config(
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    tie_word_embeddings=False,
)
QWEN3_4B = Qwen3Config(
    vocab_size=151936,
    hidden_size=2560,
    intermediate_size=9728,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    tie_word_embeddings=True,
)
LLAMA_1B = LlamaConfig(
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    tie_word_embeddings=True,
)
MODELS: dict[str, PretrainedConfig] = {
    "Qwen2.5-3B": QWEN_3B,
    "Qwen2.5-7B": QWEN_7B,
    "Qwen3-4B": QWEN3_4B,
    "Llama-3.2-1B": LLAMA_1B,
}


def shape_of(config: PretrainedConfig) -> ModelShape:
    return ModelShape.from_hf_config(config)


def layout_of(config: RunConfig, num_ranks: int = 8) -> Layout:
    """The configured layout on one node."""
    return Layout.from_config(config, assign_roles(config, Allocation(gpus_per_node=8, ranks_per_node=num_ranks)))


def run(**sections: dict[str, Any]) -> RunConfig:
    """A run in bf16 from colocated servers, but for ``sections``."""
    tree: dict[str, Any] = {
        "run_dir": "run",
        "model": {"hf_dir": "model", "dtype": "bfloat16"},
        "data": {"train": "train.jsonl"},
        "retrieval": {"engine": "http"},
        "rollout": {"engine": "sglang", "sglang": {"colocated": True, "num_servers": 8, "weight_sync": "distributed"}},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    return parse_config(tree)
