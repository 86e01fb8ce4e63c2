"""Recognises file formats by their first bytes, and describes how to convert a file to the expected format.

Readers of questions, demonstrations, passages and model folders check the format before they parse, so that a git LFS
pointer is reported as one, and not as "invalid JSON".
"""

from __future__ import annotations

import codecs
import re
from pathlib import Path
from typing import Literal, NamedTuple

from megatron_sdsearch.errors import DataError

Wanted = Literal["JSON Lines", "JSON", "parquet", "gzip", "safetensors"]

_NUM_BYTES = 4096


class FileKind(NamedTuple):
    """A recognised file format.

    Attributes:
        name: compared with the expected format.
        what: completes "the file is ...".
        fix: what to do about it, in one clause.
    """

    name: str
    what: str
    fix: str


_JSON_LINES = FileKind("JSON Lines", "JSON Lines", "name it .jsonl")
_JSON_ARRAY = FileKind("JSON array", "a JSON array", "write one object per line, for example with jq -c '.[]'")
_JSON_DOCUMENT = FileKind("JSON document", "JSON spread over several lines", "write one object per line: jq -c .")
_CSV = FileKind("CSV", "comma-separated text (CSV)", "write each row as a JSON object, one per line")
_TSV = FileKind("TSV", "tab-separated text (TSV)", "write each row as a JSON object, one per line")
_UTF16 = FileKind("UTF-16", "text in UTF-16", "convert it: iconv -f UTF-16 -t UTF-8")
_UTF32 = FileKind("UTF-32", "text in UTF-32", "convert it: iconv -f UTF-32 -t UTF-8")
_HTML = FileKind(
    "HTML", "an HTML or XML page, as failed downloads leave", "fetch the file itself (on the hub /resolve/, not /blob/)"
)
_TAR = FileKind("tar", "a tar archive", "unpack it: tar xf")
_LFS = FileKind("LFS pointer", "a git LFS pointer, not the file itself", "fetch the file with git lfs pull")
_PARQUET = FileKind("parquet", "a parquet file", "name it .parquet, or write demonstrations as JSON Lines")

_BY_MAGIC = {
    b"version https://git-lfs.github.com/spec/": _LFS,
    b"PAR1": _PARQUET,
    b"\x1f\x8b": FileKind("gzip", "compressed with gzip", "unpack it: gunzip"),
    b"PK\x03\x04": FileKind("zip", "a zip archive", "unpack it: unzip"),
    b"BZh": FileKind("bzip2", "compressed with bzip2", "unpack it: bunzip2"),
    b"\xfd7zXZ\x00": FileKind("xz", "compressed with xz", "unpack it: unxz"),
    b"\x28\xb5\x2f\xfd": FileKind("zstd", "compressed with zstd", "unpack it: unzstd"),
    b"7z\xbc\xaf\x27\x1c": FileKind("7z", "a 7z archive", "unpack it: 7z x"),
    b"ARROW1": FileKind("Arrow", "an Arrow file", "write it as parquet (datasets: to_parquet)"),
    codecs.BOM_UTF32_LE: _UTF32,  # before UTF-16's mark, which it starts with
    codecs.BOM_UTF32_BE: _UTF32,
    codecs.BOM_UTF16_LE: _UTF16,
    codecs.BOM_UTF16_BE: _UTF16,
}
_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1f]")
_MARKUP = re.compile(rb"<(?:!doctype|html|head|\?xml|!--)", re.IGNORECASE)
_TAKEN_FOR = {"JSON": ("JSON Lines", "JSON array", "JSON document")}


def refuse_other_kind(path: Path, wanted: Wanted, head: bytes | None = None) -> None:
    """Refuse a file in another recognised format; unrecognised files, missing files and pipes are accepted.

    Args:
        path: the file.
        wanted: the expected format.
        head: its first bytes, for a stream inside another file (gzip); by default they are read from ``path``.

    Raises:
        DataError: the file has another format; names the file, the format and the fix.
    """
    try:
        if head is None:
            if not path.is_file():  # bytes read from a pipe could not be read again
                return
            with path.open("rb") as file:
                head = file.read(_NUM_BYTES)
    except OSError:
        return  # the reader reports the reason
    kind = kind_of(head)
    if kind is not None and kind.name not in _TAKEN_FOR.get(wanted, (wanted,)):
        raise DataError(f"{path}: is {kind.what}, where {wanted} is expected; {kind.fix}")


def kind_of(head: bytes) -> FileKind | None:
    """Recognise a file by its first bytes (a few hundred are enough); None if they match no known format."""
    for magic, kind in _BY_MAGIC.items():
        if head.startswith(magic):
            return kind
    if head[257:262] == b"ustar":
        return _TAR
    if len(head) >= 8 and any(not any(head[odd:8:2]) and all(head[1 - odd : 8 : 2]) for odd in (0, 1)):
        return _UTF16  # without a byte order mark: every other byte is zero
    return _kind_of_text(head)


def _kind_of_text(head: bytes) -> FileKind | None:
    text = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if not text or _CONTROL.search(text):
        return None
    if _MARKUP.match(text):
        return _HTML
    lines = [line.strip() for line in text.split(b"\n") if line.strip()]
    if text.startswith(b"["):
        return _JSON_ARRAY
    if text.startswith(b"{"):
        return _JSON_DOCUMENT if lines[0] == b"{" and len(lines) > 1 else _JSON_LINES
    if any(line.startswith(b"{") for line in lines):
        return None  # JSON Lines with a broken first row
    return _TSV if b"\t" in lines[0] else _CSV if b"," in lines[0] else None
