"""Folders written shard by shard: transformers reads them back, and a failure leaves the old one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_sdsearch.model.hf_folder import write_hf_folder
from tests.unit.conftest import ModelFactory
from tests.unit.full_disk import full_disk

Named = tuple[str, Tensor]


class Stream:
    """The weights of a model as an export gives them; counts how many were drawn, and may fail on the way."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights
        self.num_drawn = 0

    def __iter__(self) -> Iterator[Named]:
        for pair in self.weights.items():
            self.num_drawn += 1
            yield pair

    @property
    def is_exhausted(self) -> bool:
        return self.num_drawn == len(self.weights)


@pytest.fixture
def source(tmp_path: Path, make_model: ModelFactory) -> Path:
    """The folder that the run started from."""
    folder = tmp_path / "source"
    make_model(seed=0).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model-00001-of-00001.safetensors").write_text("old weights under another name")
    return folder


@pytest.fixture
def stream(make_model: ModelFactory) -> Stream:
    return Stream({name: p.detach() for name, p in make_model(seed=1).named_parameters()})


def loaded(folder: Path) -> dict[str, Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())


def assert_holds(folder: Path, weights: dict[str, Tensor]) -> None:
    found = loaded(folder)
    assert found.keys() == weights.keys()
    assert [name for name in weights if not torch.equal(found[name], weights[name])] == []


def test_one_shard_is_one_file(tmp_path: Path, source: Path, stream: Stream) -> None:
    write_hf_folder(stream, source, tmp_path / "new", is_writer=True)
    names = {file.name for file in (tmp_path / "new").iterdir()}
    assert {name for name in names if name.endswith("safetensors")} == {"model.safetensors"}
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= names
    assert_holds(tmp_path / "new", stream.weights)


@pytest.mark.parametrize("shard_bytes", [1, 10_000, 60_000])
def test_several_shards_and_their_index_are_a_model(
    tmp_path: Path, source: Path, stream: Stream, shard_bytes: int
) -> None:
    write_hf_folder(stream, source, tmp_path / "new", is_writer=True, shard_bytes=shard_bytes)
    files = sorted((tmp_path / "new").glob("*.safetensors"))
    assert len(files) > 1
    assert [file.name for file in files] == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    index = json.loads((tmp_path / "new/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == stream.weights.keys()
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stream.weights.values())
    assert_holds(tmp_path / "new", stream.weights)


def test_the_config_names_the_dtype_that_was_written(tmp_path: Path, source: Path, stream: Stream) -> None:
    stream.weights = {name: tensor.bfloat16() for name, tensor in stream.weights.items()}
    write_hf_folder(stream, source, tmp_path / "new", is_writer=True)
    assert json.loads((tmp_path / "new/config.json").read_text())["dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in loaded(tmp_path / "new").values()} == {torch.bfloat16}


def test_a_new_folder_takes_the_place_of_the_old_one(tmp_path: Path, source: Path, stream: Stream) -> None:
    old = tmp_path / "new"
    write_hf_folder(Stream(loaded(source)), source, old, is_writer=True, shard_bytes=1)
    write_hf_folder(stream, source, old, is_writer=True)
    assert_holds(old, stream.weights)
    assert list(old.glob("model-*")) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "source"]


@pytest.mark.parametrize("room", [0, 5_000, 40_000])
def test_a_full_disk_leaves_the_old_folder_and_nothing_else(
    tmp_path: Path, source: Path, stream: Stream, room: int
) -> None:
    old = Stream(loaded(source))
    write_hf_folder(old, source, tmp_path / "new", is_writer=True)
    with full_disk(room), pytest.raises(OSError, match=r"partial_new.*(os error 27|too large)"):
        write_hf_folder(stream, source, tmp_path / "new", is_writer=True, shard_bytes=60_000)
    assert stream.is_exhausted, "peers wait in the collectives of the export"
    assert_holds(tmp_path / "new", old.weights)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "source"]


def test_a_target_that_cannot_be_made_is_an_error_after_the_whole_stream(
    tmp_path: Path, source: Path, stream: Stream
) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(NotADirectoryError):
        write_hf_folder(stream, source, tmp_path / "file" / "new", is_writer=True)
    assert stream.is_exhausted


def test_the_old_folder_comes_back_when_the_new_one_cannot_be_put_in_its_place(
    tmp_path: Path, source: Path, stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = Stream(loaded(source))
    write_hf_folder(old, source, tmp_path / "new", is_writer=True)
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name == ".partial_new":
            raise PermissionError("not now")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(PermissionError, match="not now"):
        write_hf_folder(stream, source, tmp_path / "new", is_writer=True)
    monkeypatch.undo()
    assert_holds(tmp_path / "new", old.weights)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "source"]


def test_other_ranks_draw_everything_and_write_nothing(tmp_path: Path, source: Path, stream: Stream) -> None:
    write_hf_folder(stream, source, tmp_path / "new", is_writer=False)
    assert stream.is_exhausted
    assert not (tmp_path / "new").exists()
