"""Published question files into train, heldout and test of a run, and what was found on the way.

Owns which question goes where, bad rows, duplicates and leaks. Files are found by ``question_sources.py``, rows are
judged by ``questions.py``, the result is written by ``question_writer.py``.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NoReturn

from megatron_sdsearch.data.question_sources import QuestionFile, QuestionSource
from megatron_sdsearch.data.questions import scan_questions
from megatron_sdsearch.data.scoring import normalize_answer
from megatron_sdsearch.errors import DataError
from megatron_sdsearch.records import Question

TEST_SPLITS = ("test", "dev", "train")
"""Where a benchmark's questions are: the first of these that there is (Search-R1, qa_search_test_merge.py)."""
_DEV_SPLITS = ("dev", "test", "train")
_NUM_SHOWN = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareSettings:
    """What goes where.

    Attributes:
        train: data sets whose train split is trained on, in this order.
        test: data sets of the final evaluation, in this order.
        heldout_from: split that the evaluation during training draws from; ``dev`` falls back to ``test`` where there
            is none. A checkpoint that was chosen on test questions flatters itself on them.
        heldout_per_dataset: so many of each of ``test``, or all where there are fewer; 0 writes no heldout file.
        seed: of that draw.
        max_bad_rows: more are an error; up to so many are left out.
        drop_duplicates: of training questions with the same text keep the first.
        drop_leaks: leave out training questions that are asked in heldout or test, too.
    """

    train: tuple[str, ...] = ("nq", "hotpotqa")
    test: tuple[str, ...] = ("nq", "hotpotqa")
    heldout_from: Literal["dev", "test"] = "dev"
    heldout_per_dataset: int = 500
    seed: int = 1
    max_bad_rows: int = 0
    drop_duplicates: bool = False
    drop_leaks: bool = False

    def wanted(self) -> list[tuple[str, str]]:
        """(data set, split) pairs worth fetching; a benchmark of a train split alone is for local files."""
        benchmarks = [(name, split) for name in self.test for split in ("dev", "test")]
        return [(name, "train") for name in self.train] + benchmarks


@dataclass(frozen=True, slots=True, kw_only=True)
class BadRow:
    """A row that is no question; ``place`` is file and line or row."""

    place: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Same:
    """Two questions with the same text; ids."""

    question_id: str
    same_as: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What is written.

    Attributes:
        splits: by name, ``train``, ``heldout``, ``test``; those that are empty are not there.
        origins: of each split, data set -> split that its questions came from.
        files: that were read, with the number of questions in each.
        bad_rows: left out.
        duplicates: in train, each later question with the first one of the same text.
        leaks: questions of train with one of heldout or test.
        num_dropped: from train, as the settings asked.
    """

    splits: dict[str, tuple[Question, ...]]
    origins: dict[str, dict[str, str]]
    files: dict[QuestionFile, int]
    bad_rows: tuple[BadRow, ...]
    duplicates: tuple[Same, ...]
    leaks: tuple[Same, ...]
    num_dropped: int


OnProgress = Callable[[str, int], None]
"""(file's name, rows read of it so far)."""
OnBadRow = Callable[[BadRow], None]


def prepare(
    sources: Sequence[QuestionSource], settings: PrepareSettings, on_progress: OnProgress, on_bad_row: OnBadRow
) -> Prepared:
    """Read what is wanted and sort it into train, heldout and test; the same input gives the same result.

    train keeps the order of ``settings.train`` and of the files (each step's questions are drawn by
    ``questions.QuestionSampler``, whose order does not depend on it). heldout and test are shuffled by the ids, so that
    their first so many (``evaluation.num_questions``) are a fair part.

    Args:
        sources: that hold the data sets.
        settings: what goes where.
        on_progress: called for every row.
        on_bad_row: called for every bad row, before too many of them end it all.

    Raises:
        DataError: a data set is nowhere, a file is unreadable, or there are too many bad rows (the first are told).
    """
    shelf = _Shelf(sources, settings.max_bad_rows, on_progress, on_bad_row)
    train, train_origins = shelf.take(settings.train, ("train",))
    test, test_origins = shelf.take(settings.test, TEST_SPLITS)
    heldout: list[Question] = []
    heldout_origins: dict[str, str] = {}
    if settings.heldout_per_dataset:
        splits = _DEV_SPLITS if settings.heldout_from == "dev" else TEST_SPLITS
        pool, heldout_origins = shelf.take(settings.test, splits)
        heldout = _draw(pool, settings)
    shelf.check_bad_rows()
    duplicates = _duplicates(train)
    leaks = _leaks(train, [*test, *heldout])
    dropped = {s.question_id for s in (duplicates if settings.drop_duplicates else ())}
    dropped |= {s.question_id for s in (leaks if settings.drop_leaks else ())}
    kept = [question for question in train if question.question_id not in dropped]
    by_name = {"train": kept, "heldout": heldout, "test": _shuffled(test, settings.seed)}
    origins = {"train": train_origins, "heldout": heldout_origins, "test": test_origins}
    return Prepared(
        splits={name: tuple(questions) for name, questions in by_name.items() if questions},
        origins={name: origin for name, origin in origins.items() if origin},
        files=shelf.num_questions(),
        bad_rows=tuple(shelf.bad_rows),
        duplicates=duplicates,
        leaks=leaks,
        num_dropped=len(train) - len(kept),
    )


class _Shelf:
    """The sources' files, each read once."""

    def __init__(
        self,
        sources: Sequence[QuestionSource],
        max_bad_rows: int,
        on_progress: OnProgress,
        on_bad_row: OnBadRow,
    ) -> None:
        self._files = list(dict.fromkeys(file for source in sources for file in source.files))
        self._max_bad_rows = max_bad_rows
        self._on_progress = on_progress
        self._on_bad_row = on_bad_row
        self._read: dict[QuestionFile, list[Question]] = {}
        self._places: dict[str, str] = {}  # question_id -> where it was found first
        self.bad_rows: list[BadRow] = []

    def num_questions(self) -> dict[QuestionFile, int]:
        return {file: len(self._read[file]) for file in self._files if file in self._read}

    def take(self, datasets: Sequence[str], splits: Sequence[str]) -> tuple[list[Question], dict[str, str]]:
        """For each data set its questions in the first of ``splits`` that holds any, and which that was."""
        taken: list[Question] = []
        origins: dict[str, str] = {}
        for dataset in datasets:
            for split in splits:
                files = [f for f in self._files if f.split == split and f.dataset in (None, dataset)]
                if questions := [q for file in files for q in self._questions(file) if q.dataset == dataset]:
                    taken += questions
                    origins[dataset] = split
                    break
            else:
                self._fail(dataset, splits)
        return taken, origins

    def check_bad_rows(self) -> None:
        if len(self.bad_rows) <= self._max_bad_rows:
            return
        shown = "".join(f"\n  {bad.reason}" for bad in self.bad_rows[:_NUM_SHOWN])
        more = len(self.bad_rows) - _NUM_SHOWN
        raise DataError(
            f"bad rows: {len(self.bad_rows)}, and at most {self._max_bad_rows} may be left out; "
            f"fix them, or raise the limit{shown}" + (f"\n  and {more} more" if more > 0 else "")
        )

    def _questions(self, file: QuestionFile) -> list[Question]:
        if file not in self._read:
            self._read[file] = list(self._scan(file))
        return self._read[file]

    def _scan(self, file: QuestionFile) -> Iterable[Question]:
        for number, (place, question) in enumerate(scan_questions(file.path), start=1):
            self._on_progress(file.name, number)
            if isinstance(question, DataError):
                self._reject(place, str(question))
            elif (first := self._places.setdefault(question.question_id, place)) != place:
                # Files that were shuffled before they were numbered (AutoRefine's valid_500) do this to others.
                told = f"{place}: id {question.question_id!r} is that of {first}"
                self._reject(place, f"{told}; give each question an id of its own")
            else:
                yield question

    def _reject(self, place: str, reason: str) -> None:
        bad_row = BadRow(place=place, reason=reason)
        self.bad_rows.append(bad_row)
        self._on_bad_row(bad_row)

    def _fail(self, dataset: str, splits: Sequence[str]) -> NoReturn:
        self.check_bad_rows()  # rather than "none found" of a file whose every row is bad
        there = {(q.dataset, f.split) for f, questions in self._read.items() for q in questions}
        there |= {(f.dataset, f.split) for f in self._files if f.dataset is not None}
        names = ", ".join(sorted(f"{name}/{split}" for name, split in there)) or "nothing"
        raise DataError(
            f"{dataset}: no question of it in a split {' or '.join(splits)}; there is {names}: "
            "name one of these, or add the source that holds it"
        )


def _draw(pool: Sequence[Question], settings: PrepareSettings) -> list[Question]:
    shuffled = _shuffled(pool, settings.seed)
    ranks: Counter[str] = Counter()
    drawn = []
    for question in shuffled:
        if ranks[question.dataset] < settings.heldout_per_dataset:
            ranks[question.dataset] += 1
            drawn.append(question)
    return drawn


def _shuffled(questions: Sequence[Question], seed: int) -> list[Question]:
    # By hash of the id, as in QuestionSampler: a question that is added moves no other.
    def rank(question: Question) -> bytes:
        return hashlib.blake2b(f"{seed}/heldout/{question.question_id}".encode(), digest_size=16).digest()

    return sorted(questions, key=rank)


def _text_key(question: Question) -> str:
    # SQuAD's normalisation, as for answers: "Who is the king" and "who is king?" are one question.
    return normalize_answer(question.text) or question.text


def _duplicates(questions: Sequence[Question]) -> tuple[Same, ...]:
    first: dict[str, str] = {}
    found = []
    for question in questions:
        earlier = first.setdefault(_text_key(question), question.question_id)
        if earlier != question.question_id:
            found.append(Same(question_id=question.question_id, same_as=earlier))
    return tuple(found)


def _leaks(train: Sequence[Question], asked_later: Sequence[Question]) -> tuple[Same, ...]:
    later: dict[str, str] = {}
    for question in asked_later:
        later.setdefault(_text_key(question), question.question_id)
    return tuple(
        Same(question_id=question.question_id, same_as=later[key])
        for question in train
        if (key := _text_key(question)) in later
    )
