"""Corpus rows are checked one by one, and every complaint says where and what to do."""

from __future__ import annotations

import codecs
import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sdsearch.errors import DataError
from megatron_sdsearch.retrieval.corpus import CorpusRow, read_corpus, sha256_of_corpus


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
        ('{"id": "a", "contents": "again"}', "id: 'a' is a duplicate"),
    ],
)
def test_bad_row_names_file_line_field_and_fix(tmp_path: Path, line: str, complaint: str) -> None:
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


ROWS = [{"id": "a", "contents": '"Canal"\nA waterway.'}, {"id": "7", "contents": "one line"}]


def write_as(kind: str, folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / f"corpus.{kind}"
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_bytes(gzip.compress(lines) if kind == "jsonl.gz" else lines)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_formats_hold_the_same_rows(tmp_path: Path, kind: str) -> None:
    rows = list(read_corpus(write_as(kind, tmp_path, ROWS)))
    assert [row.model_dump() for row in rows] == ROWS


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_other_names_of_the_columns(tmp_path: Path, kind: str) -> None:
    (row,) = read_corpus(write_as(kind, tmp_path, [{"_id": 3, "title": "Canal", "text": "A waterway."}]))
    assert row == CorpusRow(id="3", contents='"Canal"\nA waterway.')


@pytest.mark.parametrize(
    ("contents", "title", "text"),
    [
        ('"Canal"\nA waterway.\nWide.', "Canal", "A waterway.\nWide."),
        ("Canal\nA waterway.", "Canal", "A waterway."),
        ('"\nA waterway.', '"', "A waterway."),
        ('""\nA waterway.', "", "A waterway."),
        ("A waterway.", "", "A waterway."),
        ('The "Canal"\nA waterway.', 'The "Canal"', "A waterway."),
        ('"Weird Al" Yankovic\nA singer.', '"Weird Al" Yankovic', "A singer."),
        ('""Weird Al" Yankovic"\nA singer.', '"Weird Al" Yankovic', "A singer."),
    ],
)
def test_title_and_text(contents: str, title: str, text: str) -> None:
    assert CorpusRow(id="x", contents=contents).title_and_text() == (title, text)


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"id": "b", "contents": None}, "contents: Field required"),
        ({"id": "b", "contents": ""}, "contents: String should have at least 1 character"),
        ({"id": "a", "contents": "again"}, "id: 'a' is a duplicate"),
    ],
)
def test_bad_parquet_row_names_its_number(tmp_path: Path, row: dict[str, Any], complaint: str) -> None:
    path = write_as("parquet", tmp_path, [{"id": "a", "contents": "A"}, row])
    with pytest.raises(DataError) as caught:
        list(read_corpus(path))
    assert str(caught.value).startswith(f"{path}: row 2: {complaint}")
    assert "; give " in str(caught.value)


def test_parquet_of_other_things_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"row 1: id: Field required; give the columns id and contents"):
        list(read_corpus(write_as("parquet", tmp_path, [{"question": "who?"}])))
    with pytest.raises(DataError, match="contents: Input should be a valid string"):
        list(read_corpus(write_as("parquet", tmp_path, [{"id": 1, "contents": 2}])))


TSV = b"id\ttext\ttitle\n1\tA waterway.\tCanal\n"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("c.jsonl", gzip.compress(b'{"id": "a", "contents": "A"}'), "is compressed with gzip, .*; unpack it: gunzip"),
        ("c.jsonl", TSV, "is tab-separated text"),
        ("c.jsonl.gz", gzip.compress(TSV), "is tab-separated text"),
        ("c.jsonl.gz", gzip.compress(b"PAR1" + bytes(20)), r"is a parquet file, .*; name it \.parquet"),
        ("c.jsonl.gz", POINTER, "is a git LFS pointer, not the file itself, .*; fetch the file with git lfs pull"),
        ("c.parquet", POINTER, "is a git LFS pointer"),
        ("c.parquet", b'{"id": "a", "contents": "A"}\n', r"is JSON Lines, where parquet is expected; name it \.jsonl"),
    ],
    ids=["gzip", "tsv", "tsv in gzip", "parquet in gzip", "pointer as gzip", "pointer as parquet", "jsonl as parquet"],
)
def test_a_file_of_another_kind_is_called_what_it_is_even_where_rejects_are_left_out(
    tmp_path: Path, name: str, content: bytes, complaint: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=complaint):
        list(read_corpus(tmp_path / name, lambda position, problem: None))


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path, suffix: str) -> None:
    path = write_as(suffix, tmp_path, ROWS)
    whole = path.read_bytes()
    marked = codecs.BOM_UTF8 + (gzip.decompress(whole) if suffix == "jsonl.gz" else whole)
    path.write_bytes(gzip.compress(marked) if suffix == "jsonl.gz" else marked)
    assert [row.id for row in read_corpus(path)] == ["a", "7"]


def test_damaged_files_are_data_errors(tmp_path: Path) -> None:
    whole = write_as("jsonl.gz", tmp_path, ROWS).read_bytes()
    for name, damaged, words in (
        ("cut.jsonl.gz", whole[:-9], "is truncated or not gzip"),
        (
            "text.jsonl.gz",
            b"A\n",
            "is truncated or not gzip",
        ),
        (
            "plain.jsonl.gz",
            b'{"id": "a", "contents": "A"}\n',
            "is JSON Lines, where gzip is expected; name it .jsonl",
        ),
        ("x.parquet", b"PAR1 nonsense PAR1", "is not readable as parquet"),
    ):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(DataError, match=words):
            list(read_corpus(tmp_path / name))
    for name in ("absent.jsonl.gz", "absent.parquet"):
        with pytest.raises(DataError, match=r"cannot be read \(No such file or directory\)"):
            list(read_corpus(tmp_path / name))


def test_rejects_are_reported_and_left_out(tmp_path: Path) -> None:
    path = write(tmp_path, '{"id": "a", "contents": "A"}\nnonsense\n{"id": "a", "contents": "B"}\n')
    rejects: list[tuple[str, str]] = []
    rows = list(read_corpus(path, lambda position, problem: rejects.append((position, problem))))
    assert [row.contents for row in rows] == ["A"]
    assert [position for position, _ in rejects] == [f"{path}:2", f"{path}:3"]
    assert rejects[0][1].startswith("row: Invalid JSON")
    assert rejects[1][1] == "id: 'a' is a duplicate; give each passage its own id"


@given(ids=st.lists(st.one_of(st.from_regex(r"[0-9]{1,10}", fullmatch=True), st.sampled_from(["x", "\u0663", "-1"]))))
def test_ids_are_distinct_as_text(tmp_path_factory: pytest.TempPathFactory, ids: list[str]) -> None:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"id": i, "contents": "x"}) + "\n" for i in [*ids, "last"]), encoding="utf-8")
    rows = [row.id for row in read_corpus(path, lambda position, problem: None)]
    assert rows == list(dict.fromkeys([*ids, "last"]))


def test_numbered_passages_take_a_bit_each(tmp_path: Path) -> None:
    path = write(tmp_path, "".join(f'{{"id": {number}, "contents": "x"}}\n' for number in range(30_000)))
    rows = read_corpus(path)
    next(rows)
    tracemalloc.start()
    num_others = sum(1 for _ in rows)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert num_others == 29_999
    assert peak < 200_000  # a set of strings takes 2.9 MB
