"""Prepares published question files as the train, heldout and test files of a run, with a manifest.

Owns the splits, bad rows, duplicates and leaks; ``questions.py`` reads the rows. Two file layouts are supported:

    FlashRAG     <dataset>/<split>.jsonl         RUC-NLPIR/FlashRAG_datasets; the folder names the data set
    Search-R1    <split>.parquet                 PeterJinGo/nq_hotpotqa_train; rows name theirs

Files of the Hugging Face hub are downloaded and read like local ones. The ``datasets`` library is not used: it requires
one type per column and fails on popqa's metadata (FlashRAG issue 132).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_sdsearch.config import expand_home
from megatron_sdsearch.data.questions import scan_questions
from megatron_sdsearch.data.scoring import normalize_answer
from megatron_sdsearch.errors import ConfigError, DataError, cause_of
from megatron_sdsearch.files import replace_folder
from megatron_sdsearch.records import Question

DEFAULT_REPOSITORY = "RUC-NLPIR/FlashRAG_datasets"
MANIFEST = "manifest.json"
SPLITS = ("train", "dev", "test")
#: A benchmark's questions are in the first of these splits that exists (Search-R1, qa_search_test_merge.py).
TEST_SPLITS = ("test", "dev", "train")
_DEV_SPLITS = ("dev", "test", "train")
_SUFFIXES = (".jsonl", ".parquet")
_HUB = "hub"
_LAYOUT = 1
_NUM_SHOWN = 10
_TEXT, _TEXTS = pa.string(), pa.list_(pa.string())
_COLUMNS = {"question_id": _TEXT, "text": _TEXT, "gold_answers": _TEXTS, "dataset": _TEXT, "gold_passage_ids": _TEXTS}
_SCHEMA = pa.schema([pa.field(name, column, nullable=False) for name, column in _COLUMNS.items()])


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareSettings:
    """Data sets, splits and filters.

    Attributes:
        train: data sets for training (their train splits), in this order.
        test: data sets of the final evaluation, in this order.
        heldout_from: source split of the questions for evaluation during training; ``dev`` falls back to ``test`` if
            there is none. Choosing a checkpoint by test questions biases its test score.
        heldout_per_dataset: number of questions drawn from each of ``test``, at most all; 0 writes no heldout file.
        seed: of that draw.
        max_bad_rows: up to this many are left out; more are an error.
        drop_duplicates: keep only the first of training questions with the same text.
        drop_leaks: leave out training questions that also occur in heldout or test.
    """

    train: Sequence[str] = ("nq", "hotpotqa")
    test: Sequence[str] = ("nq", "hotpotqa")
    heldout_from: Literal["dev", "test"] = "dev"
    heldout_per_dataset: int = 500
    seed: int = 1
    max_bad_rows: int = 0
    drop_duplicates: bool = False
    drop_leaks: bool = False


class QuestionFile(NamedTuple):
    """An existing question file.

    Attributes:
        path: of the file.
        source: as given; for the hub with the commit, so that it can be downloaded again.
        name: path relative to the source, the same on every machine.
        split: train, dev or test, from the file's name.
        dataset: from the folder's name; None if the rows name it.
    """

    path: Path
    source: str
    name: str
    split: str
    dataset: str | None


class BadRow(NamedTuple):
    """An invalid row; ``location`` is file and line or row."""

    location: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """The prepared questions, and what the manifest reports.

    Attributes:
        splits: questions of ``train``, ``heldout`` and ``test``, without empty ones.
        origins: for each split, data set -> original split.
        files: the files read -> their number of questions.
        num_bad_rows: rows left out.
        duplicates: in train, id of each later question -> id of the first one with the same text.
        leaks: id of a question in train -> id of one with the same text in heldout or test.
        num_dropped: removed from train by the settings.
    """

    splits: Mapping[str, tuple[Question, ...]]
    origins: Mapping[str, Mapping[str, str]]
    files: Mapping[QuestionFile, int]
    num_bad_rows: int
    duplicates: Mapping[str, str]
    leaks: Mapping[str, str]
    num_dropped: int


OnFile = Callable[[str, int], None]


def find_question_files(source: str, settings: PrepareSettings) -> list[QuestionFile]:
    """List the question files of a source, sorted by name; downloads those of the hub.

    Args:
        source: a folder in one of the two layouts, a file, or ``hub[:OWNER/NAME][@REVISION]``.
        settings: only the files that these need are downloaded.

    Raises:
        ConfigError: the source does not exist, or holds no question files.
    """
    if source == _HUB or source.startswith((f"{_HUB}:", f"{_HUB}@")):
        return _fetch_from_hub(source, settings)
    try:
        path = Path(expand_home(source))
    except ValueError as error:
        raise ConfigError("SOURCE", f"{source} does not exist", str(error)) from error
    if path.is_dir():
        return _list_folder(path, source)
    if not path.is_file():
        raise ConfigError("SOURCE", f"{source} does not exist", "give a folder, a file, or hub")
    if path.stem not in SPLITS or path.suffix not in _SUFFIXES:
        problem = f"{path} is not named {', '.join(SPLITS)} with .jsonl or .parquet"
        fix = "name it <dataset>/<split>.jsonl (FlashRAG) or <split>.parquet (Search-R1)"
        raise ConfigError("SOURCE", problem, fix)
    return [QuestionFile(path, source, path.name, split=path.stem, dataset=None)]


def _list_folder(root: Path, source: str) -> list[QuestionFile]:
    folders = [path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")]
    found = []
    for folder in (root, *folders):
        for path in (folder / f"{split}{suffix}" for split in SPLITS for suffix in _SUFFIXES):
            if path.is_file():
                dataset = None if folder == root else folder.name
                found.append(QuestionFile(path, source, path.relative_to(root).as_posix(), path.stem, dataset))
    if not found:
        layouts = "<dataset>/<split>.jsonl (FlashRAG) nor <split>.parquet (Search-R1)"
        problem = f"{root} holds neither {layouts}, with a split of {', '.join(SPLITS)}"
        raise ConfigError("SOURCE", problem, "give the parent folder of the data sets' folders")
    return sorted(found, key=lambda file: file.name)


def _fetch_from_hub(source: str, settings: PrepareSettings) -> list[QuestionFile]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    name, _, revision = source.removeprefix(_HUB).removeprefix(":").partition("@")
    repository = name or DEFAULT_REPOSITORY
    # A test data set that has only a train split must be a local file; downloading all train splits would be wasteful.
    patterns = [f"{dataset}/train.jsonl" for dataset in settings.train]
    patterns += [f"{dataset}/{split}.jsonl" for dataset in settings.test for split in ("dev", "test")]
    patterns += [f"{split}.parquet" for split in SPLITS]
    try:
        download = snapshot_download(
            repository, repo_type="dataset", revision=revision or None, allow_patterns=patterns
        )
    except (OSError, HFValidationError) as error:  # HTTP errors and "not in the cache" are OSErrors, too
        fix = "fix the name or the network, or download the files elsewhere and give their folder"
        problem = f"{repository} cannot be fetched from the hub: {cause_of(error)}"
        raise ConfigError("SOURCE", problem, fix) from error
    folder = Path(download)  # named after its commit
    return _list_folder(folder, f"{_HUB}:{repository}@{folder.name}")


def prepare(
    files: Sequence[QuestionFile], settings: PrepareSettings, bad_rows: list[BadRow], on_file: OnFile
) -> Prepared:
    """Read the files and split the questions into train, heldout and test; deterministic.

    train keeps the order of ``settings.train`` and of the files (``questions.QuestionSampler`` does not depend on it).
    heldout and test are shuffled by id, so that their first ``evaluation.num_questions`` are a fair sample.

    Args:
        files: of all sources; each is read once, when it is needed.
        settings: data sets, splits and filters.
        bad_rows: receives all bad rows, also if there are too many.
        on_file: called with the name and the number of rows of each file that was read.

    Raises:
        DataError: a data set is missing, a file is unreadable, or there are too many bad rows; shows the first ones.
    """
    reader = _Reader(files, settings.max_bad_rows, bad_rows, on_file)
    train, train_origins = reader.take(settings.train, ("train",))
    test, test_origins = reader.take(settings.test, TEST_SPLITS)
    heldout: list[Question] = []
    heldout_origins: dict[str, str] = {}
    if settings.heldout_per_dataset:
        splits = _DEV_SPLITS if settings.heldout_from == "dev" else TEST_SPLITS
        pool, heldout_origins = reader.take(settings.test, splits)
        num_drawn: Counter[str] = Counter()
        for question in _shuffled(pool, settings.seed):
            if num_drawn[question.dataset] < settings.heldout_per_dataset:
                num_drawn[question.dataset] += 1
                heldout.append(question)
    reader.check_bad_rows()
    first, later = _first_with_text(train), _first_with_text([*test, *heldout])
    same = {question.question_id: first[_text_key(question)] for question in train}
    duplicates = {question_id: earlier for question_id, earlier in same.items() if earlier != question_id}
    leaks = {question.question_id: later[key] for question in train if (key := _text_key(question)) in later}
    dropped = {*(duplicates if settings.drop_duplicates else ()), *(leaks if settings.drop_leaks else ())}
    kept = [question for question in train if question.question_id not in dropped]
    by_name = {"train": kept, "heldout": heldout, "test": _shuffled(test, settings.seed)}
    origins = {"train": train_origins, "heldout": heldout_origins, "test": test_origins}
    return Prepared(
        splits={name: tuple(questions) for name, questions in by_name.items() if questions},
        origins={name: origin for name, origin in origins.items() if origin},
        files={file: len(reader.questions[file]) for file in files if file in reader.questions},
        num_bad_rows=len(bad_rows),
        duplicates=duplicates,
        leaks=leaks,
        num_dropped=len(train) - len(kept),
    )


class _Reader:
    """Reads each file once, and collects questions and bad rows."""

    def __init__(
        self, files: Sequence[QuestionFile], max_bad_rows: int, bad_rows: list[BadRow], on_file: OnFile
    ) -> None:
        self._files = list(dict.fromkeys(files))
        self._max_bad_rows = max_bad_rows
        self._bad_rows = bad_rows
        self._on_file = on_file
        self._first_locations: dict[str, str] = {}  # by question_id
        self.questions: dict[QuestionFile, list[Question]] = {}

    def take(self, datasets: Sequence[str], splits: Sequence[str]) -> tuple[list[Question], dict[str, str]]:
        """Return the questions of each data set in the first of ``splits`` that has any, and that split."""
        taken: list[Question] = []
        origins: dict[str, str] = {}
        for dataset in datasets:
            for split in splits:
                files = [file for file in self._files if file.split == split and file.dataset in (None, dataset)]
                for file in files:
                    if file not in self.questions:
                        self.questions[file] = list(self._read(file))
                if found := [q for file in files for q in self.questions[file] if q.dataset == dataset]:
                    taken += found
                    origins[dataset] = split
                    break
            else:
                self.check_bad_rows()  # if all rows of a file are bad, report them instead
                there = {(q.dataset, file.split) for file, questions in self.questions.items() for q in questions}
                there |= {(file.dataset, file.split) for file in self._files if file.dataset is not None}
                pairs = ", ".join(sorted(f"{name}/{split}" for name, split in there)) or "nothing"
                problem = f"no questions in a split {' or '.join(splits)}; found {pairs}"
                raise DataError(f"{dataset}: {problem}: choose one of these, or add a source that holds it")
        return taken, origins

    def check_bad_rows(self) -> None:
        if len(self._bad_rows) <= self._max_bad_rows:
            return
        shown = "".join(f"\n  {bad.reason}" for bad in self._bad_rows[:_NUM_SHOWN])
        more = len(self._bad_rows) - _NUM_SHOWN
        raise DataError(
            f"bad rows: {len(self._bad_rows)}, and at most {self._max_bad_rows} may be left out; "
            f"fix them, or raise the limit{shown}" + (f"\n  and {more} more" if more > 0 else "")
        )

    def _read(self, file: QuestionFile) -> Iterator[Question]:
        num_rows = 0
        for location, question in scan_questions(file.path):
            num_rows += 1
            if isinstance(question, DataError):
                reason = str(question)
            elif (first := self._first_locations.setdefault(question.question_id, location)) != location:
                # Happens with files that were shuffled before they were numbered (AutoRefine's valid_500).
                reason = f"{location}: id {question.question_id!r} is that of {first}; give each question its own id"
            else:
                yield question
                continue
            self._bad_rows.append(BadRow(location, reason))
        self._on_file(file.name, num_rows)


def _shuffled(questions: Sequence[Question], seed: int) -> list[Question]:
    # By hash of the id, as in QuestionSampler: an added question moves no other.
    def rank(question: Question) -> bytes:
        return hashlib.blake2b(f"{seed}/heldout/{question.question_id}".encode(), digest_size=16).digest()

    return sorted(questions, key=rank)


def _text_key(question: Question) -> str:
    # SQuAD's normalisation, as for answers: "The capital of Peru" and "capital of Peru?" are one question.
    return normalize_answer(question.text) or question.text


def _first_with_text(questions: Sequence[Question]) -> dict[str, str]:
    """Map text keys to the id of the first question with that text."""
    return {_text_key(question): question.question_id for question in reversed(questions)}


def check_target(folder: Path) -> None:
    """Check that a folder may be replaced: it holds nothing but an earlier preparation.

    Raises:
        ConfigError: it holds other files.
    """
    if not folder.exists():
        return
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        ours = {MANIFEST, *manifest["files"]}
    except (OSError, ValueError, KeyError, TypeError):  # not a preparation
        ours = set()
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {""}
    if not names <= ours:
        raise ConfigError("--out", f"{folder} holds files other than prepared questions", "give a new folder")


def write_prepared(
    prepared: Prepared, settings: PrepareSettings, folder: Path, file_format: Literal["parquet", "jsonl"]
) -> Path:
    """Write one file per split in our own schema, and the manifest; replaces an earlier preparation.

    The folder is replaced as a whole, and the same input gives the same bytes (parquet: with the same pyarrow).

    Returns:
        Path of the manifest.

    Raises:
        ConfigError: see ``check_target``.
        DataError: the files cannot be written; an earlier preparation is kept.
    """
    check_target(folder)
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        files = {}
        for split, questions in prepared.splits.items():
            path = partial / f"{split}.{file_format}"
            rows = [asdict(question) for question in questions]
            if file_format == "parquet":
                pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), path, compression="zstd")
            else:
                lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                path.write_text("".join(lines), encoding="utf-8", newline="\n")
            files[path.name] = {
                "num_questions": len(questions),
                "datasets": dict(sorted(Counter(question.dataset for question in questions).items())),
                "from_split": prepared.origins[split],
                "sha256": _sha256(path),
            }
        manifest: dict[str, Any] = {"layout": _LAYOUT, "settings": asdict(settings), "files": files}
        manifest["sources"] = [
            {"source": file.source, "file": file.name, "num_questions": number, "sha256": _sha256(file.path)}
            for file, number in prepared.files.items()
        ]
        manifest |= {"num_bad_rows": prepared.num_bad_rows, "num_dropped": prepared.num_dropped}
        manifest |= {"duplicates": _pairs(prepared.duplicates), "leaks": _pairs(prepared.leaks)}
        text = json.dumps(manifest, ensure_ascii=False, indent=2) + "\n"
        (partial / MANIFEST).write_text(text, encoding="utf-8")
        replace_folder(partial, folder)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror}); give another --out") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder / MANIFEST


def _pairs(same_as: Mapping[str, str]) -> dict[str, Any]:
    """Return the manifest entry of questions that have the text of another one."""
    by_kind = Counter(f"{a.rpartition(':')[0]} of {b.rpartition(':')[0]}" for a, b in same_as.items())
    return {"num": len(same_as), "by_kind": dict(sorted(by_kind.items())), "same_as": dict(same_as)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
