"""Reads corpus files: passages as JSONL, gzipped JSONL or parquet, validated row by row.

Owns the row format for every engine that builds an index. Search-R1's published wiki-18 dump has it:
``{"id": "0", "contents": "\\"Title\\"\\ntext"}``.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, BeforeValidator, ConfigDict, StringConstraints, ValidationError, model_validator

from megatron_sdsearch.errors import DataError
from megatron_sdsearch.file_kinds import refuse_other_kind
from megatron_sdsearch.records import bare_title

OnReject = Callable[[str, str], None]
"""Called with the position of an invalid row (``file:line``) and the problem."""

_FIX = 'write {"id": "...", "contents": "\\"Title\\"\\ntext"} on one line'
_PARQUET_FIX = "give the columns id and contents, or id, title and text"
_PARQUET_BATCH = 1000  # rows; the library's default holds 64k passages in memory
_MAX_BIT = 1 << 30
"""Integer ids below this take one bit each, at most 128 MiB."""


class CorpusRow(BaseModel):
    r"""One passage of the file.

    Attributes:
        id: unique in the corpus; integers become strings. ``_id`` (BEIR's name) works as well.
        contents: ``"Title"\\ntext``, verbatim; or made from ``title`` and ``text``.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    id: Annotated[str, StringConstraints(min_length=1), BeforeValidator(lambda v: str(v) if type(v) is int else v)]
    contents: Annotated[str, StringConstraints(min_length=1)]

    @model_validator(mode="before")
    @classmethod
    def _from_other_names(cls, row: Any) -> Any:
        if not isinstance(row, dict) or ("id" in row and "contents" in row):
            return row
        row = dict(row)
        if "_id" in row:
            row.setdefault("id", row["_id"])
        title, text = row.get("title"), row.get("text")
        if "contents" not in row and isinstance(title, str) and isinstance(text, str) and text:
            row["contents"] = f'"{title}"\n{text}'
        return row

    def title_and_text(self) -> tuple[str, str]:
        """Return the first line without its quotes, and the other lines; a passage of one line has no title."""
        title, newline, text = self.contents.partition("\n")
        return (bare_title(title), text) if newline else ("", self.contents)


def read_corpus(
    path: Path, on_reject: OnReject | None = None, *, max_id_bytes: int | None = None
) -> Iterator[CorpusRow]:
    """Stream the rows in file order; blank lines are skipped.

    Memory grows only with the ids: one bit per integer id, about 100 bytes per other id.

    Args:
        path: ``.parquet``; ``.gz`` for gzipped JSONL; anything else is JSONL.
        on_reject: called for invalid rows, which are then left out; without it the first one raises.
        max_id_bytes: the engine's limit on the UTF-8 bytes of an id; None for no limit.

    Raises:
        DataError: a row is invalid, an id is duplicated or too long, there are no rows, or the file is missing, damaged
            or in another format; names file, line (or row), field and fix.
    """
    seen = _SeenIds()
    num_passages = 0
    for position, row in _parquet_rows(path) if path.suffix == ".parquet" else _json_lines(path):
        try:
            parsed = _parse(position, row, seen, max_id_bytes)
        except DataError as error:
            if on_reject is None:
                raise
            on_reject(position, str(error).removeprefix(f"{position}: "))
            continue
        num_passages += 1
        yield parsed
    if not num_passages:
        raise DataError(f"{path}: holds no passages; {_FIX}")


def sha256_of_corpus(path: Path) -> str:
    """Hexadecimal SHA-256 of the file's bytes.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(path, error) from error


def _json_lines(path: Path) -> Iterator[tuple[str, bytes]]:
    is_gzip = path.suffix == ".gz"
    refuse_other_kind(path, "gzip" if is_gzip else "JSON Lines")
    try:
        with gzip.open(path, "rb") if is_gzip else path.open("rb") as lines:
            refuse_other_kind(path, "JSON Lines", lines.peek(512))
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{path}:{number}", line.removeprefix(codecs.BOM_UTF8)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:  # BadGzipFile is an OSError without an errno
        raise DataError(f"{path}: is truncated or not gzip ({error}); download it again") from error
    except OSError as error:
        raise _unreadable(path, error) from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    refuse_other_kind(path, "parquet")
    try:
        with path.open("rb") as source, pq.ParquetFile(source) as file:
            names = {"id", "_id", "contents", "title", "text"} & set(file.schema_arrow.names)
            for batch in file.iter_batches(_PARQUET_BATCH, columns=sorted(names)):
                for row in batch.to_pylist():
                    number += 1
                    # Parquet fills absent columns with nulls.
                    yield f"{path}: row {number}", {name: value for name, value in row.items() if value is not None}
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # pyarrow's errors about damaged pages have none
            raise _unreadable(path, error) from error
        raise DataError(f"{path}: is not readable as parquet ({error}); write it again") from error


def _parse(position: str, line: bytes | dict[str, Any], seen: _SeenIds, max_id_bytes: int | None) -> CorpusRow:
    try:
        validate = CorpusRow.model_validate_json if isinstance(line, bytes) else CorpusRow.model_validate
        row = validate(line)  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "row"
        fix = _FIX if isinstance(line, bytes) else _PARQUET_FIX
        raise DataError(f"{position}: {field}: {first['msg']}; {fix}") from error
    num_bytes = len(row.id.encode())
    if max_id_bytes is not None and num_bytes > max_id_bytes:
        problem = f"{row.id[:40]!r}... has {num_bytes} bytes, and the engine's limit is {max_id_bytes}"
        raise DataError(f"{position}: id: {problem}; shorten it")
    if not seen.add(row.id):
        raise DataError(f"{position}: id: {row.id!r} is a duplicate; give each passage its own id")
    return row


class _SeenIds:
    """Set of ids: 3 MB for wiki-18's 21 million integer ids, where a set of strings takes 2 GB."""

    def __init__(self) -> None:
        self._bits = bytearray()
        self._others: set[str] = set()

    def add(self, passage_id: str) -> bool:
        """Add an id; False if it is a duplicate."""
        # Canonical digits only: "007" and digits of other scripts are different ids from "7".
        number = int(passage_id) if len(passage_id) <= 10 and passage_id.isascii() and passage_id.isdigit() else None
        if number is None or number >= _MAX_BIT or str(number) != passage_id:
            is_new = passage_id not in self._others
            self._others.add(passage_id)
            return is_new
        byte, bit = number >> 3, 1 << (number & 7)
        if byte >= len(self._bits):
            wanted = min(max(byte + 1, 2 * len(self._bits)), _MAX_BIT // 8)
            self._bits.extend(bytes(wanted - len(self._bits)))
        is_new = not self._bits[byte] & bit
        self._bits[byte] |= bit
        return is_new


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path}: cannot be read ({error.strerror}); give the path of a JSONL or parquet file of passages")
