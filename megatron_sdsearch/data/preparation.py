"""Published question files into train, heldout and test of a run, and a manifest of what was found on the way.

Owns which question goes where, bad rows, duplicates and leaks; ``questions.py`` reads the rows. Two layouts of files
are published:

    FlashRAG     <dataset>/<split>.jsonl         RUC-NLPIR/FlashRAG_datasets; the folder names the data set
    Search-R1    <split>.parquet                 PeterJinGo/nq_hotpotqa_train; rows name theirs

The Hugging Face hub's files are fetched as they are and read like any others. The ``datasets`` library is not used: it
wants one type for each column of a file, and refuses popqa, whose metadata has two (FlashRAG issue 132).
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
from megatron_sdsearch.errors import ConfigError, DataError
from megatron_sdsearch.records import Question

DEFAULT_REPOSITORY = "RUC-NLPIR/FlashRAG_datasets"
MANIFEST = "manifest.json"
SPLITS = ("train", "dev", "test")
#: Where a benchmark's questions are: the first of these that exists (Search-R1, qa_search_test_merge.py).
TEST_SPLITS = ("test", "dev", "train")
FileFormat = Literal["parquet", "jsonl"]
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
    """What goes where.

    Attributes:
        train: data sets whose train split is trained on, in this order.
        test: data sets of the final evaluation, in this order.
        heldout_from: split that the evaluation during training draws from; ``dev`` falls back to ``test`` where there
            is none. A checkpoint that was chosen on test questions flatters itself on them.
        heldout_per_dataset: number drawn from each of ``test``, or all where there are fewer; 0 writes no heldout file.
        seed: of that draw.
        max_bad_rows: up to this many are left out; more are an error.
        drop_duplicates: of training questions with the same text keep the first.
        drop_leaks: leave out training questions that are asked in heldout or test, too.
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
    """One file that exists.

    Attributes:
        path: of the file.
        source: as it was asked for; of the hub with the commit that was found, so that it can be fetched again.
        name: the path inside its source, the same on every machine.
        split: train, dev or test, by the file's name.
        dataset: by the folder's name; None where the rows say it.
    """

    path: Path
    source: str
    name: str
    split: str
    dataset: str | None


class BadRow(NamedTuple):
    """A row that is no question; ``location`` is file and line or row."""

    location: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What is written.

    Attributes:
        splits: by name, ``train``, ``heldout``, ``test``; without empty ones.
        origins: of each split, data set -> split that its questions came from.
        files: that were read, with the number of questions in each.
        num_bad_rows: left out.
        duplicates: in train, id of each later question -> id of the first one with the same text.
        leaks: id of a question of train -> id of the one with the same text in heldout or test.
        num_dropped: from train, as the settings asked.
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
    """The question files of a source by name, fetched first from the hub.

    Args:
        source: a folder in one of the two layouts, a file, or ``hub[:OWNER/NAME][@REVISION]``.
        settings: of the hub nothing is fetched but what these need.

    Raises:
        ConfigError: the source does not exist, or it holds no question files.
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
        problem = f"{path} is called neither of {', '.join(SPLITS)} with .jsonl or .parquet"
        raise ConfigError(
            "SOURCE", problem, "name it <dataset>/<split>.jsonl (FlashRAG) or <split>.parquet (Search-R1)"
        )
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
        raise ConfigError(
            "SOURCE",
            f"{root} holds neither <dataset>/<split>.jsonl (FlashRAG) nor <split>.parquet (Search-R1), "
            f"with a split of {', '.join(SPLITS)}",
            "give the folder above the data sets' folders",
        )
    return sorted(found, key=lambda file: file.name)


def _fetch_from_hub(source: str, settings: PrepareSettings) -> list[QuestionFile]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    name, _, revision = source.removeprefix(_HUB).removeprefix(":").partition("@")
    repository = name or DEFAULT_REPOSITORY
    # A benchmark with a train split alone is for local files: those of the others need not be fetched.
    patterns = [f"{dataset}/train.jsonl" for dataset in settings.train]
    patterns += [f"{dataset}/{split}.jsonl" for dataset in settings.test for split in ("dev", "test")]
    patterns += [f"{split}.parquet" for split in SPLITS]
    try:
        download = snapshot_download(
            repository, repo_type="dataset", revision=revision or None, allow_patterns=patterns
        )
    except (OSError, HFValidationError) as error:  # HTTP errors and "not in the cache" are OSErrors, too
        reason = " ".join(str(error).split())
        fix = "fix the name or the network, or fetch the files elsewhere and give their folder"
        raise ConfigError("SOURCE", f"{repository} cannot be fetched from the hub: {reason}", fix) from error
    folder = Path(download)  # named after its commit
    return _list_folder(folder, f"{_HUB}:{repository}@{folder.name}")


def prepare(
    files: Sequence[QuestionFile], settings: PrepareSettings, bad_rows: list[BadRow], on_file: OnFile
) -> Prepared:
    """Read what is wanted and sort it into train, heldout and test; the same input gives the same result.

    train keeps the order of ``settings.train`` and of the files (each step's questions are drawn by
    ``questions.QuestionSampler``, whose order does not depend on it). heldout and test are shuffled by the ids, so that
    their first ``evaluation.num_questions`` are a fair sample.

    Args:
        files: of all sources; each is read once, when it is needed.
        settings: what goes where.
        bad_rows: filled with all bad rows, also when too many of them raise.
        on_file: called with a file's name and its number of rows when it has been read.

    Raises:
        DataError: a data set is nowhere, a file is unreadable, or there are too many bad rows; shows the first ones.
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
    """Reads each file once, and collects its questions and its bad rows."""

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
        """For each data set its questions in the first of ``splits`` that holds any, and which split that was."""
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
                self.check_bad_rows()  # rather than "none found" of a file whose every row is bad
                there = {(q.dataset, file.split) for file, questions in self.questions.items() for q in questions}
                there |= {(file.dataset, file.split) for file in self._files if file.dataset is not None}
                pairs = ", ".join(sorted(f"{name}/{split}" for name, split in there)) or "nothing"
                raise DataError(
                    f"{dataset}: no question of it in a split {' or '.join(splits)}; there is {pairs}: "
                    "name one of these, or add the source that holds it"
                )
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
                # Files that were shuffled before they were numbered (AutoRefine's valid_500) do this to others.
                problem = f"{location}: id {question.question_id!r} is that of {first}"
                reason = f"{problem}; give each question an id of its own"
            else:
                yield question
                continue
            self._bad_rows.append(BadRow(location, reason))
        self._on_file(file.name, num_rows)


def _shuffled(questions: Sequence[Question], seed: int) -> list[Question]:
    # By hash of the id, as in QuestionSampler: a question that is added moves no other.
    def rank(question: Question) -> bytes:
        return hashlib.blake2b(f"{seed}/heldout/{question.question_id}".encode(), digest_size=16).digest()

    return sorted(questions, key=rank)


def _text_key(question: Question) -> str:
    # SQuAD's normalisation, as for answers: "Who is the king" and "who is king?" are one question.
    return normalize_answer(question.text) or question.text


def _first_with_text(questions: Sequence[Question]) -> dict[str, str]:
    """Text key -> id of the first question with it."""
    first: dict[str, str] = {}
    for question in questions:
        first.setdefault(_text_key(question), question.question_id)
    return first


def check_target(folder: Path) -> None:
    """Check that replacing the folder loses nothing: it may hold an earlier preparation alone.

    Raises:
        ConfigError: it holds other things.
    """
    if not folder.exists():
        return
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        ours = {MANIFEST, *manifest["files"]}
    except (OSError, ValueError, KeyError, TypeError):  # not written by us: nothing in it may be replaced
        ours = set()
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {""}
    if not names <= ours:
        raise ConfigError("--out", f"{folder} holds other things than prepared questions", "give a new folder")


def write_prepared(prepared: Prepared, settings: PrepareSettings, folder: Path, file_format: FileFormat) -> Path:
    """Write one file per split in our own schema, and the manifest; an earlier preparation there is replaced.

    The folder appears whole or not at all, and the same input gives the same bytes (parquet: with the same pyarrow).

    Returns:
        Path of the manifest.

    Raises:
        ConfigError: see ``check_target``.
        DataError: the files cannot be written; what was there stays.
    """
    check_target(folder)
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    replaced = partial.with_name(f"{partial.name}-old")
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
        manifest = {"layout": _LAYOUT, "settings": asdict(settings), "files": files, **_findings(prepared)}
        text = json.dumps(manifest, ensure_ascii=False, indent=2) + "\n"
        (partial / MANIFEST).write_text(text, encoding="utf-8")
        if folder.exists():
            folder.rename(replaced)
        partial.rename(folder)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException as error:
        if replaced.exists() and not folder.exists():
            replaced.rename(folder)  # Ctrl-C between the two renames must not lose what was there
        if isinstance(error, OSError):
            raise DataError(f"{folder}: cannot be written ({error.strerror}); give another --out") from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder / MANIFEST


def _findings(prepared: Prepared) -> dict[str, Any]:
    """What the manifest says besides the files: sources, bad rows, duplicates, leaks."""
    findings: dict[str, Any] = {
        "sources": [
            {"source": file.source, "file": file.name, "num_questions": number, "sha256": _sha256(file.path)}
            for file, number in prepared.files.items()
        ],
        "num_bad_rows": prepared.num_bad_rows,
        "num_dropped": prepared.num_dropped,
    }
    for name, same_as in (("duplicates", prepared.duplicates), ("leaks", prepared.leaks)):
        by_kind = Counter(f"{a.rpartition(':')[0]} of {b.rpartition(':')[0]}" for a, b in same_as.items())
        findings[name] = {"num": len(same_as), "by_kind": dict(sorted(by_kind.items())), "same_as": dict(same_as)}
    return findings


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
