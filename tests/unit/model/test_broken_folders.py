"""Files of a model's folder that cannot be used: one error that names file, key or tensor, and the fix."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PretrainedConfig

from megatron_sdsearch.config import load_config
from megatron_sdsearch.errors import ConfigError, DataError
from megatron_sdsearch.evaluation.evaluate import evaluate_folder
from megatron_sdsearch.model.convert import to_megatron
from megatron_sdsearch.model.hf_config import load_hf_config
from megatron_sdsearch.model.hf_weights import HFTensors, SafetensorsFolder, load_weights
from megatron_sdsearch.model.megatron_folder import MegatronFolder
from tests.unit.check.tiny_run import TinyRun, save_model
from tests.unit.model.test_convert import make_model
from tests.unit.model.test_hf_weights import FakeGPT, stage

V_PROJ = "model.layers.2.self_attn.v_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model", "qwen2", is_tied=True)


def change(folder: Path, name: str, how: Callable[[Tensor], Tensor]) -> None:
    weights = load_file(folder / "model.safetensors")
    weights[name] = how(weights[name])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def load(tensors: HFTensors, source: Path, config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> None:
    gpt = FakeGPT(config, stage())
    gpt.parameters = {name: tensor.to(dtype) for name, tensor in gpt.parameters.items()}
    load_weights(gpt, tensors, source, config, stage())


def with_one(value: float) -> Callable[[Tensor], Tensor]:
    def put(tensor: Tensor) -> Tensor:
        tensor.view(-1)[7] = value
        return tensor

    return put


# Weights that are no numbers


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named_when_it_is_loaded(folder: Path, value: float) -> None:
    change(folder, V_PROJ, with_one(value))
    change(folder, "model.norm.weight", with_one(value))
    message = rf"model\.safetensors: {V_PROJ} holds 1 numbers that are NaN or infinite; fetch"
    with pytest.raises(DataError, match=message):
        load(SafetensorsFolder(folder), folder, load_hf_config(folder))


def test_a_weight_of_a_megatron_checkpoint_that_is_not_finite_is_named(tmp_path: Path, folder: Path) -> None:
    change(folder, V_PROJ, with_one(float("nan")))
    to_megatron(folder, tmp_path / "mg")
    config = load_hf_config(folder)
    with pytest.raises(DataError, match=rf"mg: {V_PROJ} holds 1 numbers that are NaN"):
        load(MegatronFolder(tmp_path / "mg", config), tmp_path / "mg", config)


def test_a_weight_that_the_model_s_type_cannot_hold_is_named(folder: Path) -> None:
    change(folder, V_PROJ, with_one(1e30))
    config = load_hf_config(folder)
    load(SafetensorsFolder(folder), folder, config)
    with pytest.raises(DataError, match=r"v_proj\.weight: numbers too large for torch\.float16"):
        load(SafetensorsFolder(folder), folder, config, torch.float16)


def test_whole_numbers_are_no_weights(folder: Path) -> None:
    change(folder, "model.norm.weight", lambda tensor: tensor.to(torch.int8))
    with pytest.raises(DataError, match=r"model\.norm\.weight: torch\.int8 is not a weight type"):
        load(SafetensorsFolder(folder), folder, load_hf_config(folder))


def test_an_export_with_a_weight_that_is_not_finite_is_not_evaluated(tmp_path: Path) -> None:
    tiny = TinyRun(tmp_path, save_model(tmp_path / "saved"))
    file = sorted(tiny.model.glob("*.safetensors"))[0]
    weights = load_file(file)
    name = sorted(weights)[0]
    weights[name].view(-1)[0] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(DataError, match=rf"{name} holds numbers that are NaN"):
        evaluate_folder(load_config(tiny.config), tiny.model)


# config.json


@pytest.mark.parametrize("text", ["[]", "3", "null", '"qwen2"', "{", "", "<qwen2>"])
def test_a_config_json_that_is_no_object_is_named(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"^model\.hf_dir: .*config\.json (holds a|cannot be read as JSON).*; fetch"):
        load_hf_config(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, value) for key in ("hidden_size", "num_key_value_heads", "vocab_size") for value in (0, -1, "8", [8])),
        ("num_attention_heads", 0),
        ("num_hidden_layers", True),
        ("max_position_embeddings", -1),
        ("head_dim", 0),
        ("rms_norm_eps", "small"),
        ("tie_word_embeddings", "yes"),
        ("rope_theta", "x"),
        ("rope_theta", None),
        ("rope_theta", -1.0),
        ("dtype", "float99"),
        ("model_type", ["qwen2"]),
        ("layer_types", 3),
    ],
)
def test_a_value_of_config_json_that_cannot_be_is_named(folder: Path, key: str, value: Any) -> None:
    path = folder / "config.json"
    tree = json.loads(path.read_text())
    if key == "rope_theta":
        tree["rope_parameters"] = tree["rope_parameters"] | {key: value}
    else:
        tree[key] = value
    path.write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match=r"^model\.hf_dir: .*config\.json") as caught:
        load_hf_config(folder)
    assert key in str(caught.value) or f"{value}" in str(caught.value) or "unhashable" in str(caught.value)


# Files of weights


@pytest.mark.parametrize(
    "weight_map", [[], 3, {"a": 1}, {"a": None}, {"a": "../../secret.safetensors"}, {"a": "/etc/passwd"}]
)
def test_an_index_that_does_not_name_files_of_its_folder_is_refused(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    if weight_map == []:  # says nothing, as an index of no tensors does
        assert SafetensorsFolder(folder).names() == set(load_file(folder / "model.safetensors"))
        return
    with pytest.raises(DataError, match=r"model\.safetensors\.index\.json is not an index of weights"):
        SafetensorsFolder(folder)
