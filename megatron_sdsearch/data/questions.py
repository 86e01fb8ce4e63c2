"""Question files in, ``records.Question`` out; and which questions each step gets.

Owns the three row schemas (our own, Search-R1's, FlashRAG's) and the sampling order. How gold answers are written is
``gold_answers.py``'s, where a Search-R1 row keeps its question ``search_r1.py``'s.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from megatron_sdsearch.data.gold_answers import GoldAnswers, Text
from megatron_sdsearch.data.search_r1 import find_question
from megatron_sdsearch.errors import ConfigError, DataError
from megatron_sdsearch.file_kinds import Wanted, refuse_other_kind
from megatron_sdsearch.records import IntArray, Question

_MENDS = "write {question_id, text, gold_answers}, a Search-R1 row, or a FlashRAG row {id, question, golden_answers}"

_Id = Annotated[Text, BeforeValidator(lambda value: str(value) if type(value) is int else value)]


class _Row(BaseModel):
    # Published files carry more columns than we read (ability, metadata, ...).
    model_config = ConfigDict(frozen=True, extra="ignore")


class _OwnRow(_Row):
    question_id: _Id
    text: Text
    gold_answers: GoldAnswers
    dataset: str = ""
    gold_passage_ids: tuple[_Id, ...] = ()

    def to_question(self, path: Path) -> Question:
        return Question(
            question_id=self.question_id,
            text=self.text,
            gold_answers=self.gold_answers,
            dataset=self.dataset,
            gold_passage_ids=self.gold_passage_ids,
        )


class _FlashRagRow(_Row):
    id: _Id
    question: Text
    golden_answers: GoldAnswers

    def to_question(self, path: Path) -> Question:
        # Rows do not say where they come from; FlashRAG's layout does: <dataset>/<split>.jsonl. Links are not followed:
        # the hub's cache keeps its files under other names.
        dataset, split = Path(os.path.abspath(path)).parent.name, path.stem
        # FlashRAG calls row 7 of train "train_7", Search-R1 calls it 7: one question, one id.
        index = self.id.removeprefix(f"{split}_")
        return Question(
            question_id=f"{dataset}:{split}:{index if index.isdecimal() else self.id}",
            text=self.question,
            gold_answers=self.golden_answers,
            dataset=dataset,
        )


class _Message(_Row):
    role: str
    content: str | None = None


class _GroundTruth(_Row):
    target: GoldAnswers


class _RewardModel(_Row):
    # verl's rows of other tasks have the answers themselves there.
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
        return Question(
            # index restarts in each data set and split, so alone it would merge strangers into one group.
            question_id=f"{self.data_source}:{self.extra_info.split}:{self.extra_info.index}",
            text=find_question(
                {"question": self.question, "extra_info.question": self.extra_info.question},
                [(message.role, message.content or "") for message in self.prompt],
            ),
            gold_answers=self._gold_answers(),
            dataset=self.data_source,
        )

    def _gold_answers(self) -> tuple[str, ...]:
        target = self.reward_model.ground_truth.target
        if self.golden_answers is not None and set(self.golden_answers) != set(target):
            raise DataError(
                f"golden_answers: is {self.golden_answers!r:.80}, but reward_model.ground_truth.target is "
                f"{target!r:.80}; remove the wrong one"
            )
        return target


class _Reader(Protocol):
    def __call__(self, path: Path) -> Iterator[tuple[str, Any]]:
        """Place and content of each row; a ``DataError`` in place of content that is none."""
        ...


def read_questions(path: Path) -> tuple[Question, ...]:
    """Read a ``.jsonl`` or ``.parquet`` file of questions, in file order.

    Each row is in our own schema, Search-R1's, or FlashRAG's (recognised by its keys).

    Raises:
        DataError: naming file, line (or row), field and fix: a bad row, an id that stands twice, an unknown suffix,
            a missing or an empty file.
    """
    questions: dict[str, Question] = {}
    for place, question in scan_questions(path):
        if isinstance(question, DataError):
            raise question
        if question.question_id in questions:
            raise DataError(f"{place}: id {question.question_id!r} stands twice; give each question an id of its own")
        questions[question.question_id] = question
    if not questions:
        raise DataError(f"{path}: holds no questions; {_MENDS}")
    return tuple(questions.values())


def scan_questions(path: Path) -> Iterator[tuple[str, Question | DataError]]:
    """Place of every row, with its question or with what is wrong with it; for who wants to go on after a bad row.

    Raises:
        DataError: the file itself cannot be read, is of another kind, or lacks a column that every row needs.
    """
    readers: dict[str, tuple[Wanted, _Reader]] = {
        ".jsonl": ("JSON Lines", _read_jsonl),
        ".parquet": ("parquet", _read_parquet),
    }
    if path.suffix not in readers:
        raise DataError(f"{path}: suffix {path.suffix!r} is unknown; give a .jsonl or .parquet file")
    if not path.is_file():
        raise DataError(f"{path}: does not exist; give the path of a question file")
    wanted, read = readers[path.suffix]
    refuse_other_kind(path, wanted)
    for place, row in read(path):
        try:
            yield place, _parse_row(row, path, place)
        except DataError as error:
            yield place, error


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        lines = path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give a file that may be read") from error
    with lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"{path}:{number}"
            row: Any
            try:
                row = json.loads(line)
            except ValueError as error:  # not JSON, or not UTF-8
                row = DataError(f"{place}: is not JSON ({error}); write one JSON object per line")
            yield place, row


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            _check_columns(path, file.schema_arrow.names)
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", row
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: is not readable as parquet ({error}); write it again") from error


def _check_columns(path: Path, names: Sequence[str]) -> None:
    fields = _schema_of(dict.fromkeys(names)).model_fields
    for name, field in fields.items():
        if field.is_required() and name not in names:
            raise DataError(f"{path}: has no column {name!r}, its columns are {', '.join(names)}; {_MENDS}")


def _parse_row(row: Any, path: Path, place: str) -> Question:
    if isinstance(row, DataError):
        raise row
    if not isinstance(row, dict):
        raise DataError(f"{place}: is not an object; {_MENDS}")
    # Parquet fills absent columns with nulls.
    present = {key: value for key, value in row.items() if value is not None}
    try:
        return _schema_of(present).model_validate(present).to_question(path)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{place}: {field}: {first['msg']}, got {first['input']!r:.80}; {_MENDS}") from error
    except DataError as error:
        raise DataError(f"{place}: {error}") from error


def _schema_of(row: dict[str, Any]) -> type[_OwnRow | _FlashRagRow | _SearchR1Row]:
    if "data_source" in row or "reward_model" in row:
        return _SearchR1Row
    if "golden_answers" in row:
        return _FlashRagRow
    return _OwnRow


class QuestionSampler:
    """Which questions each step gets: pure functions of (seed, step), so that a resumed run needs no state.

    Questions come in epochs, each a shuffle of all of them; batches run on across the border of two epochs.
    """

    def __init__(self, questions: Sequence[Question], seed: int, questions_per_step: int) -> None:
        """Take the pool.

        Raises:
            ConfigError: a batch is larger than the pool.
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
        self._orders: list[IntArray] = []  # of epochs 0, 1, ...: a cache, recomputed at will
        self._spare_order: IntArray | None = None
        self._fresh: tuple[int, IntArray] | None = None  # the last step asked for, and its order: a cache as well

    def batch(self, step: int) -> tuple[Question, ...]:
        """The ``questions_per_step`` questions of that step (0-based), no two the same."""
        return tuple(self._questions[index] for index in self._batch_indices(step))

    def fresh(self, step: int, index: int) -> tuple[Question, int]:
        """The ``index``-th (0-based) question of an endless list that a step may ask beside its batch.

        The list goes round all questions that are not in the batch (all there are, where none is left), in an order of
        its own: a pure function of (seed, step, index).

        Returns:
            The question, and how often batch and list have held it before that place.
        """
        if self._fresh is None or self._fresh[0] != step:
            self._fresh = step, self._fresh_order(step)
        order = self._fresh[1]
        rounds, place = divmod(index, len(order))
        is_in_batch = len(order) == len(self._questions)
        return self._questions[order[place]], rounds + is_in_batch

    def _fresh_order(self, step: int) -> IntArray:
        if self._spare_order is None:
            self._spare_order = self._shuffled("fresh")
        # Steps begin where their predecessor might have ended, so that no question is everybody's first choice.
        rotated = np.roll(self._spare_order, -step * self._questions_per_step)
        is_fresh = ~np.isin(rotated, self._batch_indices(step))
        return rotated[is_fresh] if is_fresh.any() else rotated

    def _batch_indices(self, step: int) -> IntArray:
        epoch, offset = divmod(step * self._questions_per_step, len(self._questions))
        chosen = self._order(epoch)[offset : offset + self._questions_per_step]
        if missing := self._questions_per_step - len(chosen):
            chosen = np.concatenate([chosen, self._order(epoch + 1)[:missing]])
        return chosen

    def _order(self, epoch: int) -> IntArray:
        while len(self._orders) <= epoch:
            self._orders.append(self._next_order())
        return self._orders[epoch]

    def _next_order(self) -> IntArray:
        """[len(questions)] indices of the next epoch; a batch that began in the last one gets no question twice."""
        epoch, size = len(self._orders), len(self._questions)
        order = self._shuffled(epoch)
        num_carried = epoch * size % self._questions_per_step
        if not num_carried:
            return order
        is_fresh = ~np.isin(order, self._orders[-1][-num_carried:])
        # The batch's other half comes first; who was passed over follows it; nobody else moves.
        num_missing = self._questions_per_step - num_carried
        head = np.flatnonzero(is_fresh)[:num_missing]
        return np.concatenate([order[head], np.delete(order, head)])

    def _shuffled(self, epoch: int | str) -> IntArray:
        # Sorting by hash, not a library's generator: the order outlives numpy versions and changes of the file's order.
        def rank(index: int) -> bytes:
            key = f"{self._seed}/{epoch}/{self._questions[index].question_id}"
            return hashlib.blake2b(key.encode(), digest_size=16).digest()

        return np.array(sorted(range(len(self._questions)), key=rank), dtype=np.int64)
