"""Conversion of whole folders: bit by bit there and back, carried-over files, and nothing half-written left behind."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from megatron_sdsearch.errors import CheckpointError, ConfigError, DataError
from megatron_sdsearch.model.convert import TorchDistWriter, to_hf, to_megatron
from megatron_sdsearch.model.megatron_folder import TorchDistReader, find_checkpoint, find_hf_dir

FAMILIES: dict[str, tuple[Callable[..., PretrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "mistral": (MistralConfig, {"sliding_window": None}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {}),
}
Weights = dict[str, Tensor]


def make_model(
    folder: Path, family: str, *, is_tied: bool = False, dtype: torch.dtype = torch.bfloat16, shard: str = "5GB"
) -> Path:
    config_class, extra = FAMILIES[family]
    config = config_class(
        vocab_size=13,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=4,
        tie_word_embeddings=is_tied,
        **extra,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def weights_of(folder: Path) -> Weights:
    tensors: Weights = {}
    for file in sorted(folder.glob("model*.safetensors")):
        tensors |= load_file(file)
    return tensors


def assert_same(ours: Weights, theirs: Weights) -> None:
    assert ours.keys() == theirs.keys()
    for name, their in theirs.items():
        assert ours[name].dtype == their.dtype, name
        assert torch.equal(ours[name], their), name


def rewrite(folder: Path, change: Callable[[Weights], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **changes: Any) -> None:
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(tree | changes))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], Path]:
    root = tmp_path_factory.mktemp("models")

    def get(family: str, is_tied: bool) -> Path:
        folder = root / f"{family}-{is_tied}"
        return folder if folder.exists() else make_model(folder, family, is_tied=is_tied)

    return get


# There and back


@given(
    family=st.sampled_from(sorted(FAMILIES)),
    is_tied=st.booleans(),
    tensor=st.sampled_from([1, 2, 4]),
    pipeline=st.sampled_from([1, 2, 4]),
)
@settings(max_examples=25)
def test_there_and_back_is_the_same_bit_by_bit(
    models: Callable[[str, bool], Path],
    tmp_path_factory: pytest.TempPathFactory,
    family: str,
    is_tied: bool,
    tensor: int,
    pipeline: int,
) -> None:
    hf_dir, out = models(family, is_tied), tmp_path_factory.mktemp("out")
    seen: list[tuple[int, int]] = []
    there = to_megatron(
        hf_dir, out / "mg", tensor=tensor, pipeline=pipeline, progress=lambda done, total: seen.append((done, total))
    )
    assert len(list((out / "mg").glob("*.distcp"))) == pipeline
    size = sum(weight.nbytes for weight in weights_of(hf_dir).values())
    assert seen[-1] == (size, size)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    back = to_hf(out / "mg", out / "hf", hf_dir=find_hf_dir(out / "mg"))
    assert there == back
    assert there.num_bytes == size
    assert (out / "hf" / "model.safetensors").read_bytes() == (hf_dir / "model.safetensors").read_bytes()
    assert (out / "hf" / "config.json").read_bytes() == (hf_dir / "config.json").read_bytes()
    assert sorted(path.name for path in out.iterdir()) == ["hf", "mg"]


def test_padding_and_layout_are_in_the_checkpoint_and_not_in_the_export(tmp_path: Path) -> None:
    hf_dir = make_model(tmp_path / "m", "qwen2")
    to_megatron(hf_dir, tmp_path / "mg", tensor=4)
    reader = TorchDistReader(tmp_path / "mg")
    assert reader.tensors["embedding.word_embeddings.weight"].size == (16, 8)
    assert not reader.read("embedding.word_embeddings.weight")[13:].any()
    assert reader.tensors["decoder.layers.mlp.linear_fc1.weight"].size == (4, 24, 8)
    weights = weights_of(hf_dir)
    gate_up = [weights[f"model.layers.2.mlp.{name}_proj.weight"] for name in ("gate", "up")]
    assert torch.equal(reader.read("decoder.layers.mlp.linear_fc1.weight", 2), torch.cat(gate_up)), "whole, not by rank"
    to_hf(tmp_path / "mg", tmp_path / "hf", hf_dir=hf_dir)
    assert weights_of(tmp_path / "hf")["model.embed_tokens.weight"].shape == (13, 8)


def test_everything_but_weights_is_carried_over(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    hf_dir = make_model(tmp_path / "m", "llama", shard="1KB")
    assert len(list(hf_dir.glob("*.safetensors"))) > 3
    tokenizer.save_pretrained(hf_dir)
    (hf_dir / "additional_chat_templates").mkdir()
    (hf_dir / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (hf_dir / "consolidated.00.pth").write_text("Llama's own weights")
    (hf_dir / "consolidated.safetensors").write_text("Mistral's own weights")
    to_megatron(hf_dir, tmp_path / "mg", tensor=2)
    to_hf(tmp_path / "mg", tmp_path / "hf", hf_dir=tmp_path / "mg" / "hf")
    kept = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    for folder in (tmp_path / "mg" / "hf", tmp_path / "hf"):
        names = {path.name for path in folder.iterdir()}
        assert names - {"model.safetensors", "special_tokens_map.json"} == kept | {"additional_chat_templates"}
        for name in kept | {"additional_chat_templates/tools.jinja"}:
            assert (folder / name).read_bytes() == (hf_dir / name).read_bytes(), name
    assert_same(weights_of(tmp_path / "hf"), weights_of(hf_dir))


def test_shards_keep_to_their_size_and_are_indexed(tmp_path: Path) -> None:
    hf_dir = make_model(tmp_path / "m", "qwen3")
    to_megatron(hf_dir, tmp_path / "mg")
    to_hf(tmp_path / "mg", tmp_path / "hf", hf_dir=hf_dir, shard_bytes=1500)
    weights = weights_of(hf_dir)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in weights.values())
    files = {name: load_file(tmp_path / "hf" / name) for name in set(index["weight_map"].values())}
    assert len(files) > 3
    assert all(sum(t.nbytes for t in tensors.values()) <= 1500 for tensors in files.values())
    assert {name: file for file, tensors in files.items() for name in tensors} == index["weight_map"]
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "hf").state_dict(), weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_another_dtype_is_written_and_message(tmp_path: Path, dtype: torch.dtype) -> None:
    hf_dir = make_model(tmp_path / "m", "qwen2", is_tied=True)
    to_megatron(hf_dir, tmp_path / "mg")
    to_hf(tmp_path / "mg", tmp_path / "hf", hf_dir=hf_dir, dtype=dtype)
    assert_same(weights_of(tmp_path / "hf"), {n: w.to(dtype) for n, w in weights_of(hf_dir).items()})
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    assert config["tie_word_embeddings"] is True


def test_a_tied_table_that_was_written_twice_is_taken_once(tmp_path: Path) -> None:
    hf_dir = make_model(tmp_path / "m", "qwen2", is_tied=True)
    rewrite(hf_dir, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    to_megatron(hf_dir, tmp_path / "mg")
    to_hf(tmp_path / "mg", tmp_path / "hf", hf_dir=hf_dir)
    assert "lm_head.weight" not in weights_of(tmp_path / "hf")


# What is wrong is named, and leaves nothing behind


def drop(name: str) -> Callable[[Weights], object]:
    return lambda weights: weights.pop(name)


def put(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Weights], object]:
    return lambda weights: weights.update({name: change(weights[name])})


K_PROJ = "model.layers.2.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop(K_PROJ), f"has no tensor {K_PROJ}"),
        (drop("lm_head.weight"), "has no tensor lm_head.weight"),
        (put(K_PROJ, lambda w: w[:8].clone()), rf"{K_PROJ} is \(8, 8\), the model of config.json expects \(16, 8\)"),
        (put("model.norm.weight", lambda w: torch.cat([w, w])), r"model.norm.weight is \(16,\)"),
        (lambda w: w.update({"model.layers.4.extra": torch.ones(1)}), "1 tensors that a qwen2 does not have: "),
        (put(K_PROJ, lambda w: w.float()), f"{K_PROJ} is F32 and .* BF16: they become one tensor"),
    ],
)
def test_wrong_weights_are_refused_before_anything_is_written(
    tmp_path: Path, change: Callable[[Weights], object], message: str
) -> None:
    hf_dir = make_model(tmp_path / "m", "qwen2")
    rewrite(hf_dir, change)
    with pytest.raises(DataError, match=message):
        to_megatron(hf_dir, tmp_path / "mg", tensor=2)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_head_that_is_tied_in_name_only_is_refused(tmp_path: Path) -> None:
    hf_dir = make_model(tmp_path / "m", "qwen2")
    edit_config(hf_dir, tie_word_embeddings=True)
    with pytest.raises(DataError, match=r"the two differ"):
        to_megatron(hf_dir, tmp_path / "mg")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen3_moe"}, "'qwen3_moe' is not supported"),
        ({"model_type": "llama", "mlp_bias": True}, "mlp_bias is true"),
        ({"model_type": "llama", "attention_bias": True}, "attention_bias is true"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3 does not divide num_attention_heads = 4"),
        ({"intermediate_size": 6}, "4 does not divide .* intermediate_size = 6"),
    ],
)
def test_a_wrong_architecture_or_layout_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    hf_dir = make_model(tmp_path / "m", "qwen2")
    edit_config(hf_dir, **changes)
    with pytest.raises(ConfigError, match=message):
        to_megatron(hf_dir, tmp_path / "mg", tensor=4)
    assert not (tmp_path / "mg").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 5}, "layer_norm_weight has 4 layers, the model of config.json 5"),
        ({"intermediate_size": 16}, r"mlp.gate_proj.weight is \(12, 8\), the model of config.json expects \(16, 8\)"),
        ({"vocab_size": 17}, r"embed_tokens.weight is \(14, 8\), .* expects \(17, 8\)"),
        ({"model_type": "llama"}, "tensors that a llama does not have: decoder.layers.self_attention.linear_qkv.bias"),
        ({"model_type": "qwen3"}, "tensors that a qwen3 does not have: decoder.layers.self_attention.linear_qkv.bias"),
        (
            {"num_attention_heads": 2, "num_key_value_heads": 2},
            r"linear_qkv.weight is \(48, 8\), which does not fit config.json",
        ),
    ],
)
def test_a_config_of_another_model_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    hf_dir = make_model(tmp_path / "m", "qwen2")
    to_megatron(hf_dir, tmp_path / "mg", tensor=2)
    edit_config(hf_dir, layer_types=None, **changes)
    with pytest.raises(DataError, match=message):
        to_hf(tmp_path / "mg", tmp_path / "hf", hf_dir=hf_dir)
    assert not (tmp_path / "hf").exists()


def test_a_config_with_fewer_layers_than_the_checkpoint_is_refused(tmp_path: Path) -> None:
    hf_dir = make_model(tmp_path / "m", "qwen2")
    to_megatron(hf_dir, tmp_path / "mg")
    edit_config(hf_dir, layer_types=None, num_hidden_layers=3)
    with pytest.raises(DataError, match=r"has 4 layers, the model of config.json 3"):
        to_hf(tmp_path / "mg", tmp_path / "hf", hf_dir=hf_dir)


def test_a_failure_in_the_middle_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    hf_dir = make_model(tmp_path / "m", "qwen2")
    to_megatron(hf_dir, tmp_path / "mg", pipeline=2)
    before = {path.name: path.read_bytes() for path in (tmp_path / "mg").iterdir() if path.is_file()}

    def refuse(_: Path) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        to_megatron(hf_dir, tmp_path / "mg", check=refuse)
    assert {path.name: path.read_bytes() for path in (tmp_path / "mg").iterdir() if path.is_file()} == before
    shard = tmp_path / "mg" / "__1_0.distcp"
    os.truncate(shard, shard.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=r"__1_0.distcp is damaged at"):
        to_hf(tmp_path / "mg", tmp_path / "hf", hf_dir=hf_dir)
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"__1_0.distcp is missing"):
        to_hf(tmp_path / "mg", tmp_path / "hf", hf_dir=hf_dir)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "mg"]


# Checkpoint folders


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("content", [b"", b"no pickle", None])
def test_metadata_that_is_damaged_or_runs_code_is_refused(tmp_path: Path, content: bytes | None) -> None:
    victim = tmp_path / "victim"
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Evil(victim)) if content is None else content)
    with pytest.raises(CheckpointError, match=r"cannot be read"):
        TorchDistReader(tmp_path)
    assert not victim.exists()


def test_a_tensor_of_which_a_piece_was_never_written_is_incomplete(tmp_path: Path) -> None:
    writer = TorchDistWriter(tmp_path)
    writer.add(0, "whole", (4, 2), (0, 0), torch.ones(2, 2))
    writer.finish({})
    with pytest.raises(CheckpointError, match=r"whole is incomplete, it has 4 of 8"):
        TorchDistReader(tmp_path).read("whole")


def test_pieces_are_put_where_they_belong_and_views_do_not_bring_their_storage(tmp_path: Path) -> None:
    whole = torch.arange(1_000_000.0).reshape(1000, 1000)
    writer = TorchDistWriter(tmp_path)
    for rank, columns in enumerate((slice(0, 3), slice(3, 4))):
        piece = whole[:2, columns].contiguous()
        writer.add(rank, "some", (2, 4), (0, columns.start), piece)
    writer.add(0, "rows", (1, 1000), (0, 0), whole[7:8])
    writer.finish({})
    reader = TorchDistReader(tmp_path)
    assert torch.equal(reader.read("some"), whole[:2, :4])
    assert torch.equal(reader.read("rows", 0), whole[7])
    assert (tmp_path / "__0_0.distcp").stat().st_size < 20_000


def test_a_run_a_checkpoints_folder_and_a_step_all_lead_to_the_checkpoint(tmp_path: Path) -> None:
    step = tmp_path / "run" / "checkpoints" / "step_000003"
    step.mkdir(parents=True)
    (step / ".metadata").touch()
    (step.parent / "latest").write_text("step_000003")
    assert [find_checkpoint(path) for path in (step, step.parent, tmp_path / "run")] == [step] * 3
    with pytest.raises(CheckpointError, match=r"is not a checkpoint"):
        find_checkpoint(tmp_path)
    (step.parent / "latest").write_text("step_000004")
    with pytest.raises(CheckpointError, match=r"step_000004, which is not a complete"):
        find_checkpoint(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"give --hf-dir"):
        find_hf_dir(step)


def test_layers_that_are_not_stacked_are_read_as_well(tmp_path: Path) -> None:
    hf_dir = make_model(tmp_path / "m", "qwen3")
    to_megatron(hf_dir, tmp_path / "mg")
    reader = TorchDistReader(tmp_path / "mg")
    (tmp_path / "flat").mkdir()
    writer = TorchDistWriter(tmp_path / "flat")
    for key in sorted(reader.tensors):
        is_stacked = key.startswith("decoder.layers.")
        for layer in range(4) if is_stacked else [None]:
            name = key if layer is None else key.replace("decoder.layers.", f"decoder.layers.{layer}.")
            tensor = reader.read(key, layer)
            writer.add(0, name, tensor.shape, (0,) * tensor.dim(), tensor)
    writer.finish({})
    to_hf(tmp_path / "flat", tmp_path / "hf", hf_dir=hf_dir)
    assert_same(weights_of(tmp_path / "hf"), weights_of(hf_dir))
