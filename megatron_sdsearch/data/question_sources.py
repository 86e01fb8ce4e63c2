"""Where question files come from: folders, single files, and data sets of the Hugging Face hub.

Owns the two layouts that are published, and nothing of what stands inside the files (``questions.py``):

    FlashRAG     <dataset>/<split>.jsonl         RUC-NLPIR/FlashRAG_datasets; the folder names the data set
    Search-R1    <split>.parquet                 PeterJinGo/nq_hotpotqa_train; rows name theirs

The hub's files are fetched as they are and read like any others. The ``datasets`` library is not used: it wants one
type for each column of a file, and refuses popqa, whose metadata has two (FlashRAG issue 132).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_sdsearch.config import expand_home
from megatron_sdsearch.errors import ConfigError

HUB = "hub"
DEFAULT_REPOSITORY = "RUC-NLPIR/FlashRAG_datasets"
SPLITS = ("train", "dev", "test")
_SUFFIXES = (".jsonl", ".parquet")


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionFile:
    """One file that is there.

    Attributes:
        path: of the file.
        source: name of the source.
        name: the path inside its source, the same on every machine.
        split: train, dev or test, by the file's name.
        dataset: by the folder's name; None where the rows say it.
    """

    path: Path
    source: str
    name: str
    split: str
    dataset: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionSource:
    """A place that holds question files.

    Attributes:
        name: as it was asked for; of the hub with the commit that was found, so that the same can be had again.
        files: sorted by name.
    """

    name: str
    files: tuple[QuestionFile, ...]


def open_source(name: str, wanted: Sequence[tuple[str, str]]) -> QuestionSource:
    """The question files of ``name``, fetched first where it is the hub's.

    Args:
        name: a folder in one of the two layouts, a file, or ``hub[:OWNER/NAME][@REVISION]``.
        wanted: (data set, split) pairs; of the hub nothing else is fetched.

    Raises:
        ConfigError: there is no such place, or it holds no question files.
    """
    if name == HUB or name.startswith((f"{HUB}:", f"{HUB}@")):
        repository, _, revision = name.removeprefix(HUB).removeprefix(":").partition("@")
        return _from_hub(repository or DEFAULT_REPOSITORY, revision or None, wanted)
    try:
        path = Path(expand_home(name))
    except ValueError as error:
        raise ConfigError("SOURCE", f"{name} does not exist", str(error)) from error
    if path.is_file():
        return QuestionSource(name=name, files=(_single_file(path, name),))
    if not path.is_dir():
        raise ConfigError("SOURCE", f"{name} does not exist", "give a folder, a file, or hub")
    return QuestionSource(name=name, files=_in_folder(path, name))


def _single_file(path: Path, source: str) -> QuestionFile:
    if path.stem not in SPLITS or path.suffix not in _SUFFIXES:
        told = f"{path} is called neither of {', '.join(SPLITS)} with .jsonl or .parquet"
        raise ConfigError("SOURCE", told, "name it <dataset>/<split>.jsonl (FlashRAG) or <split>.parquet (Search-R1)")
    return QuestionFile(path=path, source=source, name=path.name, split=path.stem, dataset=None)


def _in_folder(root: Path, source: str) -> tuple[QuestionFile, ...]:
    found = [file for folder in (root, *_folders(root)) for file in _named_after_splits(root, folder, source)]
    if not found:
        raise ConfigError(
            "SOURCE",
            f"{root} holds neither <dataset>/<split>.jsonl (FlashRAG) nor <split>.parquet (Search-R1), "
            f"with a split of {', '.join(SPLITS)}",
            "give the folder above the data sets' folders",
        )
    return tuple(sorted(found, key=lambda file: file.name))


def _folders(root: Path) -> Iterable[Path]:
    return (path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _named_after_splits(root: Path, folder: Path, source: str) -> Iterable[QuestionFile]:
    dataset = None if folder == root else folder.name
    for split in SPLITS:
        for suffix in _SUFFIXES:
            path = folder / f"{split}{suffix}"
            if path.is_file():
                name = path.relative_to(root).as_posix()
                yield QuestionFile(path=path, source=source, name=name, split=split, dataset=dataset)


def _from_hub(repository: str, revision: str | None, wanted: Sequence[tuple[str, str]]) -> QuestionSource:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    patterns = [f"{dataset}/{split}.jsonl" for dataset, split in wanted] + [f"{split}.parquet" for split in SPLITS]
    try:
        folder = Path(snapshot_download(repository, repo_type="dataset", revision=revision, allow_patterns=patterns))
    except (OSError, HFValidationError) as error:  # HTTP errors and "not in the cache" are OSErrors, too
        reason = " ".join(str(error).split())
        fix = "fix the name or the network, or fetch the files elsewhere and give their folder"
        raise ConfigError("SOURCE", f"{repository} cannot be fetched from the hub: {reason}", fix) from error
    # A snapshot's folder is named after its commit.
    name = f"{HUB}:{repository}@{folder.name}"
    return QuestionSource(name=name, files=_in_folder(folder, name))
