"""Reads question files into ``records.Question``, and samples the questions of each step.

Owns the three row schemas (our own, Search-R1's, FlashRAG's) and the sampling order. ``gold_answers.py`` parses gold
answers.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from megatron_sdsearch.data.gold_answers import GoldAnswers, Text
from megatron_sdsearch.errors import ConfigError, DataError
from megatron_sdsearch.file_kinds import refuse_other_kind
from megatron_sdsearch.records import IntArray, Question

_SCHEMAS = "write {question_id, text, gold_answers}, a Search-R1 row, or a FlashRAG row {id, question, golden_answers}"

_MARKER = "Question:"
_QUESTION_FIX = "write the question into a column question"
_Id = Annotated[Text, BeforeValidator(lambda value: str(value) if type(value) is int else value)]


class _Row(BaseModel):
    # Published files have additional columns (ability, metadata, ...).
    model_config = ConfigDict(frozen=True, extra="ignore")


class _OwnRow(_Row):
    question_id: _Id
    text: Text
    gold_answers: GoldAnswers
    dataset: str = ""
    gold_passage_ids: tuple[_Id, ...] = ()

    def to_question(self, path: Path) -> Question:
        return Question(**dict(self))


class _FlashRagRow(_Row):
    id: _Id
    question: Text
    golden_answers: GoldAnswers

    def to_question(self, path: Path) -> Question:
        # Data set and split are in the path: <dataset>/<split>.jsonl. Links are not resolved, because the hub's cache
        # stores the files under other names.
        dataset, split = Path(os.path.abspath(path)).parent.name, path.stem
        # Row 7 of train is "train_7" in FlashRAG and 7 in Search-R1: give both the same id.
        index = self.id.removeprefix(f"{split}_")
        question_id = f"{dataset}:{split}:{index if index.isdecimal() else self.id}"
        return Question(question_id=question_id, text=self.question, gold_answers=self.golden_answers, dataset=dataset)


class _Message(_Row):
    role: str
    content: str | None = None


class _GroundTruth(_Row):
    target: GoldAnswers


class _RewardModel(_Row):
    # In verl's rows of other tasks this holds the answers themselves.
    ground_truth: Annotated[
        _GroundTruth, BeforeValidator(lambda value: {"target": value} if isinstance(value, str | list) else value)
    ]


class _ExtraInfo(_Row):
    split: Text
    index: _Id
    question: str | None = None


class _SearchR1Row(_Row):
    data_source: Text
    prompt: Annotated[tuple[_Message, ...], Field(min_length=1)]
    reward_model: _RewardModel
    extra_info: _ExtraInfo
    question: str | None = None
    golden_answers: GoldAnswers | None = None

    def to_question(self, path: Path) -> Question:
        fields = {"question": self.question, "extra_info.question": self.extra_info.question}
        text = _find_question(fields, [(message.role, message.content or "") for message in self.prompt])
        target = self.reward_model.ground_truth.target
        if self.golden_answers is not None and set(self.golden_answers) != set(target):
            raise DataError(
                f"golden_answers: is {self.golden_answers!r:.80}, but reward_model.ground_truth.target is "
                f"{target!r:.80}; remove the wrong one"
            )
        # index alone is not unique: it restarts in each data set and split.
        question_id = f"{self.data_source}:{self.extra_info.split}:{self.extra_info.index}"
        return Question(question_id=question_id, text=text, gold_answers=target, dataset=self.data_source)


def read_questions(path: Path) -> tuple[Question, ...]:
    """Read a ``.jsonl`` or ``.parquet`` file of questions, in file order.

    Each row has our own schema, Search-R1's or FlashRAG's, recognised by its keys.

    Raises:
        DataError: a row is invalid, an id is duplicated, the suffix is unknown, or the file is missing or empty; names
            file, line (or row), field and fix.
    """
    questions: dict[str, Question] = {}
    for location, question in scan_questions(path):
        if isinstance(question, DataError):
            raise question
        if question.question_id in questions:
            raise DataError(f"{location}: id {question.question_id!r} is a duplicate; give each question its own id")
        questions[question.question_id] = question
    if not questions:
        raise DataError(f"{path}: holds no questions; {_SCHEMAS}")
    return tuple(questions.values())


def scan_questions(path: Path) -> Iterator[tuple[str, Question | DataError]]:
    """Yield the location of every row with its question, or with an error, so that a caller can continue.

    Raises:
        DataError: the file itself cannot be read, has another format, or lacks a required column.
    """
    if path.suffix not in (".jsonl", ".parquet"):
        raise DataError(f"{path}: suffix {path.suffix!r} is unknown; give a .jsonl or .parquet file")
    if not path.is_file():
        raise DataError(f"{path}: does not exist; give the path of a question file")
    refuse_other_kind(path, "JSON Lines" if path.suffix == ".jsonl" else "parquet")
    for location, row in _read_jsonl(path) if path.suffix == ".jsonl" else _read_parquet(path):
        try:
            yield location, row if isinstance(row, DataError) else _parse_row(row, path)
        except DataError as error:
            yield location, DataError(f"{location}: {error}")


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield location and content of each row; a ``DataError`` if the line is not JSON."""
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                location = f"{path}:{number}"
                try:
                    if line.strip():
                        yield location, json.loads(line)
                except ValueError as error:  # not JSON, or not UTF-8
                    yield location, DataError(f"{location}: is not JSON ({error}); write one JSON object per line")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); make it readable") from error


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            for name, field in _schema_of(dict.fromkeys(columns)).model_fields.items():
                if field.is_required() and name not in columns:
                    raise DataError(f"{path}: has no column {name!r}, its columns are {', '.join(columns)}; {_SCHEMAS}")
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", row
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: is not readable as parquet ({error}); write it again") from error


def _parse_row(row: Any, path: Path) -> Question:
    if not isinstance(row, dict):
        raise DataError(f"is not an object; {_SCHEMAS}")
    # Parquet fills absent columns with nulls.
    present = {key: value for key, value in row.items() if value is not None}
    try:
        return _schema_of(present).model_validate(present).to_question(path)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{field}: {first['msg']}, got {first['input']!r:.80}; {_SCHEMAS}") from error


def _schema_of(row: dict[str, Any]) -> type[_OwnRow | _FlashRagRow | _SearchR1Row]:
    if "data_source" in row or "reward_model" in row:
        return _SearchR1Row
    if "golden_answers" in row:
        return _FlashRagRow
    return _OwnRow


def _find_question(fields: Mapping[str, str | None], prompt: Sequence[tuple[str, str]]) -> str:
    """Return the question of a Search-R1 or verl row, from its own field, after a comparison with the prompt.

    The prompt combines instructions, worded differently by each project, and the question. Search-R1's rows also have
    the question as ``question``, verl's as ``extra_info.question``. Without either, it follows a marker in the prompt.

    Args:
        fields: the fields that may hold the question, by name; empty ones are ignored.
        prompt: (role, content) of each message. The last user message has the question; an assistant's is a prefill.

    Raises:
        DataError: fields and prompt disagree, or no field has the question and it cannot be found in the prompt.
    """
    asked = next((content for role, content in reversed(prompt) if role == "user"), "")
    if not asked.strip():
        raise DataError("prompt: has no user message; write the question into one")
    given = {name: text.strip() for name, text in fields.items() if text and text.strip()}
    if not given:
        return _after_marker(asked)
    name, question = next(iter(given.items()))
    key = _key(question)
    for other, text in given.items():
        if _key(text) != key:
            raise DataError(f"{other}: is {text!r:.80}, but {name} is {question!r:.80}; remove the wrong one")
    # Whole words only: a question of one letter occurs in every prompt. Other scripts may not separate words.
    if not key or not re.search(rf"(?<![A-Za-z0-9]){re.escape(key)}(?![A-Za-z0-9])", _key(asked)):
        raise DataError(f"{name}: {question!r:.80} does not occur in the prompt {asked!r:.200}; remove the wrong one")
    return question


def _after_marker(asked: str) -> str:
    question = asked.partition(_MARKER)[2].strip()
    if (number := asked.count(_MARKER)) != 1:
        problem = f"has {_MARKER!r} {number} times instead of once, so the start of its question is unclear"
    elif not question:
        problem = f"nothing follows {_MARKER!r}"
    elif "\n" in question:
        problem = f"several lines follow {_MARKER!r}, and the end of the question is unclear"
    else:
        return question
    raise DataError(f"prompt: {problem}; {_QUESTION_FIX}")


def _key(text: str) -> str:
    # Search-R1 adds a question mark to both field and prompt, verl's ports only to one of them.
    return " ".join(text.split()).rstrip("? ").casefold()


class QuestionSampler:
    """Samples the questions of each step: pure functions of (seed, step), so that a resumed run needs no state.

    Each epoch shuffles all questions; a batch may span two epochs.
    """

    def __init__(self, questions: Sequence[Question], seed: int, questions_per_step: int) -> None:
        """Create a sampler.

        Raises:
            ConfigError: there are fewer questions than a step needs.
        """
        if not 1 <= questions_per_step <= len(questions):
            raise ConfigError(
                "data.questions_per_step",
                f"{questions_per_step} questions cannot be drawn without repeats from {len(questions)}",
                f"set it between 1 and {len(questions)}, or give more questions",
            )
        self._questions = tuple(questions)
        self._seed = seed
        self._questions_per_step = questions_per_step
        self._orders: list[IntArray] = []  # cache: of epochs 0, 1, ...
        self._fresh_orders: dict[int, IntArray] = {}  # cache: of the last requested step

    def batch(self, step: int) -> tuple[Question, ...]:
        """Return the ``questions_per_step`` distinct questions of a step (0-based)."""
        return tuple(self._questions[index] for index in self._batch_indices(step))

    def fresh(self, step: int, index: int) -> tuple[Question, int]:
        """Return the ``index``-th (0-based) question of an endless list of additional questions for a step.

        The list cycles through all questions outside the batch (or all questions, if none is), in its own order: a pure
        function of (seed, step, index).

        Returns:
            The question, and how often batch and list contain it before that index.
        """
        if step not in self._fresh_orders:
            # Each step starts at a different offset, so that they do not all use the same questions.
            rotated = np.roll(self._spare_order, -step * self._questions_per_step)
            is_fresh = ~np.isin(rotated, self._batch_indices(step))
            self._fresh_orders = {step: rotated[is_fresh] if is_fresh.any() else rotated}
        order = self._fresh_orders[step]
        rounds, position = divmod(index, len(order))
        is_in_batch = len(order) == len(self._questions)
        return self._questions[order[position]], rounds + is_in_batch

    @cached_property
    def _spare_order(self) -> IntArray:
        return self._shuffled("fresh")

    def _batch_indices(self, step: int) -> IntArray:
        epoch, offset = divmod(step * self._questions_per_step, len(self._questions))
        chosen = self._order(epoch)[offset : offset + self._questions_per_step]
        if missing := self._questions_per_step - len(chosen):
            chosen = np.concatenate([chosen, self._order(epoch + 1)[:missing]])
        return chosen

    def _order(self, epoch: int) -> IntArray:
        """[len(questions)] indices of an epoch; a batch that spans two epochs gets no question twice."""
        while len(self._orders) <= epoch:
            order = self._shuffled(len(self._orders))
            if num_carried := len(self._orders) * len(self._questions) % self._questions_per_step:
                is_fresh = ~np.isin(order, self._orders[-1][-num_carried:])
                # First the remainder of the batch, then the questions that it skipped, then the others, unmoved.
                head = np.flatnonzero(is_fresh)[: self._questions_per_step - num_carried]
                order = np.concatenate([order[head], np.delete(order, head)])
            self._orders.append(order)
        return self._orders[epoch]

    def _shuffled(self, epoch: int | str) -> IntArray:
        # Sorted by hash: the order does not depend on the numpy version or on the order of the file.
        def rank(index: int) -> bytes:
            key = f"{self._seed}/{epoch}/{self._questions[index].question_id}"
            return hashlib.blake2b(key.encode(), digest_size=16).digest()

        return np.array(sorted(range(len(self._questions)), key=rank), dtype=np.int64)
