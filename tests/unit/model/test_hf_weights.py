"""The weight table: shards and back without loss, every tensor placed once, and a name for everything that is wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, Qwen2Config, Qwen3Config

from megatron_sdsearch.errors import DataError
from megatron_sdsearch.model.hf_weights import SafetensorsFolder, export_hf_weights, load_weights
from megatron_sdsearch.model.weight_table import GATE_UP, QKV, REPLICATED, ROW, VOCAB, placements
from megatron_sdsearch.parallel.groups import ParallelState

FAMILIES = {"qwen2": Qwen2Config, "qwen3": Qwen3Config}
Weights = dict[str, Tensor]


@st.composite
def layouts(draw: st.DrawFn) -> tuple[PretrainedConfig, int]:
    """A config and a tensor-parallel size that fits it."""
    size = draw(st.sampled_from([1, 2, 3, 4]))
    groups = size * draw(st.integers(1, 3))
    config = Qwen3Config(
        vocab_size=draw(st.integers(1, 40)),
        hidden_size=draw(st.integers(1, 5)) * size,
        intermediate_size=draw(st.integers(1, 5)) * size,
        num_attention_heads=groups * draw(st.integers(1, 3)),
        num_key_value_heads=groups,
        head_dim=draw(st.sampled_from([2, 4])),
        num_hidden_layers=1,
    )
    return config, size


def numbered(*shape: int, start: int = 0) -> Tensor:
    """Every entry another number, so that no permutation goes unseen."""
    count = int(torch.tensor(shape).prod())
    return torch.arange(start, start + count, dtype=torch.float64).reshape(shape)


def qkv(config: PretrainedConfig, width: int | None) -> list[Tensor]:
    """Query, key and value weights [rows, width], or biases [rows]; row numbers tell where a row came from."""
    rows = [config.num_attention_heads * config.head_dim, *[config.num_key_value_heads * config.head_dim] * 2]
    return [numbered(*((r,) if width is None else (r, width)), start=10_000 * i) for i, r in enumerate(rows)]


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    for our, their in zip(ours, theirs, strict=True):
        assert torch.equal(our, their)


@given(layouts())
def test_join_is_the_inverse_of_split(layout: tuple[PretrainedConfig, int]) -> None:
    config, size = layout
    width = config.hidden_size
    gate, up = numbered(config.intermediate_size, width), numbered(config.intermediate_size, width, start=10_000)
    for rule, tensors in (
        (QKV, qkv(config, width)),
        (QKV, qkv(config, None)),
        (GATE_UP, [gate, up]),
        (ROW, [numbered(width, config.intermediate_size)]),
        (VOCAB, [numbered(config.vocab_size, width)]),
        (REPLICATED, [numbered(width)]),
    ):
        shards = rule.split(tensors, size, config)
        assert len(shards) == size
        assert len({shard.shape for shard in shards}) == 1, "ranks hold equal parts"
        assert_equal(rule.join(shards, config), tensors)


@given(layouts())
def test_a_qkv_shard_holds_whole_groups_in_megatrons_order(layout: tuple[PretrainedConfig, int]) -> None:
    config, size = layout
    query, key, value = qkv(config, 3)
    width, heads = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    rows: list[Tensor] = []
    for group in range(config.num_key_value_heads):
        rows.append(query[group * heads * width : (group + 1) * heads * width])
        rows += [tensor[group * width : (group + 1) * width] for tensor in (key, value)]
    per_rank = 3 * config.num_key_value_heads // size
    expected = [torch.cat(rows[rank * per_rank : (rank + 1) * per_rank]) for rank in range(size)]
    assert_equal(QKV.split([query, key, value], size, config), expected)


@given(layouts())
def test_a_gate_up_shard_holds_this_ranks_half_of_each(layout: tuple[PretrainedConfig, int]) -> None:
    config, size = layout
    gate, up = numbered(config.intermediate_size, 2), numbered(config.intermediate_size, 2, start=10_000)
    part = config.intermediate_size // size
    own = [slice(rank * part, (rank + 1) * part) for rank in range(size)]
    assert_equal(GATE_UP.split([gate, up], size, config), [torch.cat([gate[rows], up[rows]]) for rows in own])


@given(layouts())
def test_the_padding_of_the_vocabulary_is_zero_behind_the_table_and_removed_again(
    layout: tuple[PretrainedConfig, int],
) -> None:
    config, size = layout
    table = numbered(config.vocab_size, 2, start=1)
    whole = torch.cat(VOCAB.split([table], size, config))
    assert len(whole) % size == 0
    assert len(whole) - config.vocab_size < size
    assert torch.equal(whole[: config.vocab_size], table)
    assert not whole[config.vocab_size :].any()
    assert_equal(VOCAB.join([whole], config), [table])


# The table against transformers


def tiny_config(family: str, *, is_tied: bool = False, **changes: Any) -> PretrainedConfig:
    sizes: dict[str, Any] = {
        "vocab_size": 13,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "tie_word_embeddings": is_tied,
    }
    config: PretrainedConfig = FAMILIES[family](**sizes | changes)
    return config


def save_model(folder: Path, config: PretrainedConfig) -> Weights:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def stage(tp_rank: int = 0, tp_size: int = 1, pp_rank: int = 0, pp_size: int = 1) -> ParallelState:
    """One rank without process groups: enough to load, and to export where there is only one."""
    return ParallelState(
        rank=0,
        world_size=1,
        tp_rank=tp_rank,
        tp_size=tp_size,
        pp_rank=pp_rank,
        pp_size=pp_size,
        dp_rank=0,
        dp_size=1,
        sequence_parallel=False,
        tp_group=None,  # type: ignore[arg-type]
        pp_group=None,  # type: ignore[arg-type]
        device=torch.device("cpu"),
    )


class FakeGPT:
    """Names and shapes of a megatron stage under the local spec, worked out from the sizes alone."""

    def __init__(self, config: PretrainedConfig, parallel: ParallelState) -> None:
        tp, h, d = parallel.tp_size, config.hidden_size, config.head_dim
        heads, groups, ffn = config.num_attention_heads, config.num_key_value_heads, config.intermediate_size
        vocab = -(-config.vocab_size // tp)
        shapes: dict[str, tuple[int, ...]] = {}
        if parallel.is_first_stage:
            shapes["embedding.word_embeddings.weight"] = (vocab, h)
        for layer in range(config.num_hidden_layers // parallel.pp_size):
            prefix = f"decoder.layers.{layer}."
            shapes |= {
                prefix + "input_layernorm.weight": (h,),
                prefix + "self_attention.linear_qkv.weight": ((heads + 2 * groups) * d // tp, h),
                prefix + "self_attention.linear_proj.weight": (h, heads * d // tp),
                prefix + "pre_mlp_layernorm.weight": (h,),
                prefix + "mlp.linear_fc1.weight": (2 * ffn // tp, h),
                prefix + "mlp.linear_fc2.weight": (h, ffn // tp),
            }
            if config.model_type == "qwen2":
                shapes[prefix + "self_attention.linear_qkv.bias"] = ((heads + 2 * groups) * d // tp,)
            else:
                shapes |= {prefix + f"self_attention.{n}_layernorm.weight": (d,) for n in "qk"}
        if parallel.is_last_stage:
            shapes["decoder.final_layernorm.weight"] = (h,)
            if not (config.tie_word_embeddings and parallel.is_first_stage):
                shapes["output_layer.weight"] = (vocab, h)
        self.parameters = {name: torch.full(shape, torch.nan) for name, shape in shapes.items()}

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.parameters.items()


def load(folder: Path, config: PretrainedConfig, parallel: ParallelState | None = None) -> FakeGPT:
    parallel = parallel or stage()
    gpt = FakeGPT(config, parallel)
    load_weights(gpt, SafetensorsFolder(folder), folder, config, parallel)
    return gpt


def refusal(folder: Path, config: PretrainedConfig) -> str:
    with pytest.raises(DataError) as caught:
        load(folder, config)
    return str(caught.value)


@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_the_model_has_one_place(tmp_path: Path, family: str, is_tied: bool) -> None:
    config = tiny_config(family, is_tied=is_tied)
    weights = save_model(tmp_path, config)
    for pp_size in (1, 2, 4):
        placed = list(placements(config, pp_size))
        names = [name for placement in placed for name in placement.hf]
        assert sorted(names) == sorted(weights)
        stages = [placement.stage for placement in placed]
        assert stages == sorted(stages), "in order, so that no stage waits for one behind it"
        assert set(stages) == set(range(pp_size))


@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loading_fills_everything_and_export_gives_it_back(tmp_path: Path, family: str, is_tied: bool) -> None:
    config = tiny_config(family, is_tied=is_tied)
    weights = save_model(tmp_path, config)
    gpt = load(tmp_path, config)
    assert not any(parameter.isnan().any() for parameter in gpt.parameters.values())
    exported = dict(export_hf_weights(gpt, config, stage()))
    assert exported.keys() == weights.keys()
    assert [name for name in weights if not torch.equal(exported[name], weights[name])] == []


@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_shards_of_all_ranks_make_up_the_model(tmp_path: Path, family: str, is_tied: bool) -> None:
    config = tiny_config(family, is_tied=is_tied)
    weights = save_model(tmp_path, config)
    grid = [[load(tmp_path, config, stage(tp, 2, pp, 2)).parameters for tp in range(2)] for pp in range(2)]
    for placement in placements(config, 2):
        (name,) = [name for name in placement.megatron if name in grid[placement.stage][0]]
        joined = placement.layout.join([shard[name] for shard in grid[placement.stage]], config)
        assert_equal(joined, [weights[source] for source in placement.hf])


def test_the_last_stage_gets_its_copy_of_a_tied_table(tmp_path: Path) -> None:
    config = tiny_config("qwen2", is_tied=True)
    weights = save_model(tmp_path, config)
    shards = [load(tmp_path, config, stage(tp, 2, 1, 2)).parameters["output_layer.weight"] for tp in range(2)]
    assert_equal(VOCAB.join(shards, config), [weights["model.embed_tokens.weight"]])


def test_weights_in_several_files_are_found_by_their_index(tmp_path: Path) -> None:
    config = tiny_config("qwen2")
    weights = save_model(tmp_path, config)
    expected = load(tmp_path, config).parameters
    (tmp_path / "model.safetensors").unlink()
    split_in_two(tmp_path, weights)
    loaded = load(tmp_path, config).parameters
    assert [name for name in expected if not torch.equal(expected[name], loaded[name])] == []


def split_in_two(folder: Path, weights: Weights) -> dict[str, str]:
    file_of = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(weights)}
    for file in set(file_of.values()):
        save_file({name: weights[name] for name in weights if file_of[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": file_of}))
    return file_of


# What is wrong is named


SOURCES = [
    "model.embed_tokens.weight",
    "model.layers.2.self_attn.k_proj.weight",
    "model.layers.2.self_attn.v_proj.bias",
    "model.layers.2.self_attn.o_proj.weight",
    "model.layers.2.mlp.up_proj.weight",
    "model.layers.2.mlp.down_proj.weight",
    "model.layers.2.input_layernorm.weight",
    "model.norm.weight",
    "lm_head.weight",
]


@pytest.mark.parametrize("name", SOURCES)
def test_a_missing_tensor_is_named_with_its_file(tmp_path: Path, name: str) -> None:
    config = tiny_config("qwen2")
    weights = save_model(tmp_path, config)
    del weights[name]
    save_file(weights, tmp_path / "model.safetensors")
    where = tmp_path if name == "lm_head.weight" else tmp_path / "model.safetensors"  # of a head, config.json is asked
    assert refusal(tmp_path, config).startswith(f"{where} has no tensor {name}")


@pytest.mark.parametrize("name", SOURCES)
def test_a_tensor_with_twice_the_rows_is_named_with_both_shapes(tmp_path: Path, name: str) -> None:
    config = tiny_config("qwen2")
    weights = save_model(tmp_path, config)
    weights[name] = torch.cat([weights[name]] * 2)
    save_file(weights, tmp_path / "model.safetensors")
    message = refusal(tmp_path, config)
    assert name in message
    assert "the model expects" in message


# Rows that do not divide into query groups.
UNEVEN = [name for name in SOURCES if "k_proj" in name or "v_proj" in name]


@pytest.mark.parametrize("name", [name for name in SOURCES if name not in UNEVEN])
def test_a_tensor_with_one_row_more_is_named(tmp_path: Path, name: str) -> None:
    config = tiny_config("qwen2")
    weights = save_model(tmp_path, config)
    weights[name] = torch.cat([weights[name], weights[name][:1]])
    save_file(weights, tmp_path / "model.safetensors")
    assert name in refusal(tmp_path, config)


@pytest.mark.parametrize("name", UNEVEN)
def test_a_tensor_that_does_not_divide_into_groups_is_named(tmp_path: Path, name: str) -> None:
    test_a_tensor_with_one_row_more_is_named(tmp_path, name)


def test_weights_of_a_wider_model_are_refused(tmp_path: Path) -> None:
    save_model(tmp_path, tiny_config("qwen2", hidden_size=16))
    assert "model.embed_tokens.weight: (13, 16) per shard, the model expects (13, 8)" in refusal(
        tmp_path, tiny_config("qwen2")
    )


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    assert f"{tmp_path / 'model.safetensors'} does not exist" in refusal(tmp_path, tiny_config("qwen2"))


def test_a_file_that_the_index_names_and_that_is_missing_is_named(tmp_path: Path) -> None:
    config = tiny_config("qwen2")
    weights = save_model(tmp_path, config)
    (tmp_path / "model.safetensors").unlink()
    file_of = split_in_two(tmp_path, weights)
    missing = file_of["lm_head.weight"]
    (tmp_path / missing).unlink()
    assert f"{tmp_path / missing} does not exist" in refusal(tmp_path, config)


def test_a_parameter_that_no_weight_fills_is_named(tmp_path: Path) -> None:
    config = tiny_config("qwen2")
    save_model(tmp_path, config)
    gpt = FakeGPT(config, stage())
    gpt.parameters["decoder.layers.0.mlp.extra.weight"] = torch.zeros(2)
    with pytest.raises(DataError, match=r"no weight in .* for decoder\.layers\.0\.mlp\.extra\.weight"):
        load_weights(gpt, SafetensorsFolder(tmp_path), tmp_path, config, stage())


def test_a_model_that_lacks_a_parameter_of_the_table_is_refused(tmp_path: Path) -> None:
    config = tiny_config("qwen2")
    save_model(tmp_path, config)
    gpt = FakeGPT(config, stage())
    del gpt.parameters["decoder.layers.3.mlp.linear_fc2.weight"]
    with pytest.raises(DataError, match=r"has none of decoder\.layers\.3\.mlp\.linear_fc2\.weight"):
        load_weights(gpt, SafetensorsFolder(tmp_path), tmp_path, config, stage())
