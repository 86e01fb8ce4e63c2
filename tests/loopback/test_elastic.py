"""The retriever before a fake cluster: overload, lost connections, half failures, versions, TLS, secrets."""

from __future__ import annotations

import asyncio
import base64
import logging
import ssl
import subprocess
import traceback
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_sdsearch.config import ElasticsearchConfig
from megatron_sdsearch.errors import ConfigError, RetrievalDownError, RetrievalError, SDSearchError
from megatron_sdsearch.retrieval.batched import BatchedRetriever
from megatron_sdsearch.retrieval.credentials import Credentials
from megatron_sdsearch.retrieval.elasticsearch import ElasticsearchBackend
from megatron_sdsearch.retrieval.elasticsearch_client import CLIENT_MAJOR, ElasticsearchClient, read_credentials
from megatron_sdsearch.retrieval.elasticsearch_index import META
from megatron_sdsearch.retrieval.encoder import Similarity, Vectors
from tests.loopback.fake_elastic import ALIAS, PASSAGES, FakeElastic, Fault

SECRET = "c2VjcmV0LWtleS1vZi1taW5l"
Talk = Callable[[BatchedRetriever, FakeElastic], Awaitable[None]]


class ToyEncoder:
    num_dims = 2
    fingerprint = "toy"
    similarity: Similarity = "cosine"
    has_own_settings = False

    def encode_queries(self, texts: Sequence[str]) -> Vectors:
        return np.asarray([[1.0, 0.0]] * len(texts), dtype=np.float32)

    encode_passages = encode_queries


def config_of(fake: FakeElastic, **changes: Any) -> ElasticsearchConfig:
    quick: dict[str, Any] = {"urls": [fake.url], "index": ALIAS, "timeout_s": 2.0, "down_timeout_s": 5.0}
    return ElasticsearchConfig.model_validate(quick | changes)


def talk(fake: FakeElastic, what: Talk, **changes: Any) -> None:
    """Open a retriever before the fake, talk to it, close both; the bodies of the opening are forgotten."""

    async def run() -> None:
        async with fake:
            encoder = ToyEncoder() if changes.get("mode", "bm25") != "bm25" else None
            config = config_of(fake, **changes)
            retriever = BatchedRetriever(await ElasticsearchBackend.open(config, encoder), config)
            fake.bodies.clear()
            try:
                await what(retriever, fake)
            finally:
                await retriever.close()

    asyncio.run(run())


async def ask_all(retriever: BatchedRetriever, queries: Sequence[str]) -> list[Any]:
    return await asyncio.gather(*(retriever.search(q, top_k=2) for q in queries), return_exceptions=True)


def opening_error(fake: FakeElastic, kind: type[SDSearchError], **changes: Any) -> SDSearchError:
    with pytest.raises(kind) as caught:
        talk(fake, lambda retriever, fake: asyncio.sleep(0), **changes)
    return caught.value


def first_ids(found: Sequence[Any]) -> list[Any]:
    return [passages[0].passage_id if isinstance(passages, list) else passages for passages in found]


WORDS = [f"word{i}" for i in range(6)]


def test_a_wave_is_one_request_to_the_index_behind_the_alias() -> None:
    async def what(retriever: BatchedRetriever, fake: FakeElastic) -> None:
        assert first_ids(await ask_all(retriever, WORDS)) == list(PASSAGES)
        assert len(fake.bodies) == 1
        assert retriever.fingerprint.startswith("elasticsearch/clusteruuid/indexuuid/")
        assert retriever.num_passages == 6

    talk(FakeElastic(), what)


def test_no_hits_are_empty_and_blank_queries_are_not_sent() -> None:
    async def what(retriever: BatchedRetriever, fake: FakeElastic) -> None:
        assert list(await retriever.search("nowhere", top_k=2)) == []
        num_before = len(fake.bodies)
        assert [list(await retriever.search(q, top_k=2)) for q in ("", " \n\t")] == [[], []]
        assert len(fake.bodies) == num_before

    talk(FakeElastic(), what)


@pytest.mark.parametrize("fault", ["429", "502", "503", "504", "drop", "garbage", "half", "all", "timed_out", "shard"])
def test_what_passes_is_tried_again_and_only_for_those_it_hit(fault: Fault) -> None:
    async def what(retriever: BatchedRetriever, fake: FakeElastic) -> None:
        fake.faults.append(fault)
        assert first_ids(await ask_all(retriever, WORDS)) == list(PASSAGES)
        counts = retriever.take_counts()
        assert counts["num_retries"] == (3 if fault == "half" else 6)
        assert counts["num_failures"] == 0

    talk(FakeElastic(), what)


def test_a_node_that_hangs_is_left_after_the_timeout() -> None:
    async def what(retriever: BatchedRetriever, fake: FakeElastic) -> None:
        fake.faults.append("hang")
        assert first_ids(await ask_all(retriever, ["word3"])) == ["p3"]

    talk(FakeElastic(), what, timeout_s=0.3)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("timed_out", "the search timed out on a shard"),
        ("shard", "1 of 3 shards failed: es_rejected_execution_exception"),
        ("all", "HTTP 429: es_rejected_execution_exception: rejected execution"),
        ("503", "HTTP 503: fake_exception: injected 503"),
        ("drop", "no connection"),
    ],
)
def test_what_does_not_pass_fails_with_cause_query_and_attempts(fault: Fault, words: str) -> None:
    async def what(retriever: BatchedRetriever, fake: FakeElastic) -> None:
        fake.always = fault
        (error,) = await ask_all(retriever, ["word3"])
        assert type(error) is RetrievalError
        assert (error.query, error.num_attempts) == ("word3", 2)
        assert "'word3' failed after 2 attempts" in str(error)
        assert words in error.cause

    talk(FakeElastic(), what, max_attempts=2)


def test_a_query_that_cannot_be_parsed_fails_alone_and_at_once() -> None:
    async def what(retriever: BatchedRetriever, fake: FakeElastic) -> None:
        good, bad = await ask_all(retriever, ["word1", "unparseable"])
        assert good[0].passage_id == "p1"
        assert isinstance(bad, RetrievalError)
        assert (bad.num_attempts, bad.cause) == (1, "HTTP 400: parsing_exception: cannot parse")
        assert len(fake.bodies) == 1

    talk(FakeElastic(), what)


def test_one_fifth_of_requests_failing_loses_nothing() -> None:
    async def what(retriever: BatchedRetriever, fake: FakeElastic) -> None:
        kinds: list[Fault] = ["429", "503", "drop", "half", "timed_out"]
        fake.fault_of = lambda number: kinds[number // 5 % 5] if number % 5 == 0 else None
        queries = [f"word{i % 6}" for i in range(200)]
        assert first_ids(await ask_all(retriever, queries)) == [f"p{i % 6}" for i in range(200)]
        assert retriever.take_counts()["num_retries"] > 0

    talk(FakeElastic(), what, batch_queries=2)


def test_a_restart_of_the_cluster_costs_time_and_no_query() -> None:
    async def what(retriever: BatchedRetriever, fake: FakeElastic) -> None:
        await fake.stop()
        waiting = asyncio.create_task(ask_all(retriever, WORDS))
        await asyncio.sleep(0.7)
        assert not waiting.done()
        await fake.start()
        assert first_ids(await waiting) == list(PASSAGES)

    talk(FakeElastic(), what, max_attempts=30, max_requests=2, down_timeout_s=30.0)


def test_a_lasting_outage_is_reported_once_and_in_time() -> None:
    async def what(retriever: BatchedRetriever, fake: FakeElastic) -> None:
        await fake.stop()
        loop = asyncio.get_running_loop()
        start = loop.time()
        errors = await ask_all(retriever, WORDS * 4)
        assert loop.time() - start < 3.0
        assert {type(error) for error in errors} == {RetrievalDownError}
        (message,) = {str(error) for error in errors}
        assert message.startswith(f"{fake.url}/wiki-1: nothing was answered for 1 s")

    talk(FakeElastic(), what, down_timeout_s=1.0, max_attempts=100)


def test_hybrid_search_fuses_two_searches() -> None:
    async def what(retriever: BatchedRetriever, fake: FakeElastic) -> None:
        found = await retriever.search("word1", top_k=6)
        bodies = [sorted(line) for line in fake.bodies[0][1::2]]
        assert bodies == [["_source", "query", "size", "timeout"], ["_source", "knn", "size", "timeout"]]
        # p1 is first in one list, fifth in the other
        assert found[0].passage_id == "p1"
        assert found[0].score == pytest.approx(1 / 61 + 1 / 65)
        assert [p.passage_id for p in found[1:]] == ["p5", "p4", "p3", "p2", "p0"]
        assert retriever.fingerprint.endswith("/hybrid/contents/local/toy")

    talk(FakeElastic(), what, mode="hybrid", encoder="unused")


def test_half_of_a_fused_pair_that_fails_fails_its_query() -> None:
    async def what(retriever: BatchedRetriever, fake: FakeElastic) -> None:
        fake.always = "half"
        assert [type(error) for error in await ask_all(retriever, ["word1", "word2"])] == [RetrievalError] * 2

    talk(FakeElastic(), what, mode="hybrid", encoder="unused", max_attempts=2)


def test_dense_search_sends_vectors() -> None:
    async def what(retriever: BatchedRetriever, fake: FakeElastic) -> None:
        assert [p.passage_id for p in await retriever.search("anything", top_k=2)] == ["p5", "p4"]
        assert fake.bodies[0][1]["knn"] == {
            "field": "vector", "query_vector": [1.0, 0.0], "k": 2, "num_candidates": 100
        }  # fmt: skip

    talk(_changed(meta={META: {"encoder": "toy"}}), what, mode="dense", encoder="unused")


def _changed(**attributes: Any) -> FakeElastic:
    fake = FakeElastic()
    for name, value in attributes.items():
        setattr(fake, name, value)
    return fake


@pytest.mark.parametrize(
    ("fake", "changes", "field", "words"),
    [
        (_changed(), {"index": "other"}, "index", "the index does not exist (HTTP 404: index_not_found"),
        (_changed(aliases={ALIAS: ["a", "b"]}), {}, "index", "wiki denotes a, b"),
        (_changed(passages={}), {}, "index", "wiki-1 holds no passages"),
        (_changed(properties={"contents": {"type": "keyword"}}), {}, "fields", "which is keyword in wiki"),
        (_changed(), {"fields": "title_and_text"}, "fields", "needs field 'title' of type text, which is missing"),
        (_changed(properties={"contents": {"type": "text"}}), {"mode": "hybrid"}, "mode", "needs field 'vector'"),
        (
            _changed(properties={"vector": {"type": "dense_vector", "dims": 768}}),
            {"mode": "dense"}, "encoder", "makes vectors of length 2, field 'vector' of wiki holds 768",
        ),
        (
            _changed(meta={META: {"encoder": "another"}}),
            {"mode": "dense"}, "encoder", "is toy, and the vectors of wiki were made by another: the weights, pooling",
        ),
        (_changed(product="OpenSearch"), {}, "urls", "is not an Elasticsearch"),
        (
            _changed(version="8.19.0", accepted_majors=(7, 8)),
            {}, "urls", f"refuses the installed client, version {CLIENT_MAJOR} (HTTP 400: media_type",
        ),
    ],
)  # fmt: skip
def test_a_setting_that_does_not_fit_is_named_at_open(
    fake: FakeElastic, changes: dict[str, Any], field: str, words: str
) -> None:
    error = opening_error(fake, ConfigError, **changes)
    assert str(error).startswith(f"retrieval.elasticsearch.{field}: ")
    assert words in str(error)
    if "media_type" in words:
        assert "Accept version must be either version (7, 8)" in str(error)
        assert f"pip install 'elasticsearch[async]=={CLIENT_MAJOR - 1}.*'" in str(error)


@pytest.mark.parametrize("mode", ["bm25", "dense", "hybrid"])
def test_documents_without_text_are_refused_by_name(mode: str) -> None:
    """At open if they are in the sample; otherwise by the searches that find them."""
    bad = {"title": "Lisbon", "text": ["a", "b"]}
    changes = {"mode": mode} | ({} if mode == "bm25" else {"encoder": "unused"})
    error = opening_error(_changed(sources={"p3": bad}), ConfigError, **changes)
    assert str(error).startswith(
        "retrieval.elasticsearch.index: document 'p3' of wiki-1: text is ['a', 'b'], not a string; index it with a"
    )

    async def what(retriever: BatchedRetriever, fake: FakeElastic) -> None:
        fake.sources["p5"] = bad
        good, failed = await ask_all(retriever, ["word1", "word5"])
        if mode != "bm25":  # vectors are nearest to p5 whatever is asked
            good, failed = [PASSAGES["p1"]], good
        assert isinstance(failed, RetrievalError)
        assert "document 'p5' of wiki-1: text is ['a', 'b'], not a string; index it with" in failed.cause
        assert failed.num_attempts == 1
        assert len(good) == 1

    talk(FakeElastic(), what, **changes)


def test_a_cluster_of_another_major_that_answers_is_used_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    talk(_changed(version="10.0.1"), lambda retriever, fake: asyncio.sleep(0))
    assert f"has version 10.0.1, the installed client {CLIENT_MAJOR}" in caplog.text


def test_no_cluster_at_all_is_an_engine_that_is_down() -> None:
    config = ElasticsearchConfig(urls=("http://127.0.0.1:9",), max_attempts=2)
    with pytest.raises(RetrievalError, match=r"127.0.0.1:9 .*no answer after 2 attempts: no connection.*start the"):
        asyncio.run(ElasticsearchBackend.open(config))


def test_an_index_that_grew_has_another_fingerprint() -> None:
    fingerprints = set()

    async def what(retriever: BatchedRetriever, fake: FakeElastic) -> None:
        fingerprints.add(retriever.fingerprint)

    talk(FakeElastic(), what)
    talk(FakeElastic(PASSAGES | {"p6": "more"}), what)
    assert len(fingerprints) == 2


BASIC = "Basic " + base64.b64encode(b"elastic:hunter2-secret").decode()


@pytest.mark.parametrize(
    ("changes", "environment", "header"),
    [
        ({"api_key": SECRET}, {}, f"ApiKey {SECRET}"),
        ({"username": "elastic", "password": "hunter2-secret"}, {}, BASIC),
        ({}, {"ELASTICSEARCH_API_KEY": SECRET}, f"ApiKey {SECRET}"),
        ({}, {"ELASTICSEARCH_USERNAME": "elastic", "ELASTICSEARCH_PASSWORD": "hunter2-secret"}, BASIC),
        ({"username": "elastic"}, {"ELASTICSEARCH_PASSWORD": "hunter2-secret"}, BASIC),
        (
            {"username": "elastic", "password": "hunter2-secret"},
            {"ELASTICSEARCH_API_KEY": "ignored"}, BASIC,
        ),
    ],
)  # fmt: skip
def test_credentials_come_from_the_settings_or_the_environment(
    changes: dict[str, str], environment: dict[str, str], header: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    async def what(retriever: BatchedRetriever, fake: FakeElastic) -> None:
        assert first_ids(await ask_all(retriever, ["word2"])) == ["p2"]

    talk(_changed(authorization=header), what, **changes)


@pytest.mark.parametrize(
    "changes", [{"api_key": SECRET}, {"username": "elastic", "password": SECRET}], ids=["key", "basic"]
)
def test_no_secret_is_ever_shown(changes: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    """At open and later, with full logging and a server that echoes the header that it rejects."""
    fake = _changed(authorization=None)
    shown = [repr(config_of(fake, **changes)), str(config_of(fake, **changes).model_dump(mode="json"))]

    async def what(retriever: BatchedRetriever, fake: FakeElastic) -> None:
        backend = retriever.backend
        assert isinstance(backend, ElasticsearchBackend)
        shown.append(repr(vars(retriever)) + repr(vars(backend)) + repr(vars(backend._client)))
        fake.authorization = "other"
        (error,) = await ask_all(retriever, ["word2"])
        assert "HTTP 401" in error.cause
        shown.append("".join(traceback.format_exception(error)) + repr(error))

    with caplog.at_level(logging.DEBUG):
        talk(fake, what, **changes)
        error = opening_error(_changed(authorization="other"), ConfigError, **changes)
    assert str(error).startswith("retrieval.elasticsearch.api_key: ")
    assert ("refuses an API key" if "api_key" in changes else "refuses a username and password") in str(error)
    shown += ["".join(traceback.format_exception(error)), repr(error), caplog.text]
    encoded = base64.b64encode(f"elastic:{SECRET}".encode()).decode()
    assert [text for text in shown if SECRET in text or encoded in text] == []
    assert "***" in str(error)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"urls": []}, "urls"),
        ({"urls": ["127.0.0.1:9200"]}, "urls"),
        ({"urls": ["https://host"]}, "urls"),
        ({"urls": ["http://host:9200"], "ca_file": "ca.pem"}, "ca_file"),
        ({"urls": ["https://host:9200"], "ca_file": "/nowhere/ca.pem"}, "ca_file"),
    ],
)
def test_an_address_that_cannot_be_is_refused_before_any_request(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ElasticsearchClient(ElasticsearchConfig.model_validate(changes), Credentials())
    assert caught.value.field == f"retrieval.elasticsearch.{field}"


@pytest.mark.parametrize("key", ["a2V5\n", " a2V5", "a2V5 ", "kéy", ""])
def test_a_key_that_no_header_takes_is_refused_and_not_shown(key: str) -> None:
    """A file read into a variable ends with a line's end."""
    with pytest.raises(ConfigError, match=r"elasticsearch\.api_key: holds white space, or") as caught:
        read_credentials(ElasticsearchConfig.model_validate({"api_key": key}), {})
    assert "a2V5" not in str(caught.value)


def test_a_name_needs_a_password() -> None:
    with pytest.raises(ConfigError, match=r"elasticsearch.password: missing.*ELASTICSEARCH_PASSWORD"):
        read_credentials(ElasticsearchConfig(username="elastic"), {})


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject]
    subprocess.run([*command, "-keyout", str(key), "-out", str(cert)], check=True, capture_output=True)
    return cert, key


def _tls_fake(certificate: tuple[Path, Path]) -> FakeElastic:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*certificate)
    return FakeElastic(tls=context)


def test_a_cluster_with_a_certificate_of_its_own_is_trusted_by_its_authority(certificate: tuple[Path, Path]) -> None:
    async def what(retriever: BatchedRetriever, fake: FakeElastic) -> None:
        assert fake.url.startswith("https")
        assert first_ids(await ask_all(retriever, ["word2"])) == ["p2"]

    talk(_tls_fake(certificate), what, ca_file=str(certificate[0]))


def test_without_its_authority_it_is_refused_and_the_field_named(certificate: tuple[Path, Path]) -> None:
    error = opening_error(_tls_fake(certificate), ConfigError)
    assert str(error).startswith("retrieval.elasticsearch.ca_file: https://127.0.0.1")
    assert "self-signed certificate" in str(error) or "self signed certificate" in str(error)


def test_a_file_that_is_not_a_certificate_is_reported(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("no certificate")
    config = ElasticsearchConfig(urls=("https://host:9200",), ca_file=tmp_path / "ca.pem")
    with pytest.raises(ConfigError, match=r"ca_file: .* holds no certificate"):
        ElasticsearchClient(config, Credentials())
