"""A head that config.json ties while the file holds another one: refused wherever weights are read, by one function."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_sdsearch.config import ModelConfig, load_config
from megatron_sdsearch.errors import ConfigError, DataError
from megatron_sdsearch.model.convert import to_hf, to_megatron
from megatron_sdsearch.model.hf_config import load_hf_config
from megatron_sdsearch.model.hf_weights import SafetensorsFolder, check_weights, load_weights
from megatron_sdsearch.model.weight_table import HEAD
from megatron_sdsearch.training.loop import train
from megatron_sdsearch.training.policy import starting_weights
from tests.unit.check.tiny_run import TinyRun, only, save_model
from tests.unit.model.test_convert import make_model
from tests.unit.model.test_hf_weights import FakeGPT, stage

DIFFER = r"config\.json ties lm_head\.weight .* and the two differ; set tie_word_embeddings to false"
NO_HEAD = r"has no tensor lm_head\.weight, and config\.json does not tie it"


def set_tied(folder: Path, is_tied: bool) -> None:
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(tree | {"tie_word_embeddings": is_tied}))


def write_head(folder: Path, head: Callable[[Tensor], Tensor]) -> None:
    """Beside the embedding, whatever config.json says."""
    weights = load_file(folder / "model.safetensors")
    weights[HEAD] = head(weights["model.embed_tokens.weight"]).contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def other_head(tmp_path: Path) -> Path:
    """As transformers 5 saves a model whose head was untied in memory: config.json still ties it."""
    folder = make_model(tmp_path / "model", "qwen2", is_tied=True)
    write_head(folder, lambda table: table.flip(0))
    return folder


def start(model: ModelConfig) -> None:
    """What training does before its ranks meet."""
    config = load_hf_config(model.hf_dir)
    tensors, source = starting_weights(model, config)
    check_weights(tensors, config, source)


def test_transformers_computes_another_function_from_such_a_folder(other_head: Path) -> None:
    ids = torch.arange(13).unsqueeze(0)
    with torch.no_grad():
        untied = AutoModelForCausalLM.from_pretrained(other_head)(ids).logits
        write_head(other_head, lambda table: table.clone())
        tied = AutoModelForCausalLM.from_pretrained(other_head)(ids).logits
    assert (untied - tied).abs().max() > 1, "the reason for the refusal"


def test_another_head_than_the_tied_one_is_refused_at_the_start_and_by_the_converter(
    tmp_path: Path, other_head: Path
) -> None:
    with pytest.raises(DataError, match=DIFFER):
        start(ModelConfig(hf_dir=other_head))
    with pytest.raises(DataError, match=DIFFER):
        to_megatron(other_head, tmp_path / "mg")
    config = load_hf_config(other_head)
    gpt = FakeGPT(config, stage())
    with pytest.raises(DataError, match=DIFFER):
        load_weights(gpt, SafetensorsFolder(other_head), other_head, config, stage())


def test_a_megatron_checkpoint_with_another_head_is_refused_by_a_config_that_ties_it(
    tmp_path: Path, other_head: Path
) -> None:
    set_tied(other_head, False)
    to_megatron(other_head, tmp_path / "mg", tensor=2)
    set_tied(other_head, True)
    with pytest.raises(DataError, match=DIFFER):
        start(ModelConfig(hf_dir=other_head, megatron_dir=tmp_path / "mg"))
    with pytest.raises(DataError, match=DIFFER):
        to_hf(tmp_path / "mg", tmp_path / "hf", hf_dir=other_head)


def test_a_tied_table_that_is_written_twice_is_one(tmp_path: Path, other_head: Path) -> None:
    write_head(other_head, lambda table: table.clone())
    start(ModelConfig(hf_dir=other_head))
    set_tied(other_head, False)
    to_megatron(other_head, tmp_path / "mg")
    set_tied(other_head, True)
    start(ModelConfig(hf_dir=other_head, megatron_dir=tmp_path / "mg"))


@pytest.mark.parametrize("change", [lambda t: t.float(), lambda t: t[:5].clone()], ids=["dtype", "shape"])
def test_a_head_of_another_form_is_another_head(other_head: Path, change: Callable[[Tensor], Tensor]) -> None:
    write_head(other_head, change)
    with pytest.raises(DataError, match=DIFFER):
        start(ModelConfig(hf_dir=other_head))


def test_only_the_last_row_differs_and_is_seen(other_head: Path) -> None:
    def change(table: Tensor) -> Tensor:
        head = table.clone()
        head[-1, -1] += 1
        return head

    write_head(other_head, change)
    with pytest.raises(DataError, match=DIFFER):
        start(ModelConfig(hf_dir=other_head))


def test_an_untied_config_without_a_head_is_refused(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "qwen2", is_tied=True)
    to_megatron(folder, tmp_path / "mg")
    set_tied(folder, False)
    with pytest.raises(DataError, match=NO_HEAD):
        start(ModelConfig(hf_dir=folder))
    with pytest.raises(DataError, match=NO_HEAD):
        start(ModelConfig(hf_dir=folder, megatron_dir=tmp_path / "mg"))


# As `train` and `check` say it


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TinyRun:
    for name in ("SLURM_JOB_NUM_NODES", "SLURM_NNODES", "WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    return TinyRun(tmp_path, save_model(tmp_path / "saved"))


def test_train_and_check_say_the_same_before_anything_is_written(tiny: TinyRun) -> None:
    files = sorted(tiny.model.glob("*.safetensors"))
    index = json.loads((tiny.model / "model.safetensors.index.json").read_text())
    holder = tiny.model / index["weight_map"]["model.embed_tokens.weight"]
    assert holder in files
    weights = load_file(holder)
    weights[HEAD] = weights["model.embed_tokens.weight"] + 1
    save_file(weights, holder, metadata={"format": "pt"})
    index["weight_map"][HEAD] = holder.name
    (tiny.model / "model.safetensors.index.json").write_text(json.dumps(index))
    finding = only(tiny.found())
    assert (finding.severity, finding.field) == ("error", "model.hf_dir")
    assert finding.fix == "set tie_word_embeddings to false in config.json"
    with pytest.raises(ConfigError, match=DIFFER) as caught:
        train(load_config(tiny.config))
    assert str(caught.value) == f"{finding.field}: {finding.problem}; {finding.fix}"
    assert not (tiny.folder / "run").exists()


def test_a_megatron_checkpoint_that_does_not_fit_is_found(tiny: TinyRun) -> None:
    set_tied(tiny.model, False)
    weights = SafetensorsFolder(tiny.model)
    single = {name: weights[name] for name in weights.names()} | {HEAD: weights["model.embed_tokens.weight"] + 1}
    for path in tiny.model.glob("*.safetensors*"):
        path.unlink()
    save_file(single, tiny.model / "model.safetensors", metadata={"format": "pt"})
    to_megatron(tiny.model, tiny.folder / "mg")
    override = f"model.megatron_dir={tiny.folder / 'mg'}"
    assert tiny.found(override) == []
    set_tied(tiny.model, True)
    finding = only(tiny.found(override))
    assert (finding.severity, finding.field) == ("error", "model.megatron_dir")
    assert "and the two differ" in finding.problem
