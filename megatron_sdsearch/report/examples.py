"""Pick a few groups from the trajectory files of a run's first and last step."""

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
#: Limit for reading a large step's file, 100 MB at the published sizes.
MAX_GROUPS_READ = 64

Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One group.

    Attributes:
        siblings: rows of the trajectory file.
        hindsights: distinct hindsight blocks with the siblings they belong to.
    """

    siblings: Sequence[Row]
    hindsights: Sequence[tuple[str, Sequence[int]]]


def pick_examples(run_dir: Path) -> list[Example]:
    """Pick groups of the first and the last step, preferably of mixed outcome, since they show the contrast.

    Raises:
        DataError: a line is not a trajectory; names file and line.
    """
    files = step_files(run_dir)
    examples = []
    for path in dict.fromkeys([*files[:1], *files[-1:]]):
        for rows in _pick_groups(path):
            hindsights: dict[str, list[int]] = {}
            for row in rows:
                hindsights.setdefault(row["hindsight"]["text"], []).append(row["sibling"])
            examples.append(Example(siblings=rows, hindsights=list(hindsights.items())))
    return examples


def text_pieces(span: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Split a span into (style, text): observation, search, answer, invalid, or query inside a search."""
    text = span["text"]
    if span["kind"] != "sampled":
        return [(span["kind"], text)]
    start, end = span["query_chars"] or (0, 0)
    pieces = [(span["action"], text[:start]), ("query", text[start:end]), (span["action"], text[end:])]
    return [(style, part) for style, part in pieces if part]


def _pick_groups(path: Path) -> list[list[Row]]:
    mixed, others = list[list[Row]](), list[list[Row]]()
    for _, rows in islice(groupby(_read_rows(path), key=lambda row: row["question_id"]), MAX_GROUPS_READ):
        group = list(rows)
        (mixed if len({row["is_correct"] for row in group}) > 1 else others).append(group)
        if len(mixed) == GROUPS_PER_STEP:  # skip the remainder of a large file
            break
    return (mixed + others)[:GROUPS_PER_STEP]


def _read_rows(path: Path) -> Iterator[Row]:
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
