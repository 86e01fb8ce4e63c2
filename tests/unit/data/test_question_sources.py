"""Folders, files and the hub's cache as places of question files."""

from __future__ import annotations

import os
from pathlib import Path

import huggingface_hub.constants
import pytest

from megatron_sdsearch.data.preparation import PrepareSettings, find_question_files, prepare
from megatron_sdsearch.errors import ConfigError
from tests.unit.data import published

SETTINGS = PrepareSettings()
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_folders_list_both_layouts(tmp_path: Path) -> None:
    published.write_both(tmp_path)
    published.write_parquet(tmp_path / "train.parquet", published.search_r1_rows("x", "train", "train", [("q", "a")]))
    (tmp_path / "nq" / "readme.txt").touch()
    (tmp_path / ".cache" / "nq").mkdir(parents=True)
    files = find_question_files(str(tmp_path), SETTINGS)
    assert [(file.name, file.split, file.dataset) for file in files] == [
        ("hotpotqa/dev.jsonl", "dev", "hotpotqa"),
        ("hotpotqa/train.jsonl", "train", "hotpotqa"),
        ("nq/dev.jsonl", "dev", "nq"),
        ("nq/test.jsonl", "test", "nq"),
        ("nq/train.jsonl", "train", "nq"),
        ("train.parquet", "train", None),
    ]


def test_single_files_take_their_split_from_their_name(tmp_path: Path) -> None:
    path = published.write_flashrag(tmp_path, "nq", "dev", published.NQ_DEV)
    (file,) = find_question_files(str(path), SETTINGS)
    assert (file.split, file.dataset, file.path) == ("dev", None, path)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("nowhere", r"SOURCE: .*nowhere does not exist; give a folder, a file, or hub"),
        ("empty", r"SOURCE: .*empty holds neither <dataset>/<split>\.jsonl \(FlashRAG\) nor .*; give the parent"),
        ("valid_500.parquet", r"SOURCE: .*valid_500\.parquet is not named train, dev, test"),
    ],
)
def test_a_wrong_source_is_one_error(tmp_path: Path, name: str, complaint: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "valid_500.parquet").touch()
    with pytest.raises(ConfigError, match=complaint):
        find_question_files(str(tmp_path / name), SETTINGS)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create huggingface_hub's cache: snapshots of links to files named after their content."""
    repository = tmp_path / "datasets--RUC-NLPIR--FlashRAG_datasets"
    snapshot = published.write_both(repository / "snapshots" / COMMIT)
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted(snapshot.rglob("*.jsonl"))):
        blob = repository / "blobs" / f"{number:040x}"
        path.rename(blob)
        path.symlink_to(os.path.relpath(blob, path.parent))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path


@pytest.mark.parametrize("name", ["hub", "hub:RUC-NLPIR/FlashRAG_datasets", f"hub@{COMMIT}"])
def test_hub_is_read_through_its_links_and_names_its_commit(hub_cache: Path, name: str) -> None:
    files = find_question_files(name, SETTINGS)
    assert {file.source for file in files} == {f"hub:RUC-NLPIR/FlashRAG_datasets@{COMMIT}"}
    prepared = prepare(files, SETTINGS, [], on_file=lambda *_: None)
    train = [question.question_id for question in prepared.splits["train"]]
    assert train == ["nq:train:0", "nq:train:1", "nq:train:2", "hotpotqa:train:0", "hotpotqa:train:1"]


@pytest.mark.parametrize("name", ["hub:nobody/nothing", "hub:a/b/c", "hub@no-such-revision"])
def test_what_the_hub_does_not_have_is_one_error(hub_cache: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot be fetched from the hub: .*; fix the name or"):
        find_question_files(name, SETTINGS)
