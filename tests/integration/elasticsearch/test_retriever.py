"""The retriever, through the official client, before a real server of the protocol."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_sdsearch.config import ElasticsearchConfig
from megatron_sdsearch.errors import ConfigError, RetrievalError
from megatron_sdsearch.records import Passage
from megatron_sdsearch.retrieval.batched import BatchedRetriever
from megatron_sdsearch.retrieval.elasticsearch import ElasticsearchBackend, fuse
from megatron_sdsearch.retrieval.encoder import Similarity, Vectors
from megatron_sdsearch.retrieval.tantivy_index import TantivyRetriever
from tests.integration.elasticsearch.conftest import Node

PLACES = ["Lisbon", "Porto", "Madrid", "Paris", "Berlin", "Vienna", "Rome", "Oslo"]
WORDS = ["capital", "river", "old", "bridge", "king", "market", "harbour", "AT&T", "C++", "naïve"]


def _documents() -> list[dict[str, Any]]:
    """200 passages in which no two queries below have all scores alike."""
    random = np.random.default_rng(0)
    rows = []
    for i in range(200):
        title = f"{PLACES[i % 8]} {i}"
        text = " ".join(WORDS[j] for j in random.integers(0, len(WORDS), size=5 + i % 7))
        angle = i / 200 * np.pi
        vector = [float(np.cos(angle)), float(np.sin(angle)), 0.0]
        rows.append({"id": f"p{i}", "contents": f'"{title}"\n{text}', "title": title, "text": text, "vector": vector})
    return rows


PROPERTIES = {
    "contents": {"type": "text"},
    "title": {"type": "text"},
    "text": {"type": "text"},
    "vector": {"type": "dense_vector", "dims": 3, "similarity": "cosine", "index": True},
}
QUERIES = ["capital of Lisbon", "old bridge", "king 17", "market harbour Oslo 7", "AT&T", "Vienna river river", "199"]


class AngleEncoder:
    """``"0.25"`` is a quarter of a half turn: passage p50 is the nearest."""

    num_dims = 3
    fingerprint = "angles"
    similarity: Similarity = "cosine"
    has_own_settings = False

    def encode_queries(self, texts: Sequence[str]) -> Vectors:
        angles = [float(text.split()[-1]) * np.pi for text in texts if text[-1].isdigit()] or [0.0] * len(texts)
        return np.asarray([[np.cos(a), np.sin(a), 0.0] for a in angles], dtype=np.float32)

    encode_passages = encode_queries


@pytest.fixture(scope="session")
def index(node: Node) -> str:
    return node.index(_documents(), PROPERTIES)


def on(node: Node, index: str, talk: Callable[[BatchedRetriever], Awaitable[Any]], **settings: Any) -> Any:
    async def run() -> Any:
        config = ElasticsearchConfig.model_validate({"urls": [node.url], "index": index, **settings})
        encoder = AngleEncoder() if "encoder" in settings else None
        retriever = BatchedRetriever(await ElasticsearchBackend.open(config, encoder), config)
        try:
            return await talk(retriever)
        finally:
            await retriever.close()

    return asyncio.run(run())


def ask(node: Node, index: str, queries: Sequence[str], top_k: int = 5, **settings: Any) -> list[Sequence[Passage]]:
    async def talk(retriever: BatchedRetriever) -> list[Sequence[Passage]]:
        return list(await asyncio.gather(*(retriever.search(q, top_k=top_k) for q in queries)))

    found: list[Sequence[Passage]] = on(node, index, talk, **settings)
    return found


def test_rankings_and_scores_are_those_of_tantivy(node: Node, index: str, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({k: row[k] for k in ("id", "contents")}) + "\n" for row in _documents()))
    tantivy = TantivyRetriever.open_or_build(corpus, "standard", tmp_path / "index")
    for query, ours in zip(QUERIES, ask(node, index, QUERIES, top_k=10), strict=True):
        theirs = asyncio.run(tantivy.search(query, top_k=10))
        assert [p.passage_id for p in ours] == [p.passage_id for p in theirs], query
        assert [p.contents for p in ours] == [p.contents for p in theirs]
        assert [p.score for p in ours] == pytest.approx([p.score for p in theirs], rel=1e-5)
        assert ours, query


def test_title_and_text_add_up(node: Node, index: str) -> None:
    (both,) = ask(node, index, ["Oslo king"], fields="title_and_text")
    (title,) = ask(node, node.index([r | {"text": "-"} for r in _documents()], PROPERTIES), ["Oslo king"],
                   fields="title_and_text")  # fmt: skip
    assert all("Oslo" in p.contents and "king" in p.contents for p in both)
    assert both[0].score > title[0].score > 0
    assert both[0].contents.startswith('"Oslo')


@pytest.mark.parametrize(
    "query",
    ['"', '\\', "a/b (c) [d] {e} ~2 ^3 *:* OR AND NOT -x +y", "contents:capital", '{"match_all": {}}', "\x00\n\r\u2028",
     "\ud800 half a pair", "x" * 10_000, "word " * 5_000, "北京 🙂"],
)  # fmt: skip
def test_whatever_a_model_writes_is_text_and_harms_no_other_query(node: Node, index: str, query: str) -> None:
    strange, usual = ask(node, index, [query, "old bridge"])
    assert isinstance(strange, list)
    assert usual
    if query in ("contents:capital", '{"match_all": {}}', "word " * 5_000, '"', "\\"):
        words = query.replace(":", " ").split()
        assert all(any(word in p.contents for word in words) for p in strange)


def test_blank_queries_match_nothing_and_are_not_sent(node: Node, index: str) -> None:
    assert [list(found) for found in ask(node, index, ["zebra", "", "  \n "])] == [[], [], []]


def test_nearest_vectors(node: Node, index: str) -> None:
    found = ask(node, index, ["at 0.25", "at 0.5"], top_k=3, mode="dense", encoder="unused")
    assert [passages[0].passage_id for passages in found] == ["p50", "p100"]
    assert [{p.passage_id for p in passages} for passages in found] == [{"p49", "p50", "p51"}, {"p99", "p100", "p101"}]


def test_ranks_are_fused(node: Node, index: str) -> None:
    """Compare with the server's own rrf retriever."""
    knn = {"field": "vector", "query_vector": [np.cos(np.pi / 4), np.sin(np.pi / 4), 0.0], "k": 50}
    match = {"standard": {"query": {"match": {"contents": "old bridge 0.25"}}}}
    lists = [match, {"knn": knn | {"num_candidates": 500}}]
    retriever = {"rrf": {"retrievers": lists, "rank_constant": 60, "rank_window_size": 50}}
    server = node.client.search(index=index, size=8, retriever=retriever)["hits"]["hits"]
    (client,) = ask(node, index, ["old bridge 0.25"], top_k=8, mode="hybrid", encoder="unused")
    assert [hit["_score"] for hit in server] == pytest.approx([p.score for p in client])
    assert server[0]["_source"]["contents"] == client[0].contents
    assert {hit["_id"] for hit in server if hit["_score"] > server[-1]["_score"]} == {
        p.passage_id for p in client if p.score > client[-1].score
    }


def test_fusion_by_hand() -> None:
    a, b, c = (Passage(passage_id=name, contents=name, score=9.0) for name in "abc")
    fused = fuse([[a, b], [b, c]])
    assert [p.passage_id for p in fused] == ["b", "a", "c"]
    assert [p.score for p in fused] == pytest.approx([1 / 62 + 1 / 61, 1 / 61, 1 / 62])


def test_one_search_that_the_server_cannot_parse_fails_alone(
    node: Node, index: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ElasticsearchBackend.bodies

    def bodies(self: ElasticsearchBackend, query: str, vector: Any, top_k: int) -> list[dict[str, Any]]:
        return [{"query": {"no_such_query": {}}}] if query == "bad" else real(self, query, vector, top_k)

    monkeypatch.setattr(ElasticsearchBackend, "bodies", bodies)

    async def talk(retriever: BatchedRetriever) -> list[Any]:
        return await asyncio.gather(
            *(retriever.search(q, top_k=2) for q in ("bad", "old bridge")), return_exceptions=True
        )

    bad, good = on(node, index, talk)
    assert isinstance(bad, RetrievalError)
    assert "HTTP 400: parsing_exception" in bad.cause
    assert (bad.query, bad.num_attempts) == ("bad", 1)
    assert len(good) == 2


def test_an_alias_must_denote_one_index(node: Node, index: str) -> None:
    node.client.indices.put_alias(index=index, name="one")
    fingerprints = [on(node, name, _fingerprint) for name in ("one", index)]
    assert fingerprints[0] == fingerprints[1]
    other = node.index(_documents()[:3], PROPERTIES)
    node.client.indices.put_alias(index=f"{index},{other}", name="two")
    with pytest.raises(ConfigError, match=f"index: two denotes {index}, {other}"):
        on(node, "two", _fingerprint)


async def _fingerprint(retriever: BatchedRetriever) -> str:
    return retriever.fingerprint


def test_the_fingerprint_follows_content_and_settings(node: Node) -> None:
    rows = _documents()[:5]
    name = node.index(rows, PROPERTIES)
    first = on(node, name, _fingerprint)
    assert on(node, name, _fingerprint) == first
    node.client.index(index=name, id="p0", document={"contents": "another"}, refresh=True)
    changed = on(node, name, _fingerprint)
    english = PROPERTIES | {"contents": {"type": "text", "analyzer": "english"}}
    others = [on(node, node.index(rows, properties), _fingerprint) for properties in (PROPERTIES, english)]
    assert len({first, changed, *others}) == 4


@pytest.mark.parametrize(
    ("properties", "documents", "settings", "words"),
    [
        (PROPERTIES, [], {}, "holds no passages"),
        ({"text": {"type": "text"}}, [{"id": "1", "text": "a"}], {}, "needs field 'contents' of type text"),
        ({"contents": {"type": "text"}}, [{"id": "1"}], {}, "document '1' of .*: contents is missing, not a string"),
        (PROPERTIES, _documents()[:1], {"index": "absent"}, "the index does not exist .*absent"),
        (
            PROPERTIES | {"vector": {"type": "dense_vector", "dims": 4}}, [{"id": "1", "contents": "a"}],
            {"mode": "dense", "encoder": "unused"}, "makes vectors of length 3",
        ),
    ],
)  # fmt: skip
def test_mismatches_are_reported_at_open(
    node: Node, properties: dict[str, Any], documents: list[dict[str, Any]], settings: dict[str, Any], words: str
) -> None:
    name = node.index(documents, properties)
    with pytest.raises(ConfigError, match=words):
        on(node, settings.pop("index", name), _fingerprint, **settings)
