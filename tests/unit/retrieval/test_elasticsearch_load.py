"""Tests of loading a corpus, without a cluster."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sdsearch.errors import ConfigError, DataError
from megatron_sdsearch.retrieval.corpus import CorpusRow
from megatron_sdsearch.retrieval.elasticsearch_index import IndexSettings, Marker, to_action
from megatron_sdsearch.retrieval.elasticsearch_load import ContiguousProgress, RejectFile, scan_corpus


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows(count: int) -> list[dict[str, Any]]:
    return [{"id": f"p{i}", "contents": f'"T{i}"\ntext {i}'} for i in range(count)]


@given(sizes=st.lists(st.integers(1, 5), max_size=12), seed=st.integers(0, 9), start=st.integers(0, 3))
def test_progress_is_the_end_of_the_gapless_start(sizes: list[int], seed: int, start: int) -> None:
    chunks = [(start + sum(sizes[:i]), start + sum(sizes[: i + 1])) for i in range(len(sizes))]
    random.Random(seed).shuffle(chunks)
    progress = ContiguousProgress(Marker(corpus_sha256="", num_passages=99, num_done=start))
    done = set(range(start))
    for first, end in chunks:
        progress.add(first, end, num_rejected=end - first)
        done |= set(range(first, end))
        gapless = next(i for i in range(len(done) + 1) if i not in done)
        assert progress.marker.num_done == gapless
        assert progress.marker.num_rejected == gapless - start


def test_a_document_has_contents_title_text_and_vector() -> None:
    action = to_action(CorpusRow(id="a", contents='"Canal"\nwet'), [0.5, 1.0])
    assert (action["_op_type"], action["_id"]) == ("create", "a")
    assert action["_source"] == {"contents": '"Canal"\nwet', "title": "Canal", "text": "wet", "vector": [0.5, 1.0]}
    assert "vector" not in to_action(CorpusRow(id="a", contents="b"), None)["_source"]


def test_the_scan_counts_and_draws_the_same_sample_every_time(tmp_path: Path) -> None:
    path = write(tmp_path, rows(1000))
    calls: list[None] = []
    scan = scan_corpus(path, on_passage=lambda: calls.append(None))
    assert (scan.num_passages, scan.num_rejected, len(calls)) == (1000, 0, 1000)
    assert {"p0", "p999"} <= scan.sample.keys()
    assert 200 <= len(scan.sample) <= 202
    assert scan.sample["p0"] == '"T0"\ntext 0'
    assert scan == scan_corpus(path)
    middle = [int(passage_id[1:]) for passage_id in scan.sample]
    assert 400 < sum(middle) / len(middle) < 600


def test_the_scan_stops_at_a_bad_row_unless_it_may_report_it(tmp_path: Path) -> None:
    path = write(tmp_path, [*rows(2), {"id": "x"}])
    with pytest.raises(DataError, match=r"corpus\.jsonl:3: contents: Field required; write"):
        scan_corpus(path)
    reported: list[tuple[str, str]] = []
    scan = scan_corpus(path, lambda position, reason: reported.append((position, reason)))
    assert (scan.num_passages, scan.num_rejected) == (2, 1)
    assert reported[0][0] == f"{path}:3"


def test_an_id_that_elasticsearch_refuses_is_one_reject(tmp_path: Path) -> None:
    """It counts bytes: 171 characters of three bytes are too many, 256 of two just fit."""
    ids = ["é" * 256, "一" * 171, "x" * 513, "x" * 512]
    path = write(tmp_path, [{"id": i, "contents": "c"} for i in ids])
    with pytest.raises(DataError, match=r"corpus\.jsonl:2: id: '一{40}'\.\.\. has 513 bytes, .*limit is 512"):
        scan_corpus(path)
    reported: list[tuple[str, str]] = []
    scan = scan_corpus(path, lambda position, reason: reported.append((position, reason)))
    assert (scan.num_passages, scan.num_rejected) == (2, 2)
    assert scan.sample.keys() == {ids[0], ids[3]}
    assert [position for position, _ in reported] == [f"{path}:2", f"{path}:3"]


def test_rejects_of_what_is_done_are_kept(tmp_path: Path) -> None:
    rejects = RejectFile(tmp_path / "rejects.jsonl")
    assert rejects.begin_load(0) == set()
    rejects.add(place="corpus:3", reason="bad")
    rejects.add(row=4, id="d", reason="refused")
    rejects.add(row=9, id="i", reason="refused")
    assert rejects.begin_load(9) == {"d"}
    rejects.begin_scan()
    lines = [json.loads(line) for line in rejects.path.read_text(encoding="utf-8").splitlines()]
    assert lines == [{"row": 4, "id": "d", "reason": "refused"}]
    assert rejects.begin_load(0) == set()
    assert not rejects.path.exists()


def test_a_file_of_something_else_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("my notes\n")
    with pytest.raises(DataError, match=r"notes\.txt: is not a file of rejects"):
        RejectFile(path).begin_scan()
    assert path.read_text() == "my notes\n"


@pytest.mark.parametrize("name", ["", "Wiki", "-wiki", "a b", "a/b", "a*", ".", "a:b", "x" * 300])
def test_a_name_that_elasticsearch_refuses_is_refused_first(name: str) -> None:
    with pytest.raises(ConfigError, match="is not an index name; use lower case"):
        IndexSettings(name=name)


def test_the_indexs_name_depends_on_what_is_in_it() -> None:
    settings = IndexSettings(name="wiki-18")
    others = [
        IndexSettings(name="wiki-18", analyzer="english").physical_name("a"),
        IndexSettings(name="wiki-18", num_shards=2).physical_name("a"),
        IndexSettings(name="wiki-18", encoder="e5-1", num_dims=4).physical_name("a"),
        settings.physical_name("b"),
    ]
    assert len({settings.physical_name("a"), *others}) == 5
    assert settings.physical_name("a") == IndexSettings(name="wiki-18", num_replicas=0).physical_name("a")
    assert settings.physical_name("a").startswith("wiki-18-")
    with pytest.raises(ConfigError, match="--shards: 0 is too few"):
        IndexSettings(name="wiki", num_shards=0)


def test_similarity_and_analyzers_are_explicit() -> None:
    body = IndexSettings(name="wiki", analyzer="english", encoder="e5", num_dims=8).body()
    assert body["settings"]["similarity"] == {"default": {"type": "BM25", "k1": 1.2, "b": 0.75}}
    assert body["settings"]["number_of_shards"] == 1
    fields = body["mappings"]["properties"]
    assert {fields[name]["analyzer"] for name in ("contents", "title", "text")} == {"english"}
    assert (fields["vector"]["dims"], fields["vector"]["similarity"]) == (8, "cosine")
    raw = IndexSettings(name="wiki", encoder="e5", num_dims=8, similarity="dot").body()
    assert raw["mappings"]["properties"]["vector"]["similarity"] == "max_inner_product"
    assert "vector" not in IndexSettings(name="wiki").body()["mappings"]["properties"]
