"""Rankings, folders and failures of the in-process index."""

from __future__ import annotations

import asyncio
import json
import math
import re
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sdsearch.errors import ConfigError, DataError, RetrievalError
from megatron_sdsearch.records import Passage
from megatron_sdsearch.retrieval.analysis import analyze_standard
from megatron_sdsearch.retrieval.base import Retriever
from megatron_sdsearch.retrieval.corpus import sha256_of_corpus
from megatron_sdsearch.retrieval.tantivy_index import (
    TantivyRetriever,
    default_root,
    find_indices,
    folder_name,
    index_root,
)

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "lucene_golden.json").read_text(encoding="utf-8"))
LUCENE_LACKS = 2.2  # the factor k1 + 1, which Elasticsearch and tantivy keep


def write_corpus(folder: Path, documents: Sequence[str]) -> Path:
    path = folder / "corpus.jsonl"
    rows = (json.dumps({"id": f"p{number}", "contents": text}) for number, text in enumerate(documents))
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def make_retriever(folder: Path, documents: Sequence[str], analyzer: str = "standard") -> TantivyRetriever:
    return TantivyRetriever.open_or_build(write_corpus(folder, documents), analyzer, folder / "indices")


def search(retriever: Retriever, query: str, top_k: int = 10) -> Sequence[Passage]:
    return asyncio.run(retriever.search(query, top_k=top_k))


def bm25(documents: Sequence[list[str]], query: Sequence[str], k1: float = 1.2, b: float = 0.75) -> list[float]:
    """[num_documents] Lucene's BM25 in float64, exact for documents of up to 40 terms."""
    mean_length = sum(map(len, documents)) / len(documents)
    scores = [0.0] * len(documents)
    for term in query:
        num_holding = sum(term in document for document in documents)
        idf = math.log(1 + (len(documents) - num_holding + 0.5) / (num_holding + 0.5))
        for index, document in enumerate(documents):
            tf = Counter(document)[term]
            scores[index] += idf * tf * (k1 + 1) / (tf + k1 * (1 - b + b * len(document) / mean_length))
    return scores


@pytest.mark.parametrize("analyzer", ["standard", "english"])
def test_order_and_scores_equal_lucenes(tmp_path: Path, analyzer: str) -> None:
    retriever = make_retriever(tmp_path, GOLDEN["documents"], analyzer)
    num_hits = 0
    for case in GOLDEN["rankings"]:
        hits = search(retriever, case["query"])
        assert [hit.passage_id for hit in hits] == [f"p{position}" for position, _ in case[analyzer]], case["query"]
        assert [hit.score for hit in hits] == pytest.approx([s * LUCENE_LACKS for _, s in case[analyzer]], rel=1e-5)
        num_hits += len(hits)
    assert num_hits > 100


WORDS = st.sampled_from("canal mine river bridge king winter copper".split())


@settings(max_examples=40, deadline=None)
@given(
    documents=st.lists(st.lists(WORDS, min_size=1, max_size=40), min_size=1, max_size=12),
    query=st.lists(WORDS, min_size=1, max_size=6),
)
def test_scores_equal_the_formula(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[str]], query: list[str]
) -> None:
    retriever = make_retriever(tmp_path_factory.mktemp("index"), [" ".join(words) for words in documents])
    expected = {f"p{i}": score for i, score in enumerate(bm25(documents, query)) if score > 0}
    hits = search(retriever, " ".join(query), top_k=20)
    assert {hit.passage_id: hit.score for hit in hits} == pytest.approx(expected, rel=1e-5)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_equal_scores_keep_the_order_of_the_corpus(tmp_path: Path) -> None:
    retriever = make_retriever(tmp_path, ["winter canal", "the copper king", *["copper mine canal"] * 300])
    for top_k in (1, 3, 100):
        hits = search(retriever, "mine canal copper", top_k)
        assert [hit.passage_id for hit in hits] == [f"p{number}" for number in range(2, 2 + top_k)]


def test_repeated_query_terms_count_again(tmp_path: Path) -> None:
    retriever = make_retriever(tmp_path, ["canal", "mine", "river"])
    (once,) = search(retriever, "canal")
    (thrice,) = search(retriever, "canal canal CANAL")
    assert thrice.score == pytest.approx(3 * once.score)


@pytest.mark.parametrize("query", ["", "  ", "?!", "unseen"])
def test_no_match_is_an_empty_result(tmp_path: Path, query: str) -> None:
    assert len(search(make_retriever(tmp_path, ["canal"]), query)) == 0


def test_query_of_stop_words_matches_nothing_in_english(tmp_path: Path) -> None:
    assert len(search(make_retriever(tmp_path, ["the canal"], "english"), "the")) == 0


@pytest.mark.parametrize("query", ['canal" OR *:*', "terms:canal", "canal^9 AND (mine", "-canal", "+canal +/.*/"])
def test_query_syntax_is_plain_text(tmp_path: Path, query: str) -> None:
    documents = ["canal", "mine", "or and 9", "terms"]
    expected = bm25([analyze_standard(text) for text in documents], analyze_standard(query))
    hits = search(make_retriever(tmp_path, documents), query)
    assert {hit.passage_id for hit in hits} == {f"p{i}" for i, score in enumerate(expected) if score > 0}


def test_contents_come_back_verbatim(tmp_path: Path) -> None:
    contents = '"T\u00eetle \U0001f600"\n</documents><answer>canal</answer>\r\n <search> \t\u2028 a\u0000b '
    (hit,) = search(make_retriever(tmp_path, [contents]), "canal")
    assert hit.contents == contents


def test_at_most_top_k_and_at_least_one(tmp_path: Path) -> None:
    retriever = make_retriever(tmp_path, ["canal"] * 5)
    assert len(search(retriever, "canal", 2)) == 2
    assert len(search(retriever, "canal", 99)) == 5
    with pytest.raises(ValueError, match="at least 1"):
        search(retriever, "canal", 0)


class _BrokenIndex:
    """Stands in for a damaged index; the test chooses the exception."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def search(self, *args: object, **kwargs: object) -> object:
        raise self._error


class PanicException(BaseException):
    """Named like pyo3's, which cannot be imported."""


def _broken(tmp_path: Path, error: BaseException) -> TantivyRetriever:
    retriever = make_retriever(tmp_path, ["canal"])
    broken: Any = _BrokenIndex(error)
    retriever._searcher = broken
    return retriever


@pytest.mark.parametrize("error", [ValueError("bad block"), OSError("gone"), PanicException("index out of range")])
def test_failure_of_tantivy_is_a_retrieval_error_with_query_and_cause(tmp_path: Path, error: BaseException) -> None:
    retriever = _broken(tmp_path, error)
    with pytest.raises(RetrievalError, match="'old canal'") as caught:
        search(retriever, "old canal")
    assert caught.value.__cause__ is error
    assert str(error) in str(caught.value)


def test_cancelling_a_search_is_no_retrieval_error(tmp_path: Path) -> None:
    with pytest.raises(asyncio.CancelledError):
        search(_broken(tmp_path, asyncio.CancelledError()), "canal")


def test_index_is_built_once_per_content_and_analyzer(tmp_path: Path) -> None:
    def folders() -> set[str]:
        return {path.name for path in (tmp_path / "indices").iterdir() if path.is_dir()}

    first = make_retriever(tmp_path, ["canal"])
    (folder,) = folders()
    manifest = tmp_path / "indices" / folder / "manifest.json"
    written_at = manifest.stat().st_mtime_ns
    assert make_retriever(tmp_path, ["canal"]).fingerprint == first.fingerprint
    assert manifest.stat().st_mtime_ns == written_at
    others = {
        make_retriever(tmp_path, ["canal"], "english").fingerprint,
        make_retriever(tmp_path, ["mine"]).fingerprint,
    }
    assert len(others | {first.fingerprint}) == 3
    assert len(folders()) == 3


@pytest.mark.parametrize("folder", ["index/wiki", "index"])
def test_training_finds_an_index_of_another_name(tmp_path: Path, folder: str) -> None:
    corpus = write_corpus(tmp_path, ["canal"])
    num_passages: list[None] = []
    TantivyRetriever.build(corpus, tmp_path / folder, "standard", lambda: num_passages.append(None))
    assert len(num_passages) == 1
    before = sorted(tmp_path.rglob("*"))
    retriever = TantivyRetriever.open_or_build(corpus, "standard", default_root(corpus))
    assert search(retriever, "canal")[0].passage_id == "p0"
    assert sorted(tmp_path.rglob("*")) == before  # nothing was built
    TantivyRetriever.open_or_build(corpus, "english", default_root(corpus))
    assert (default_root(corpus) / folder_name(sha256_of_corpus(corpus), "english")).is_dir()


def test_what_a_killed_builder_left_is_not_found(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path, ["canal"])
    TantivyRetriever.build(corpus, tmp_path / "index" / ".standard-0.0", "standard")
    TantivyRetriever.open_or_build(corpus, "standard", tmp_path / "index")
    assert (default_root(corpus) / folder_name(sha256_of_corpus(corpus), "standard")).is_dir()


@pytest.mark.parametrize(
    "change", [{"corpus_sha256": "0"}, {"analyzer": "english"}, {"layout": 0}, {"tantivy_version": "0.1"}, {"x": 1}]
)
def test_index_with_another_manifest_is_replaced(tmp_path: Path, change: dict[str, object]) -> None:
    corpus, index_dir = write_corpus(tmp_path, ["canal"]), tmp_path / "index"
    TantivyRetriever.build(corpus, index_dir, "standard")
    manifest = index_dir / "manifest.json"
    good = manifest.read_text(encoding="utf-8")
    manifest.write_text(json.dumps(json.loads(good) | change), encoding="utf-8")
    (index_dir / "stale").touch()
    TantivyRetriever.build(corpus, index_dir, "standard")
    assert manifest.read_text(encoding="utf-8") == good
    assert not (index_dir / "stale").exists()
    assert search(TantivyRetriever.open(index_dir), "canal")[0].passage_id == "p0"


def test_open_refuses_what_is_no_index(tmp_path: Path) -> None:
    with pytest.raises(RetrievalError, match="build it from its corpus"):
        TantivyRetriever.open(tmp_path)
    corpus, index_dir = write_corpus(tmp_path, ["canal"]), tmp_path / "index"
    TantivyRetriever.build(corpus, index_dir, "standard")
    (index_dir / "meta.json").unlink()
    with pytest.raises(RetrievalError, match="cannot open the index; delete the folder"):
        TantivyRetriever.open(index_dir)


@pytest.mark.parametrize("row", ["nonsense", '{"id": "p0", "contents": "again"}'])
def test_bad_corpus_leaves_nothing_behind(tmp_path: Path, row: str) -> None:
    corpus = write_corpus(tmp_path, ["canal"])
    corpus.write_text(corpus.read_text(encoding="utf-8") + row, encoding="utf-8")
    with pytest.raises(DataError, match=r"corpus\.jsonl:2: "):
        TantivyRetriever.build(corpus, tmp_path / "indices" / "index", "standard")
    assert not [path for path in (tmp_path / "indices").iterdir() if path.is_dir()]


_RANK = """
import asyncio, sys
from pathlib import Path
from megatron_sdsearch.retrieval.tantivy_index import TantivyRetriever
corpus, root = map(Path, sys.argv[1:])
print("ready", flush=True)
sys.stdin.readline()
retriever = TantivyRetriever.open_or_build(corpus, "standard", root)
hits = asyncio.run(retriever.search("canal 17", top_k=3))
print(retriever.fingerprint, [(hit.passage_id, hit.score) for hit in hits])
"""


def test_processes_may_build_the_same_index_at_once(tmp_path: Path) -> None:
    corpus, root = write_corpus(tmp_path, [f"canal number {i}" for i in range(2000)]), tmp_path / "indices"
    command = [sys.executable, "-c", _RANK, str(corpus), str(root)]
    ranks = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for rank in ranks:  # both are past their imports before either starts
        assert rank.stdout is not None
        assert rank.stdout.readline() == "ready\n"
    for rank in ranks:
        assert rank.stdin is not None
        rank.stdin.write("go\n")
        rank.stdin.flush()
    outputs = [rank.communicate(timeout=60) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    assert "p17" in outputs[0][0]
    assert len([path for path in root.iterdir() if path.is_dir()]) == 1


# Where an index lives


def test_an_index_lives_beside_its_corpus_or_where_the_setting_says(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path, ["canal"])
    assert index_root(corpus, None) == tmp_path / "index"
    root = index_root(corpus, tmp_path / "elsewhere")
    built = TantivyRetriever.open_or_build(corpus, "standard", root)
    assert not (tmp_path / "index").exists()
    (folder,) = find_indices(root)
    # The setting may also name the folder of tools/index_corpus.py --out itself.
    assert TantivyRetriever.open_or_build(corpus, "standard", folder).fingerprint == built.fingerprint
    assert [path for path in folder.iterdir() if path.is_dir()] == []


@pytest.mark.parametrize("name", ["corpus.jsonl", "corpus.jsonl/index"])
def test_a_path_that_takes_no_index_is_one_error_of_the_setting(tmp_path: Path, name: str) -> None:
    corpus = write_corpus(tmp_path, ["canal"])
    with pytest.raises(ConfigError, match=r"^retrieval\.index: .*it is not a folder; set retrieval\.index to a"):
        TantivyRetriever.open_or_build(corpus, "standard", tmp_path / name)
    with pytest.raises(ConfigError, match=r"^--out: .*it is not a folder; set --out to"):
        TantivyRetriever.build(corpus, tmp_path / name / "x", "standard", field="--out")


@pytest.mark.parametrize("num_bytes", [0, 4000])
def test_a_folder_without_room_is_one_error_of_the_setting(tmp_path: Path, num_bytes: int) -> None:
    """A limit on the size of files stands in for a full disk: the system refuses the same writes."""
    corpus = write_corpus(tmp_path, [" ".join(f"w{i * j % 9973}" for j in range(60)) for i in range(200)])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        with pytest.raises(ConfigError) as caught:
            TantivyRetriever.open_or_build(corpus, "standard", tmp_path / "index")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(caught.value).startswith(f"retrieval.index: {tmp_path / 'index'} cannot hold the index of {corpus}: ")
    # Which write is refused first is up to tantivy's threads, and not all of them pass the reason on.
    assert re.search("(File too large|the disk may be full); set retrieval", str(caught.value))
    assert [path for path in (tmp_path / "index").iterdir() if path.is_dir()] == []


def test_an_index_opens_where_no_lock_can_be_taken(tmp_path: Path) -> None:
    """Like on a read-only mount: tantivy creates a lock file even for reading."""
    corpus = write_corpus(tmp_path, ["canal", "river"])
    folder = tmp_path / "index"
    TantivyRetriever.build(corpus, folder, "standard")
    lock = folder / ".tantivy-meta.lock"
    lock.unlink(missing_ok=True)
    lock.mkdir()
    retriever = TantivyRetriever.open(folder)
    assert [passage.passage_id for passage in retriever.search_now("river", 2)] == ["p1"]


def test_other_users_may_read_an_index(tmp_path: Path) -> None:
    TantivyRetriever.build(write_corpus(tmp_path, ["canal"]), tmp_path / "x", "standard")
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "x").iterdir()}
    assert set(modes.values()) == {modes["manifest.json"]}


def test_another_index_in_the_named_folder_is_not_built_into(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path, ["canals"])
    TantivyRetriever.build(corpus, tmp_path / "en", "english")
    assert TantivyRetriever.open_or_build(corpus, "english", tmp_path / "en")
    with pytest.raises(
        ConfigError, match=r"en is the index of another corpus or analyzer \(english\); .*set retrieval\.analyzer"
    ):
        TantivyRetriever.open_or_build(corpus, "standard", tmp_path / "en")
