"""Corpus rows are checked one by one, and every complaint says where and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sdsearch.errors import DataError
from megatron_sdsearch.retrieval.corpus import read_corpus, sha256_of_corpus


def write(folder: Path, text: str) -> Path:
    path = folder / "corpus.jsonl"
    path.write_text(text, encoding="utf-8")
    return path


def test_rows_come_in_file_order_and_blank_lines_are_skipped(tmp_path: Path) -> None:
    path = write(tmp_path, '{"id": "b", "contents": "B"}\n\n  \n{"id": 7, "contents": "A", "url": "unused"}\n')
    assert [(row.id, row.contents) for row in read_corpus(path)] == [("b", "B"), ("7", "A")]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"id": "x"}', "contents: Field required"),
        ('{"contents": "x"}', "id: Field required"),
        ('{"id": "", "contents": "x"}', "id: String should have at least 1 character"),
        ('{"id": "x", "contents": ""}', "contents: String should have at least 1 character"),
        ('{"id": true, "contents": "x"}', "id: Input should be a valid string"),
        ('{"id": "x", "contents": null}', "contents: Input should be a valid string"),
        ('["x"]', "row: "),
        ("not json", "row: Invalid JSON"),
        ('{"id": "x", "contents": "\\ud800"}', "row: Invalid JSON"),
        ('{"id": "a", "contents": "again"}', "id: 'a' stands twice"),
    ],
)
def test_bad_row_names_file_line_field_and_mend(tmp_path: Path, line: str, complaint: str) -> None:
    path = write(tmp_path, f'{{"id": "a", "contents": "A"}}\n\n{line}\n')
    with pytest.raises(DataError) as caught:
        list(read_corpus(path))
    message = str(caught.value)
    assert message.startswith(f"{path}:3: {complaint}")
    assert "; write {" in message or "; give each" in message


def test_bytes_that_are_not_utf8_are_a_data_error(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(b'{"id": "a", "contents": "\xff"}\n')
    with pytest.raises(DataError, match=r"corpus\.jsonl:1: row: Invalid JSON"):
        list(read_corpus(path))


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_empty_corpus_is_a_data_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError, match="holds no passages; write"):
        list(read_corpus(write(tmp_path, text)))


def test_missing_file_is_a_data_error(tmp_path: Path) -> None:
    for read in (sha256_of_corpus, lambda path: list(read_corpus(path))):
        with pytest.raises(DataError, match=r"cannot be read \(No such file or directory\); give the path"):
            read(tmp_path / "absent.jsonl")
