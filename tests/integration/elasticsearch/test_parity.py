"""The Elasticsearch-speaking server ranks as Lucene does, asked by the official client; 300 passages of the goldens.

Needs ``noida-db`` and ``elasticsearch`` (``make test-elasticsearch`` installs them), and fails without. It is no
real cluster: none can be installed here.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from elasticsearch import Elasticsearch, helpers

from tests.integration.elasticsearch.conftest import Node

GOLDEN = Path(__file__).parents[2] / "golden" / "bm25"
INDEX = "parity"
NUM_PASSAGES = 300  # the server scans them all for every query
LUCENE_LACKS = 2.2  # the factor k1 + 1, which Elasticsearch's similarity keeps
TOP_K = 10


def read(name: str) -> list[dict[str, Any]]:
    with gzip.open(GOLDEN / name, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def client(node: Node) -> Elasticsearch:
    return node.client.options(request_timeout=60)


@pytest.fixture(scope="module")
def index(client: Elasticsearch) -> str:
    analyzers = {name: {"type": "text", "analyzer": name} for name in ("standard", "english")}
    client.indices.create(
        index=INDEX,
        settings={"number_of_shards": 1, "number_of_replicas": 0},
        mappings={"properties": {"contents": {"type": "text", "index": False, "fields": analyzers}}},
    )
    passages = read("factbook.jsonl.gz")[:NUM_PASSAGES]
    actions = ({"_index": INDEX, "_id": row["id"], "contents": row["contents"]} for row in passages)
    assert helpers.bulk(client, actions, refresh=True)[0] == NUM_PASSAGES
    return INDEX


@pytest.mark.parametrize("analyzer", ["standard", "english"])
def test_rankings_equal_lucenes(client: Elasticsearch, index: str, analyzer: str) -> None:
    goldens = read("rankings_small.jsonl.gz")
    assert len(goldens) == 60
    assert sum(len(golden[analyzer]) for golden in goldens) > 400
    searches: list[dict[str, Any]] = []
    for golden in goldens:
        query = {"match": {f"contents.{analyzer}": {"query": golden["query"]}}}
        searches += [{"index": index}, {"query": query, "size": TOP_K, "_source": False}]
    responses = client.msearch(searches=searches)["responses"]
    for golden, response in zip(goldens, responses, strict=True):
        assert response["status"] == 200, response
        hits = response["hits"]["hits"]
        assert [int(hit["_id"]) for hit in hits] == [position for position, _ in golden[analyzer]], golden["query"]
        expected = [score * LUCENE_LACKS for _, score in golden[analyzer]]
        assert [hit["_score"] for hit in hits] == pytest.approx(expected, rel=1e-4), golden["query"]
