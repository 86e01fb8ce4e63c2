"""Prepared questions as a folder: one file per split in our own schema, and a manifest that tells what they are.

The folder appears whole or not at all, and the same input gives the same bytes (parquet: with the same pyarrow).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_sdsearch.data.preparation import Prepared, PrepareSettings, Same
from megatron_sdsearch.errors import ConfigError, DataError
from megatron_sdsearch.files import replacing_folder
from megatron_sdsearch.records import Question

FileFormat = Literal["parquet", "jsonl"]
MANIFEST = "manifest.json"
_LAYOUT = 1
_SCHEMA = pa.schema(
    [
        pa.field("question_id", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("gold_answers", pa.list_(pa.string()), nullable=False),
        pa.field("dataset", pa.string(), nullable=False),
        pa.field("gold_passage_ids", pa.list_(pa.string()), nullable=False),
    ]
)


def check_target(folder: Path) -> None:
    """Nobody loses anything when the folder is replaced.

    Raises:
        ConfigError: it holds other things than an earlier preparation.
    """
    if not folder.exists():
        return
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {""}
    if names and not names <= _names_in_manifest(folder):
        raise ConfigError("--out", f"{folder} holds other things than prepared questions", "give a new folder")


def write_prepared(prepared: Prepared, settings: PrepareSettings, folder: Path, file_format: FileFormat) -> Path:
    """Write the splits and the manifest; an earlier preparation there is replaced.

    Returns:
        Path of the manifest.

    Raises:
        ConfigError: see ``check_target``.
        DataError: the files cannot be written; what was there stays.
    """
    check_target(folder)
    try:
        with replacing_folder(folder) as partial:
            partial.mkdir(parents=True)
            files = {}
            for split, questions in prepared.splits.items():
                path = partial / f"{split}.{file_format}"
                (_write_parquet if file_format == "parquet" else _write_jsonl)(path, questions)
                files[path.name] = _describe(path, questions, prepared.origins[split])
            manifest = {"layout": _LAYOUT, "settings": asdict(settings), "files": files, **_findings(prepared)}
            text = json.dumps(manifest, ensure_ascii=False, indent=2)
            (partial / MANIFEST).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror}); give another --out") from error
    return folder / MANIFEST


def _names_in_manifest(folder: Path) -> set[str]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return {MANIFEST, *manifest["files"]}
    except (OSError, ValueError, KeyError, TypeError):  # none of ours: nothing in it may be replaced
        return set()


def _row(question: Question) -> dict[str, Any]:
    return {
        "question_id": question.question_id,
        "text": question.text,
        "gold_answers": list(question.gold_answers),
        "dataset": question.dataset,
        "gold_passage_ids": list(question.gold_passage_ids),
    }


def _write_jsonl(path: Path, questions: Sequence[Question]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for question in questions:
            file.write(json.dumps(_row(question), ensure_ascii=False) + "\n")


def _write_parquet(path: Path, questions: Sequence[Question]) -> None:
    pq.write_table(pa.Table.from_pylist([_row(q) for q in questions], schema=_SCHEMA), path, compression="zstd")


def _describe(path: Path, questions: Sequence[Question], origins: dict[str, str]) -> dict[str, Any]:
    return {
        "num_questions": len(questions),
        "datasets": dict(sorted(Counter(question.dataset for question in questions).items())),
        "from_split": origins,
        "sha256": _sha256(path),
    }


def _findings(prepared: Prepared) -> dict[str, Any]:
    sources = [
        {"source": file.source, "file": file.name, "num_questions": number, "sha256": _sha256(file.path)}
        for file, number in prepared.files.items()
    ]
    return {
        "sources": sources,
        "num_bad_rows": len(prepared.bad_rows),
        "num_dropped": prepared.num_dropped,
        "duplicates": _count(prepared.duplicates),
        "leaks": _count(prepared.leaks),
    }


def _count(pairs: Sequence[Same]) -> dict[str, Any]:
    kinds = Counter(f"{_origin(pair.question_id)} of {_origin(pair.same_as)}" for pair in pairs)
    return {
        "num": len(pairs),
        "by_kind": dict(sorted(kinds.items())),
        "same_as": {pair.question_id: pair.same_as for pair in pairs},
    }


def _origin(question_id: str) -> str:
    return question_id.rpartition(":")[0]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
