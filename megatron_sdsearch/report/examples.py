"""A few groups to read: picked from the trajectory files of a run's first and last step."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from megatron_sdsearch.errors import DataError
from megatron_sdsearch.logging.trajectories import step_files

GROUPS_PER_STEP = 3
GROUPS_LOOKED_AT = 64
"""Bounds the reading of a big step's file, 100 MB at the published sizes."""

Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Text with one look: ``kind`` is prompt, observation, search, answer, invalid, or query (inside a search)."""

    kind: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sibling:
    """One trajectory: its row, its prompt, and what follows the prompt."""

    row: Mapping[str, Any]
    prompt: str
    pieces: Sequence[Piece]


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One group.

    Attributes:
        first: the first sibling's row, for what all share.
        hindsights: distinct hindsight blocks with the siblings that were shown them.
    """

    first: Mapping[str, Any]
    siblings: Sequence[Sibling]
    hindsights: Sequence[tuple[str, Sequence[int]]]


def pick_examples(run_dir: Path) -> list[Example]:
    """Groups of the first and the last step with a file; of mixed outcome if there are any, they show the contrast.

    Raises:
        DataError: a line is no trajectory; names file and line.
    """
    files = step_files(run_dir)
    return [example for path in dict.fromkeys([*files[:1], *files[-1:]]) for example in _examples_of(path)]


def _examples_of(path: Path) -> list[Example]:
    by_question = groupby(_rows(path), key=lambda row: row["question_id"])
    mixed, others = list[list[Row]](), list[list[Row]]()
    for _, rows in islice(by_question, GROUPS_LOOKED_AT):
        group = list(rows)
        (mixed if len({row["is_correct"] for row in group}) > 1 else others).append(group)
        if len(mixed) == GROUPS_PER_STEP:  # the rest of a big file would be read for nothing
            break
    return [_example(group) for group in (mixed + others)[:GROUPS_PER_STEP]]


def _rows(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}:{number}: not JSON ({error.msg})") from error
            missing = {"question_id", "is_correct", "spans", "hindsight", "sibling"} - set(row)
            if missing:
                raise DataError(f"{path}:{number}: no {', '.join(sorted(missing))} in this row")
            yield row


def _example(rows: Sequence[Row]) -> Example:
    hindsights: dict[str, list[int]] = {}
    for row in rows:
        hindsights.setdefault(row["hindsight"]["text"], []).append(row["sibling"])
    return Example(first=rows[0], siblings=[_sibling(row) for row in rows], hindsights=list(hindsights.items()))


def _sibling(row: Mapping[str, Any]) -> Sibling:
    prompt, *rest = row["spans"]
    return Sibling(row=row, prompt=prompt["text"], pieces=[piece for span in rest for piece in _pieces(span)])


def _pieces(span: Mapping[str, Any]) -> list[Piece]:
    text = span["text"]
    if span["kind"] != "sampled":
        return [Piece(kind=span["kind"], text=text)]
    start, end = span["query_chars"] or (0, 0)
    parts = [(span["action"], text[:start]), ("query", text[start:end]), (span["action"], text[end:])]
    return [Piece(kind=kind, text=part) for kind, part in parts if part]
