"""In-process BM25: a tantivy index with the rankings of Lucene, and therefore of Elasticsearch with one shard.

Owns the index's layout on disk, its manifest, and when it is rebuilt. ``analysis.py`` produces the terms.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, Self

import tantivy
from pydantic import BaseModel, ConfigDict, ValidationError

from megatron_sdsearch.errors import ConfigError, DataError, RetrievalError, SDSearchError, cause_of
from megatron_sdsearch.files import nearest_existing, write_file
from megatron_sdsearch.records import Passage
from megatron_sdsearch.retrieval.analysis import ANALYZERS
from megatron_sdsearch.retrieval.corpus import read_corpus, sha256_of_corpus

_LAYOUT = 1
"""Increase it when the meaning of an index folder changes, so that older folders are rebuilt."""
_VERSION = importlib.metadata.version("tantivy")

_MANIFEST = "manifest.json"
_COMPRESSION = 5
"""Upper limit on the compression ratio of a corpus."""
_MIN_HEAP_BYTES, _MAX_HEAP_BYTES = 64 << 20, 4000 << 20


class Manifest(BaseModel):
    """Identifies the content of an index folder; equal manifests give equal results.

    Attributes:
        layout: ``_LAYOUT`` of the version that wrote it.
        analyzer: of the terms.
        corpus_sha256: of the corpus file's bytes.
        num_passages: in the index.
        tantivy_version: of the library that wrote the files.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    layout: int
    analyzer: Literal["standard", "english"]
    corpus_sha256: str
    num_passages: int
    tantivy_version: str

    @classmethod
    def read(cls, index_dir: Path) -> Manifest | None:
        """Read the folder's manifest; ``None`` if it is missing or invalid."""
        with suppress(OSError, ValidationError):
            return cls.model_validate_json((index_dir / _MANIFEST).read_bytes())
        return None

    def fits(self, corpus_sha256: str, analyzer: str) -> bool:
        """Return whether ``build`` would create the same index from this corpus."""
        mine = (self.layout, self.tantivy_version, self.corpus_sha256, self.analyzer)
        return mine == (_LAYOUT, _VERSION, corpus_sha256, analyzer)


class TantivyRetriever:
    """A ``Retriever`` over one index folder, in this process.

    Args:
        index: the opened folder.
        manifest: of that folder.
    """

    def __init__(self, index: tantivy.Index, manifest: Manifest) -> None:
        self.num_passages = manifest.num_passages
        self.fingerprint = (
            f"tantivy-{manifest.tantivy_version}/{manifest.layout}/{manifest.analyzer}/{manifest.corpus_sha256}"
        )
        self._schema = index.schema
        self._searcher = index.searcher()
        self._analyze = ANALYZERS[manifest.analyzer]

    @classmethod
    def build(
        cls,
        corpus: Path,
        index_dir: Path,
        analyzer: str,
        on_passage: Callable[[], None] = lambda: None,
        *,
        field: str = "retrieval.index",
    ) -> None:
        """Build the index of a corpus in ``index_dir``, unless it is there already.

        The index is created atomically, and any number of processes may call this at the same time.

        Args:
            corpus: see ``corpus.read_corpus``.
            index_dir: replaced if its manifest does not match.
            analyzer: ``standard`` or ``english``.
            on_passage: called after each passage, to show progress.
            field: setting of the folder, for errors.

        Raises:
            ConfigError: for ``field``: the folder is not writable, or the disk is full.
            DataError: the corpus is invalid; see ``corpus.read_corpus``.
            RetrievalError: tantivy could not write the index.
        """
        corpus_sha256, root = sha256_of_corpus(corpus), index_dir.parent
        if _is_built(index_dir, corpus_sha256, analyzer):
            return
        check_writable(root, corpus, field)
        with _writing(root, corpus, field), (root / f".{index_dir.name}.lock").open("w") as lock:
            # One process of this machine builds, the others wait. This only saves work: on a file system without locks
            # all of them build, and the first to rename wins.
            with suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX)
            if _is_built(index_dir, corpus_sha256, analyzer):
                return
            temporary = root / f".{index_dir.name}.{uuid.uuid4().hex}"
            temporary.mkdir()
            try:
                _write_index(corpus, temporary, analyzer, corpus_sha256, on_passage)
                try:
                    os.rename(temporary, index_dir)  # atomic; fails if the folder is not empty
                except OSError:
                    if _is_built(index_dir, corpus_sha256, analyzer):
                        return  # another machine was faster, with the same content
                    shutil.rmtree(index_dir)
                    os.rename(temporary, index_dir)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)

    @classmethod
    def open(cls, index_dir: Path) -> Self:
        """Open an index folder.

        Raises:
            RetrievalError: it is missing or incomplete, or another version wrote it.
        """
        manifest = Manifest.read(index_dir)
        if manifest is None or not manifest.fits(manifest.corpus_sha256, manifest.analyzer):
            raise RetrievalError(f"{index_dir}: no index of this version; build it from its corpus")
        with _failing_as(f"{index_dir}: cannot open the index; delete the folder and build it again"):
            return cls(_open(index_dir), manifest)

    @classmethod
    def open_or_build(cls, corpus: Path, analyzer: str, index_root: Path) -> Self:
        """Open the index of a corpus in ``index_root``; build it if it is missing.

        A matching index is found under any folder name, for example one made by ``tools/index_corpus.py``. A new folder
        is named after content and analyzer, so that indices of different corpora can share ``index_root``.

        Raises:
            ConfigError: see ``build``.
            DataError: see ``build``.
            RetrievalError: see ``open``.
        """
        corpus_sha256 = sha256_of_corpus(corpus)
        index_dir = find_built(index_root, corpus_sha256, analyzer)
        if index_dir is None:
            index_dir = index_root / folder_name(corpus_sha256, analyzer)
            cls.build(corpus, index_dir, analyzer)
        return cls.open(index_dir)

    async def search(self, query: str, *, top_k: int) -> Sequence[Passage]:
        """Return passages, best first, by BM25 (k1 = 1.2, b = 0.75, scores with the factor k1 + 1 as in Elasticsearch).

        A passage matches if it contains any term; a repeated query term counts repeatedly. Ties keep the order of the
        corpus. A query without terms matches nothing.

        Raises:
            RetrievalError: tantivy failed.
            ValueError: ``top_k`` is less than 1.
        """
        return self.search_now(query, top_k)

    def search_now(self, query: str, top_k: int) -> Sequence[Passage]:
        """Search without an event loop; thread-safe."""
        if top_k < 1:
            raise ValueError(f"top_k is {top_k}; it must be at least 1")
        terms = self._analyze(query)
        if not terms:
            return ()
        passages = []
        with _failing_as(f"search for {query!r} failed"):
            queries = (tantivy.Query.term_query(self._schema, "terms", term, index_option="freq") for term in terms)
            any_of = tantivy.Query.boolean_query([(tantivy.Occur.Should, each) for each in queries])
            # Without count tantivy may skip blocks that cannot reach the top.
            for score, address in self._searcher.search(any_of, limit=top_k, count=False).hits:
                document = self._searcher.doc(address)
                passage_id, contents = document["passage_id"][0].decode(), document["contents"][0].decode()
                passages.append(Passage(passage_id=passage_id, contents=contents, score=score))
        return tuple(passages)

    async def close(self) -> None:
        """Do nothing: the files are unmapped with the object."""


@contextmanager
def _failing_as(message: str) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        # A Rust panic is raised as pyo3's PanicException, a BaseException that cannot be imported.
        is_from_tantivy = isinstance(error, Exception) or type(error).__name__ == "PanicException"
        if isinstance(error, SDSearchError) or not is_from_tantivy:
            raise
        raise RetrievalError(f"{message}: {cause_of(error)}") from error


def default_root(corpus: Path) -> Path:
    """Return the folder beside a corpus that holds its indices by default."""
    return corpus.parent / "index"


def index_root(corpus: Path, index: Path | None) -> Path:
    """Return the folder for the indices of a corpus: ``retrieval.index``, or the one beside the corpus."""
    return default_root(corpus) if index is None else index


def check_writable(folder: Path, corpus: Path, field: str) -> None:
    """Check that an index can be created in a folder: it is writable, and not an index itself.

    The folder beside the corpus may be an index itself (``index_corpus.py --out``), because no setting names it.

    Raises:
        ConfigError: for ``field``: it cannot.
    """
    manifest = Manifest.read(folder)
    if manifest is not None and folder != default_root(corpus):
        problem = f"{folder} is the index of another corpus or analyzer ({manifest.analyzer})"
        fix = "if the corpus is the same, set retrieval.analyzer to that one; otherwise give another folder"
        raise ConfigError(field, problem, fix)
    parent = nearest_existing(folder)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise _unwritable(parent, corpus, field, "no permission to write" if parent.is_dir() else "it is not a folder")


def find_indices(folder: Path) -> list[Path]:
    """Find the indices of this version: the folder itself, or those in it, sorted by name."""
    # Skips dot folders: a killed build leaves one, which may already have a manifest.
    folders = (folder, *sorted(path.parent for path in folder.glob(f"[!.]*/{_MANIFEST}")))
    return [path for path in folders if Manifest.read(path) is not None]


def find_built(index_root: Path, corpus_sha256: str, analyzer: str) -> Path | None:
    """Find a matching index in ``index_root``, or itself; the default folder name first, others sorted."""
    folders = (index_root / folder_name(corpus_sha256, analyzer), *find_indices(index_root))
    return next((path for path in folders if _is_built(path, corpus_sha256, analyzer)), None)


def folder_name(corpus_sha256: str, analyzer: str) -> str:
    """Return the default folder name of an index: the analyzer and a hash of the content."""
    key = f"{_LAYOUT}/{_VERSION}/{corpus_sha256}"
    return f"{analyzer}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def _is_built(index_dir: Path, corpus_sha256: str, analyzer: str) -> bool:
    manifest = Manifest.read(index_dir)
    return manifest is not None and manifest.fits(corpus_sha256, analyzer)


@contextmanager
def _writing(folder: Path, corpus: Path, field: str) -> Iterator[None]:
    """Convert file system errors to an error about the setting; tantivy wraps them in a ValueError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except RetrievalError as error:
        message = str(error)
        if found := re.search(r"([^':]*) \(os error \d+\)", message):
            raise _unwritable(folder, corpus, field, found.group(1)) from error
        if "io::Error" in message:  # tantivy's worker threads do not report the reason
            raise _unwritable(folder, corpus, field, "writing failed; the disk may be full") from error
        raise
    except OSError as error:
        raise _unwritable(folder, corpus, field, error.strerror or cause_of(error)) from error


def _unwritable(folder: Path, corpus: Path, field: str, reason: str) -> ConfigError:
    fix = f"set {field} to a writable folder with about as much free space as the corpus's size"
    return ConfigError(field, f"{folder} cannot hold the index of {corpus}: {reason}", fix)


def _open(index_dir: Path) -> tantivy.Index:
    """Open an index; if its folder is read-only, through symbolic links, because tantivy creates a lock file."""
    try:
        return tantivy.Index.open(str(index_dir))
    except ValueError as error:
        if "Lockfile" not in str(error):
            raise
    # tantivy's threads may still create a lock file while the folder is removed.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as links:
        for file in index_dir.resolve().iterdir():
            if file.suffix != ".lock":
                (Path(links) / file.name).symlink_to(file)
        return tantivy.Index.open(links)  # every file is open now


def _write_index(corpus: Path, folder: Path, analyzer: str, corpus_sha256: str, on_passage: Callable[[], None]) -> None:
    builder = tantivy.SchemaBuilder()
    # Bytes fields are stored without being indexed, which tantivy's text fields cannot be.
    builder.add_bytes_field("passage_id", stored=True)
    builder.add_bytes_field("contents", stored=True)
    # analysis.py produces the terms; tantivy only splits them at spaces.
    builder.add_text_field("terms", tokenizer_name="whitespace", index_option="freq")
    # A full writer heap starts another segment, and ties are then in segment order instead of corpus order.
    text_bytes = corpus.stat().st_size * (_COMPRESSION if corpus.suffix in {".gz", ".parquet"} else 1)
    heap_size = min(max(3 * text_bytes, _MIN_HEAP_BYTES), _MAX_HEAP_BYTES)
    num_passages, analyze = 0, ANALYZERS[analyzer]
    with _failing_as(f"{folder}: cannot write the index"):
        writer = tantivy.Index(builder.build(), path=str(folder)).writer(heap_size=heap_size, num_threads=1)
        try:
            for row in read_corpus(corpus):
                document = tantivy.Document()
                document.add_bytes("passage_id", row.id.encode())
                document.add_bytes("contents", row.contents.encode())
                document.add_text("terms", " ".join(analyze(row.contents)))
                writer.add_document(document)
                num_passages += 1
                on_passage()
            writer.commit()
        finally:
            # Joins the writer's threads, which could otherwise write into a folder that is being moved or removed.
            writer.wait_merging_threads()
    if sha256_of_corpus(corpus) != corpus_sha256:
        raise DataError(f"{corpus}: changed while it was being indexed; start again")
    versions = {"layout": _LAYOUT, "tantivy_version": _VERSION}
    content = {"analyzer": analyzer, "corpus_sha256": corpus_sha256, "num_passages": num_passages}
    manifest = Manifest.model_validate(versions | content)
    write_file(folder / _MANIFEST, manifest.model_dump_json(indent=2) + "\n")
    mode = (folder / _MANIFEST).stat().st_mode
    for file in folder.iterdir():
        file.chmod(mode)  # tantivy creates some as temporary files, readable by their owner only
