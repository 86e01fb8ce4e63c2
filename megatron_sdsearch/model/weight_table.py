"""The weight table: maps Hugging Face tensors to tensors of megatron's model, and defines how they are sharded.

Loading, export, conversion of checkpoints (``convert.py``) and weight sync to rollout engines all use these rules.
docs/adding-a-model.md explains how to add an architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig

from megatron_sdsearch.model.shape import ARCHITECTURES, head_dim, padded_vocab_size

HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Converts Hugging Face tensors to the shards of one megatron tensor, and back.

    Attributes:
        split: (HF tensors, tp_size, config) -> one tensor per tensor-parallel rank.
        join: the inverse of ``split``; removes padding.
    """

    split: Callable[[list[Tensor], int, PretrainedConfig], list[Tensor]]
    join: Callable[[list[Tensor], PretrainedConfig], list[Tensor]]


def _split_vocab(tensors: list[Tensor], size: int, config: PretrainedConfig) -> list[Tensor]:
    # Zeros after the table give all ranks the same number of rows.
    padding = padded_vocab_size(config.vocab_size, size) - config.vocab_size
    return list(torch.nn.functional.pad(tensors[0], (0, 0, 0, padding)).chunk(size))


def _split_qkv(tensors: list[Tensor], size: int, config: PretrainedConfig) -> list[Tensor]:
    # megatron keeps each query group's heads together: [q of the group, k, v] for every group in turn.
    grouped = [tensor.unflatten(0, (config.num_key_value_heads, -1)) for tensor in tensors]
    return list(torch.cat(grouped, dim=1).flatten(0, 1).chunk(size))


def _join_qkv(shards: list[Tensor], config: PretrainedConfig) -> list[Tensor]:
    groups, width = config.num_key_value_heads, head_dim(config)
    grouped = torch.cat(shards).unflatten(0, (groups, -1))
    sizes = [width * (config.num_attention_heads // groups), width, width]
    return [part.flatten(0, 1).contiguous() for part in grouped.split(sizes, dim=1)]


def _split_gate_up(tensors: list[Tensor], size: int, config: PretrainedConfig) -> list[Tensor]:
    # Each rank stacks its part of the gate on its part of the up projection.
    gate, up = (tensor.chunk(size) for tensor in tensors)
    return [torch.cat(pair) for pair in zip(gate, up, strict=True)]


def _join_gate_up(shards: list[Tensor], config: PretrainedConfig) -> list[Tensor]:
    halves = [shard.chunk(2) for shard in shards]
    return [torch.cat([half[part] for half in halves]) for part in (0, 1)]


REPLICATED = Layout(split=lambda t, size, _: [t[0]] * size, join=lambda shards, _: [shards[0]])
ROW = Layout(split=lambda t, size, _: list(t[0].chunk(size, dim=1)), join=lambda s, _: [torch.cat(s, dim=1)])
VOCAB = Layout(split=_split_vocab, join=lambda shards, config: [torch.cat(shards)[: config.vocab_size]])
QKV = Layout(split=_split_qkv, join=_join_qkv)
GATE_UP = Layout(split=_split_gate_up, join=_join_gate_up)


@dataclass(frozen=True, slots=True)
class Rule:
    """One megatron tensor and its Hugging Face sources.

    Attributes:
        megatron: its names inside a layer (or the model) with the local spec and with transformer-engine's; the last
            one is also its name in checkpoints, with either spec.
        hf: names of the sources inside a layer (or the model), in the order the layout expects.
        layout: converts the sources to shards and back.
    """

    megatron: tuple[str, ...]
    hf: tuple[str, ...]
    layout: Layout


def layer_rules(config: PretrainedConfig) -> list[Rule]:
    """List the rules of one decoder layer."""
    architecture, qkv, fc1 = ARCHITECTURES[config.model_type], "self_attention.linear_qkv", "mlp.linear_fc1"
    q_k_v = [f"self_attn.{name}_proj" for name in "qkv"]
    rules = [
        Rule(("input_layernorm.weight", f"{qkv}.layer_norm_weight"), ("input_layernorm.weight",), REPLICATED),
        Rule((f"{qkv}.weight",), tuple(f"{name}.weight" for name in q_k_v), QKV),
        Rule(("self_attention.linear_proj.weight",), ("self_attn.o_proj.weight",), ROW),
        Rule(
            ("pre_mlp_layernorm.weight", f"{fc1}.layer_norm_weight"), ("post_attention_layernorm.weight",), REPLICATED
        ),
        Rule((f"{fc1}.weight",), ("mlp.gate_proj.weight", "mlp.up_proj.weight"), GATE_UP),
        Rule(("mlp.linear_fc2.weight",), ("mlp.down_proj.weight",), ROW),
    ]
    if architecture.has_qkv_bias:
        rules.append(Rule((f"{qkv}.bias",), tuple(f"{name}.bias" for name in q_k_v), QKV))
    if architecture.has_qk_norm:
        names = [(f"self_attention.{n}_layernorm.weight", f"self_attn.{n}_norm.weight") for n in "qk"]
        rules += [Rule((megatron,), (hf,), REPLICATED) for megatron, hf in names]
    return rules


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement(Rule):
    """A rule applied to one layer, or to a tensor outside the layers; ``megatron`` and ``hf`` are full names.

    Attributes:
        stage: the pipeline stage that owns the tensor.
        key: name of the tensor in megatron checkpoints, which stack all layers.
        layer: index in that stack; None outside the layers.
    """

    stage: int
    key: str
    layer: int | None


def placements(config: PretrainedConfig, pp_size: int, *, has_head: bool | None = None) -> Iterator[Placement]:
    """Yield every tensor of the model, in Hugging Face order.

    Args:
        config: of the model.
        pp_size: number of pipeline stages.
        has_head: whether to yield the head; by default only if config.json does not tie it to the embedding.
    """

    def outside_layers(stage: int, megatron: str, hf: str, layout: Layout) -> Placement:
        return Placement(stage=stage, key=megatron, layer=None, megatron=(megatron,), hf=(hf,), layout=layout)

    yield outside_layers(0, "embedding.word_embeddings.weight", EMBEDDING, VOCAB)
    rules, per_stage = layer_rules(config), config.num_hidden_layers // pp_size
    for layer in range(config.num_hidden_layers):
        stage, local = divmod(layer, per_stage)
        for rule in rules:
            yield Placement(
                stage=stage,
                key=f"decoder.layers.{rule.megatron[-1]}",
                layer=layer,
                megatron=tuple(f"decoder.layers.{local}.{name}" for name in rule.megatron),
                hf=tuple(f"model.layers.{layer}.{name}" for name in rule.hf),
                layout=rule.layout,
            )
    yield outside_layers(pp_size - 1, "decoder.final_layernorm.weight", "model.norm.weight", REPLICATED)
    if has_head or (has_head is None and not config.tie_word_embeddings):
        yield outside_layers(pp_size - 1, "output_layer.weight", HEAD, VOCAB)
