"""`check` has nothing to say against a recipe whose model and data are there: no hub, no weights, no GPU."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from megatron_sdsearch.cli import app
from megatron_sdsearch.data.preparation import PrepareSettings, find_question_files, prepare, write_prepared
from tests.unit.conftest import train_tokenizer
from tests.unit.data import published
from tests.unit.examples.test_recipes import GPUS_PER_NODE, MACHINES, MODELS, RECIPES, ROOT, SHAPES, Machine

# What speaks of the machine that runs the test: its disk, the SGLang and the packages that are installed here.
OF_THIS_MACHINE = {"storage", "packages"}
PROGRAM = "rollout.sglang.command"


def write_model(folder: Path, shape: dict[str, Any]) -> None:
    """The model's config.json and the header of its weights, whose numbers are a hole in a file; a small tokenizer."""
    tokenizer = train_tokenizer()
    tokenizer.save_pretrained(folder)
    config = shape | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "use_sliding_window": False,
        "eos_token_id": tokenizer.eos_token_id,
    }
    (folder / "config.json").write_text(json.dumps(config))
    header: dict[str, Any] = {}
    end = 0
    for name, dims in tensors(shape).items():
        start, end = end, end + 2 * dims[0] * (dims[1] if len(dims) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": dims, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def tensors(shape: dict[str, Any]) -> dict[str, list[int]]:
    """Names and shapes of a Qwen2, by transformers' modeling_qwen2.py."""
    h, f = shape["hidden_size"], shape["intermediate_size"]
    kv = h // shape["num_attention_heads"] * shape["num_key_value_heads"]
    found = {"model.embed_tokens.weight": [shape["vocab_size"], h], "model.norm.weight": [h]}
    if not shape["tie_word_embeddings"]:
        found["lm_head.weight"] = [shape["vocab_size"], h]
    for layer in range(shape["num_hidden_layers"]):
        parts = {"input_layernorm.weight": [h], "post_attention_layernorm.weight": [h]}
        for name, width in {"q": h, "k": kv, "v": kv}.items():
            parts |= {f"self_attn.{name}_proj.weight": [width, h], f"self_attn.{name}_proj.bias": [width]}
        parts |= {"self_attn.o_proj.weight": [h, h], "mlp.down_proj.weight": [h, f]}
        parts |= {"mlp.gate_proj.weight": [f, h], "mlp.up_proj.weight": [f, h]}
        found |= {f"model.layers.{layer}.{name}": dims for name, dims in parts.items()}
    return found


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models/ and data/, as docs/recipes.md makes them."""
    home = tmp_path_factory.mktemp("home")
    for name, shape in SHAPES.items():
        write_model(home / "models" / name, shape)
    for dataset in ("nq", "hotpotqa"):
        for split, number in {"train": 400, "dev": 40, "test": 40}.items():
            pairs = [(f"what is number {i} of {dataset} in {split}", f"answer {i}") for i in range(number)]
            published.write_flashrag(home / "downloads", dataset, split, pairs)
    settings = PrepareSettings()
    files = find_question_files(str(home / "downloads"), settings)
    prepared = prepare(files, settings, [], on_file=lambda *_: None)
    (home / "data").mkdir()
    write_prepared(prepared, settings, home / "data" / "nq_hotpotqa", "parquet")
    return home


def check(home: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, machine: Machine, *overrides: str) -> list[Any]:
    """Everything but notes that does not speak of this machine."""
    monkeypatch.chdir(home)
    world = f"--device gpu --nodes {machine.num_nodes} --gpus-per-node {GPUS_PER_NODE}".split()
    world += f"--nproc-per-node {machine.ranks_per_node} --sglang-nodes {machine.num_sglang_nodes}".split()
    path = str(ROOT / "examples" / recipe / "config.yaml")
    result = CliRunner().invoke(app, ["check", path, *overrides, "--json", *world])
    findings = json.loads(result.stdout)["findings"]
    assert {finding["section"] for finding in findings} >= {"model", "data", "storage"}
    return [
        finding
        for finding in findings
        if finding["severity"] != "note" and finding["section"] not in OF_THIS_MACHINE and finding["field"] != PROGRAM
    ]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_nothing_is_wrong_with_a_recipe(home: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, model: str) -> None:
    assert check(home, monkeypatch, recipe, MACHINES[0], *MODELS[model]) == []


@pytest.mark.parametrize("machine", MACHINES[1:], ids=lambda machine: f"{machine.num_nodes}_nodes")
def test_nothing_is_wrong_on_several_nodes(home: Path, monkeypatch: pytest.MonkeyPatch, machine: Machine) -> None:
    assert check(home, monkeypatch, "sd_search", machine, *MODELS["Qwen2.5-7B"]) == []


def test_a_wrong_layout_is_found(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = check(home, monkeypatch, "sd_search", MACHINES[0], "parallel.tensor_model_parallel_size=3")
    assert {(finding["severity"], finding["field"]) for finding in found} == {
        ("error", "parallel.tensor_model_parallel_size")
    }
    problems = " ".join(finding["problem"] for finding in found)
    assert "does not divide the 4 ranks" in problems
    assert "num_attention_heads = 16" in problems
