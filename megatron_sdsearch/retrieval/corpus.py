"""The corpus file: JSONL rows ``{"id", "contents"}``, checked one by one as they stream past.

Owns what a passage row must look like, for every engine that indexes one. Terms and indices are the engines'.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, StringConstraints, ValidationError

from megatron_sdsearch.errors import DataError

_MEND = 'write {"id": "...", "contents": "\\"Title\\"\\ntext"} on one line'


class CorpusRow(BaseModel):
    r"""One passage of the file.

    Attributes:
        id: unique in the corpus; whole numbers are taken as text.
        contents: ``"Title"\\ntext``, kept verbatim.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    id: Annotated[
        str,
        StringConstraints(min_length=1),
        BeforeValidator(lambda value: str(value) if type(value) is int else value),
    ]
    contents: Annotated[str, StringConstraints(min_length=1)]


def read_corpus(path: Path) -> Iterator[CorpusRow]:
    """Stream the rows in file order; blank lines are skipped. Memory grows with the ids alone.

    Raises:
        DataError: naming file, line, field and mend: a bad row, an id that stands twice, no rows, or no such file.
    """
    seen: set[str] = set()
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _parse(line, f"{path}:{number}", seen)
    except OSError as error:
        raise _unreadable(path, error) from error
    if not seen:
        raise DataError(f"{path}: holds no passages; {_MEND}")


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


def _parse(line: bytes, place: str, seen: set[str]) -> CorpusRow:
    try:
        row = CorpusRow.model_validate_json(line)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "row"
        raise DataError(f"{place}: {field}: {first['msg']}; {_MEND}") from error
    if row.id in seen:
        raise DataError(f"{place}: id: {row.id!r} stands twice; give each passage an id of its own")
    seen.add(row.id)
    return row


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path}: cannot be read ({error.strerror}); give the path of a JSONL file of passages")
