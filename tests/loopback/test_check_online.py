"""``check --online`` before servers: what they say and answer is held against the configuration."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_sdsearch.config import load_config
from megatron_sdsearch.errors import ConfigError
from megatron_sdsearch.retrieval.elasticsearch_client import CLIENT_MAJOR
from megatron_sdsearch.retrieval.server import ThreadedRetriever
from megatron_sdsearch.retrieval.tantivy_index import TantivyRetriever, default_root
from megatron_sdsearch.sglang.servers import ServerSupervisor
from tests.loopback import fake_elastic, fake_sglang
from tests.loopback.fake_elastic import ALIAS, FakeElastic
from tests.loopback.fake_sglang import FakeSGLang
from tests.loopback.test_retrieve_server import serving
from tests.unit.check.tiny_run import CITIES, TinyRun, only, save_model

PASSAGES = {f"p{i}": f'"{city}"\n{city} is a city.' for i, city in enumerate(CITIES)}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def tiny(tmp_path: Path, model_folder: Path) -> TinyRun:
    return TinyRun(tmp_path, model_folder)


@pytest.fixture
def unused_url() -> Iterator[str]:
    """An address that no server listens at."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def online_notes(tiny: TinyRun, *overrides: str) -> str:
    return "\n".join(finding.problem for finding in tiny.check(*overrides, is_online=True).findings)


# Elasticsearch


@pytest.fixture
def cluster() -> Iterator[FakeElastic]:
    fake = FakeElastic(PASSAGES)
    fake.version = f"{CLIENT_MAJOR}.1.0"
    with fake_elastic.running_in_thread(fake):
        yield fake


def elastic(url: str, index: str = ALIAS) -> tuple[str, ...]:
    name = "retrieval.elasticsearch"
    return (
        "retrieval.engine=elasticsearch", f"{name}.urls=[{url}]", f"{name}.index={index}", f"{name}.max_attempts=1",
        f"{name}.down_timeout_s=2",
    )  # fmt: skip


def test_a_cluster_in_order_is_asked_and_has_hits(tiny: TinyRun, cluster: FakeElastic) -> None:
    assert tiny.found(*elastic(cluster.url), is_online=True) == []
    notes = online_notes(tiny, *elastic(cluster.url))
    assert "10 passages behind elasticsearch" in notes
    assert "10 of 10 questions, asked as they are, have hits" in notes


def test_offline_no_cluster_is_asked(tiny: TinyRun, cluster: FakeElastic) -> None:
    assert "elasticsearch was not asked; --online does" in tiny.notes(*elastic(cluster.url))
    assert cluster.bodies == []


def test_a_cluster_that_is_not_there_is_found(tiny: TinyRun, unused_url: str) -> None:
    finding = only(tiny.found(*elastic(unused_url), is_online=True))
    assert (finding.severity, finding.field) == ("error", "retrieval.elasticsearch")
    assert "no answer after 1 attempts" in finding.problem
    assert finding.fix == "start the cluster, or give its address"


def test_what_the_cluster_lacks_is_found(tiny: TinyRun, cluster: FakeElastic) -> None:
    assert "no such index [nothing]" in only(tiny.found(*elastic(cluster.url, "nothing"), is_online=True)).problem
    cluster.version = f"{CLIENT_MAJOR - 1}.19.0"
    finding = only(tiny.found(*elastic(cluster.url), is_online=True))
    assert (finding.severity, finding.field) == ("warning", "retrieval.elasticsearch.urls")
    assert f"has version {CLIENT_MAJOR - 1}.19.0" in finding.problem
    cluster.version = f"{CLIENT_MAJOR}.1.0"
    cluster.passages = {}
    assert "holds no passages" in only(tiny.found(*elastic(cluster.url), is_online=True)).problem


def test_documents_that_do_not_fit_the_prompt_are_found(tiny: TinyRun, cluster: FakeElastic) -> None:
    cluster.passages = {name: text.replace("\n", " ") for name, text in PASSAGES.items()}
    assert "have no title line" in only(tiny.found(*elastic(cluster.url), is_online=True)).problem
    cluster.passages = {name: text + " far" * 200 for name, text in PASSAGES.items()}
    assert only(tiny.found(*elastic(cluster.url), is_online=True)).field == "rollout.max_observation_tokens"
    cluster.passages = {"p0": PASSAGES["p0"]}
    finding = only(tiny.found(*elastic(cluster.url), is_online=True))
    assert (finding.field, finding.fix) == ("retrieval.top_k", "set it to 1")


# Search-R1's /retrieve


def test_a_retrieve_server_is_asked(tiny: TinyRun, unused_url: str) -> None:
    index = TantivyRetriever.open_or_build(tiny.corpus, "standard", default_root(tiny.corpus))
    with serving(ThreadedRetriever(index), num_passages=10) as url:
        right = ("retrieval.engine=http", f"retrieval.http.url={url}")
        assert tiny.found(*right, is_online=True) == []
        assert "in 10 a gold answer stands in the first 2" in online_notes(tiny, *right)
    finding = only(tiny.found("retrieval.engine=http", f"retrieval.http.url={unused_url}/retrieve", is_online=True))
    assert "no server answers" in finding.problem
    assert "tools/serve_retriever.py" in finding.fix


# SGLang


@pytest.fixture
def server(tiny: TinyRun) -> Iterator[FakeSGLang]:
    with fake_sglang.running_in_thread(FakeSGLang()) as fake:
        fake.model_info = {"model_path": str(tiny.model), "model_type": "qwen2"}
        yield fake


def sglang(*urls: str) -> tuple[str, str]:
    return "rollout.engine=sglang", f"rollout.sglang.urls={list(urls)}"


def test_a_server_in_order_is_asked(tiny: TinyRun, server: FakeSGLang) -> None:
    assert tiny.found(*sglang(server.url), is_online=True) == []
    assert "SGLang 0.5.23" in online_notes(tiny, *sglang(server.url))
    server.calls.clear()
    assert "1 servers were not asked; --online does" in tiny.notes(*sglang(server.url))
    assert server.calls == []


def test_servers_are_judged_one_by_one(tiny: TinyRun, server: FakeSGLang, unused_url: str) -> None:
    finding = only(tiny.found(*sglang(server.url, unused_url), is_online=True))
    assert finding.field == "rollout.sglang.urls"
    assert f"{unused_url}/model_info does not answer" in finding.problem


@pytest.mark.parametrize(
    ("about", "answer", "field", "text"),
    [
        ("server_info", {"version": "0.4.0"}, "rollout.sglang.urls", "older than 0.5.19"),
        ("server_info", {"tp_size": 2}, "rollout.sglang.tp_size", "runs with --tp-size 2"),
        ("server_info", {"max_req_input_len": 299}, "rollout.max_total_tokens", "accepts 299 (max_req_input_len"),
        ("server_info", {"skip_tokenizer_init": True}, "rollout.sglang.urls", "has no tokenizer"),
        ("model_info", {"model_type": "llama"}, "rollout.sglang.urls", "serves a llama, the policy is a qwen2"),
        ("model_info", {"is_generation": False}, "rollout.sglang.urls", "an embedding model"),
    ],
)
def test_a_server_that_does_not_fit_is_found(
    tiny: TinyRun, server: FakeSGLang, about: str, answer: dict[str, Any], field: str, text: str
) -> None:
    getattr(server, about).update(answer)
    finding = only(tiny.found(*sglang(server.url), is_online=True))
    assert (finding.severity, finding.field) == ("error", field)
    assert text in finding.problem
    if about == "server_info":
        config = load_config(tiny.config, sglang(server.url))
        with pytest.raises(ConfigError, match=re.escape(finding.problem)):
            ServerSupervisor(config).start()


def test_a_server_that_does_not_tell_what_it_takes_is_a_warning(tiny: TinyRun, server: FakeSGLang) -> None:
    server.server_info["max_req_input_len"] = None
    finding = only(tiny.found(*sglang(server.url), is_online=True))
    assert (finding.severity, finding.field) == ("warning", "rollout.sglang.urls")
    assert "max_req_input_len" in finding.problem


@pytest.mark.parametrize(("probe", "longest"), [("false", 300), ("true", 300 + 128)])
def test_training_refuses_a_short_context_as_the_check_does(
    tiny: TinyRun, server: FakeSGLang, probe: str, longest: int
) -> None:
    """The query probe asks with the teacher's prompt. A context that holds the tokens alone is 6 too short."""
    overrides = [*sglang(server.url), f"telemetry.query_probe={probe}"]
    config = load_config(tiny.config, overrides)
    server.context_length = longest + 6
    assert tiny.found(*overrides, is_online=True) == []
    ServerSupervisor(config).start()
    server.context_length = longest + 5
    finding = only(tiny.found(*overrides, is_online=True))
    with pytest.raises(ConfigError) as caught:
        ServerSupervisor(config).start()
    assert (finding.severity, finding.field) == ("error", "rollout.max_total_tokens")
    assert (caught.value.field, caught.value.problem, caught.value.fix) == (
        finding.field,
        finding.problem,
        finding.fix,
    )
    assert caught.value.fix.startswith("lower it to 299, or start the server with a larger context")


def test_a_server_whose_info_cannot_be_read_is_used_and_warned_of(
    tiny: TinyRun, server: FakeSGLang, caplog: pytest.LogCaptureFixture
) -> None:
    server.is_without_info = True
    config = load_config(tiny.config, sglang(server.url))
    ServerSupervisor(config).start()
    assert "/server_info" in caplog.text
    assert "cannot check whether the server accepts the run's longest request" in caplog.text


def test_a_server_of_another_model_is_found_by_its_shape(
    tiny: TinyRun, server: FakeSGLang, tmp_path: Path, model_folder: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    settings = json.loads((model_folder / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(settings))
    server.model_info["model_path"] = str(other)
    assert tiny.found(*sglang(server.url), is_online=True) == []
    (other / "config.json").write_text(json.dumps(settings | {"vocab_size": 77}))
    assert "vocab_size = 77" in only(tiny.found(*sglang(server.url), is_online=True)).problem


def test_another_kind_of_server_is_found(tiny: TinyRun) -> None:
    index = TantivyRetriever.open_or_build(tiny.corpus, "standard", default_root(tiny.corpus))
    with serving(ThreadedRetriever(index)) as url:
        finding = only(tiny.found(*sglang(url.removesuffix("/retrieve")), is_online=True))
    assert "returns HTTP 404" in finding.problem
