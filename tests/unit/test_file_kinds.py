"""Files are known by what they hold, whatever they are called."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest

from megatron_sdsearch.errors import DataError
from megatron_sdsearch.file_kinds import kind_of, refuse_other_kind

ROWS = b'{"id": "1", "contents": "a, b"}\n{"id": "2", "contents": "c"}\n'
TABLE = pa.table({"id": ["1", "2"]})


def written(write: object) -> bytes:
    buffer = io.BytesIO()
    write(buffer)  # type: ignore[operator]
    return buffer.getvalue()


def zipped(buffer: io.BytesIO) -> None:
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("q.jsonl", ROWS)


def tarred(buffer: io.BytesIO) -> None:
    with tarfile.open(fileobj=buffer, mode="w") as file:
        entry = tarfile.TarInfo("q.jsonl")
        entry.size = len(ROWS)
        file.addfile(entry, io.BytesIO(ROWS))


def as_arrow(buffer: io.BytesIO) -> None:
    with pyarrow.ipc.new_file(buffer, TABLE.schema) as file:
        file.write_table(TABLE)


KINDS = {
    "LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    "parquet": written(lambda buffer: pq.write_table(TABLE, buffer)),
    "gzip": gzip.compress(ROWS),
    "zip": written(zipped),
    "bzip2": bz2.compress(ROWS),
    "xz": lzma.compress(ROWS),
    "zstd": pa.compress(ROWS, codec="zstd", asbytes=True),
    "tar": written(tarred),
    "Arrow": written(as_arrow),
    "HTML": b"\n<!doctype HTML>\n<html><title>404</title>",
    "UTF-16": ROWS.decode().encode("utf-16"),
    "UTF-32": ROWS.decode().encode("utf-32"),
    "JSON array": b'[{"id": "1"},\n{"id": "2"}]',
    "JSON document": json.dumps({"data": [1, 2]}, indent=2).encode(),
    "CSV": b'id,question\n1,"who, me?"\n',
    "TSV": b"id\ttext, with commas\ttitle\n1\tx\ty\n",
    "JSON Lines": ROWS,
}


@pytest.mark.parametrize("name", list(KINDS))
def test_a_kind_is_known_and_refused_where_another_is_wanted(tmp_path: Path, name: str) -> None:
    kind = kind_of(KINDS[name])
    assert kind is not None
    assert kind.name == name
    path = tmp_path / "q.jsonl"
    path.write_bytes(KINDS[name])
    if name == "JSON Lines":
        refuse_other_kind(path, "JSON Lines")
        return
    with pytest.raises(DataError) as caught:
        refuse_other_kind(path, "JSON Lines")
    assert str(caught.value) == f"{path}: is {kind.what}, where JSON Lines is expected; {kind.fix}"


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_is_known_without_its_mark(encoding: str) -> None:
    kind = kind_of(ROWS.decode().encode(encoding))
    assert kind is not None
    assert kind.name == "UTF-16"


@pytest.mark.parametrize(
    "head", [b"", b"\n \n", b"not JSON", b"no row, this one\n" + ROWS, bytes(40), b"\x08\x07\x06\x05\x04\x03\x02\x01, "]
)
def test_what_is_not_known_is_left_to_its_reader(head: bytes) -> None:
    assert kind_of(head) is None


def test_a_marked_row_is_json_lines() -> None:
    kind = kind_of(b"\xef\xbb\xbf" + ROWS)
    assert kind is not None
    assert kind.name == "JSON Lines"


def test_a_small_json_file_may_have_any_layout(tmp_path: Path) -> None:
    for name in ("JSON Lines", "JSON array", "JSON document"):
        (tmp_path / "config.json").write_bytes(KINDS[name])
        refuse_other_kind(tmp_path / "config.json", "JSON")


def test_nothing_is_read_of_a_pipe_and_a_missing_file_is_its_readers(tmp_path: Path) -> None:
    refuse_other_kind(tmp_path / "absent", "JSON Lines")
    os.mkfifo(tmp_path / "pipe")
    refuse_other_kind(tmp_path / "pipe", "JSON Lines")  # would wait for a writer
