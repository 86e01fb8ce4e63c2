"""``retrieval``: the search engine, and the store of what it answered."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Self

from pydantic import (
    SecretStr,
    ValidationInfo,
    field_validator,
    model_validator,
)

from megatron_sdsearch.config.types import (
    HomePath,
    NonNegativeFloat,
    PositiveInt,
    Seconds,
    Section,
    report_problems,
    without_credentials,
)
from megatron_sdsearch.errors import ConfigError


class RemoteSearchConfig(Section):
    """How a search engine on other machines is asked; by one rank."""

    timeout_s: Seconds = 30.0
    """One request."""
    max_attempts: PositiveInt = 5
    """Requests that may carry one query; those during an outage do not count."""
    down_timeout_s: Seconds = 120.0
    """Nothing was answered for so long: the run stops."""
    max_requests: PositiveInt = 16
    """Open at one time."""
    batch_queries: PositiveInt = 64
    """The most in one request."""
    batch_window_ms: NonNegativeFloat = 5.0
    """How long the first query of a request waits for others."""


class ElasticsearchConfig(RemoteSearchConfig):
    """A cluster, and how it is asked."""

    urls: tuple[str, ...] = ("http://127.0.0.1:9200",)
    index: str = "wiki-18"
    """Index or alias."""
    mode: Literal["bm25", "dense", "hybrid"] = "bm25"
    fields: Literal["contents", "title_and_text"] = "contents"
    """What BM25 matches: the whole passage, or title and text as two fields."""
    encoder: HomePath | None = None
    """Folder of a text encoder, for ``dense`` and ``hybrid``: with sentence-transformers' module files, whose pooling,
    prompts and normalisation hold, or without any an E5 model."""
    username: str | None = None
    """Else ELASTICSEARCH_USERNAME."""
    password: SecretStr | None = None
    """Else ELASTICSEARCH_PASSWORD."""
    api_key: SecretStr | None = None
    """Else ELASTICSEARCH_API_KEY."""
    ca_file: HomePath | None = None
    """Certificate of the authority that signed the cluster's; the system's authorities by default."""

    @field_validator("urls")
    @classmethod
    def _check_urls(cls, urls: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        field, fix = "retrieval.elasticsearch.urls", "use username and password, or api_key"
        return tuple(without_credentials(field, url, fix, info) for url in urls)


class RetrieveServerConfig(RemoteSearchConfig):
    """A server that speaks Search-R1's /retrieve."""

    url: str = "http://127.0.0.1:8000/retrieve"
    username: str | None = None
    """HTTP basic authentication, for a server behind a proxy that asks for it."""
    password: SecretStr | None = None
    """``${oc.env:NAME}`` takes it from the environment."""

    @field_validator("url")
    @classmethod
    def _check_url(cls, url: str, info: ValidationInfo) -> str:
        fix = "use retrieval.http.username and password"
        return without_credentials("retrieval.http.url", url, fix, info)

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> Self:
        report_problems(self._problems(), info)
        return self

    def _problems(self) -> Iterator[ConfigError]:
        if (self.username is None) != (self.password is None):
            lacking, other = ("password", "username") if self.password is None else ("username", "password")
            yield ConfigError(f"retrieval.http.{lacking}", f"missing, and {other} is set", "set both, or neither")


class ReplayConfig(Section):
    """What was searched before."""

    mode: Literal["off", "cache", "only"] = "off"
    """``cache``: known queries are served from the store, others asked and stored. ``only``: an unknown query is an
    error, and the engine is never asked."""
    store: HomePath | None = None
    """A file that ranks, and runs, may share."""


class RetrievalConfig(Section):
    """The search engine."""

    engine: Literal["tantivy", "elasticsearch", "http"] = "tantivy"
    corpus: HomePath | None = None
    """tantivy: JSONL of passages ``{"id", "contents"}``; an index is built once per content and analyzer."""
    index: HomePath | None = None
    """tantivy: folder for its indices, or of the one that ``tools/index_corpus.py --out`` made; null is the folder
    ``index`` beside the corpus, where all runs find it. Set it where the corpus's folder may not be written."""
    analyzer: Literal["standard", "english"] = "standard"
    """How tantivy splits text; an Elasticsearch index has its own."""
    top_k: PositiveInt = 3
    elasticsearch: ElasticsearchConfig = ElasticsearchConfig()
    http: RetrieveServerConfig = RetrieveServerConfig()
    replay: ReplayConfig = ReplayConfig()

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> Self:
        report_problems(self._problems(), info)
        return self

    def _problems(self) -> Iterator[ConfigError]:
        if self.engine == "tantivy" and self.corpus is None and self.replay.mode != "only":
            yield ConfigError(
                "retrieval.corpus", "missing, and retrieval.engine=tantivy reads it", "set retrieval.corpus"
            )
        if self.replay.mode != "off" and self.replay.store is None:
            yield ConfigError(
                "retrieval.replay.store", f"missing, and mode is {self.replay.mode}", "set retrieval.replay.store"
            )
        dense = self.elasticsearch.mode != "bm25"
        if self.engine == "elasticsearch" and dense and self.elasticsearch.encoder is None:
            yield ConfigError(
                "retrieval.elasticsearch.encoder", f"missing, and mode is {self.elasticsearch.mode}", "set it"
            )

    def files(self) -> dict[str, Path]:
        """Every path that has to exist before a search, by its field."""
        # With ``only`` the engine is not opened.
        name, path = ("replay.store", self.replay.store) if self.replay.mode == "only" else ("corpus", self.corpus)
        return {} if path is None else {f"retrieval.{name}": path}
