"""``retrieval``: the search engine, and the store of what it answered."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import SecretStr

from megatron_sdsearch.config.types import HomePath, NonNegativeFloat, PositiveInt, Seconds, Section, Url


class RemoteSearchConfig(Section):
    """How a search engine on other machines is asked; by one rank."""

    username: str | None = None
    """For HTTP's basic authentication. Elasticsearch: else ELASTICSEARCH_USERNAME."""
    password: SecretStr | None = None
    """``${oc.env:NAME}`` takes it from the environment. Elasticsearch: else ELASTICSEARCH_PASSWORD."""
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

    urls: tuple[Url, ...] = ("http://127.0.0.1:9200",)
    index: str = "wiki-18"
    """Index or alias."""
    mode: Literal["bm25", "dense", "hybrid"] = "bm25"
    fields: Literal["contents", "title_and_text"] = "contents"
    """What BM25 matches: the whole passage, or title and text as two fields."""
    encoder: HomePath | None = None
    """Folder of a text encoder, for ``dense`` and ``hybrid``: with sentence-transformers' module files, whose pooling,
    prompts and normalisation hold, or without any an E5 model."""
    api_key: SecretStr | None = None
    """Else ELASTICSEARCH_API_KEY."""
    ca_file: HomePath | None = None
    """Certificate of the authority that signed the cluster's; the system's authorities by default."""


class RetrieveServerConfig(RemoteSearchConfig):
    """A server that speaks Search-R1's /retrieve, perhaps behind a proxy that asks for a password."""

    url: Url = "http://127.0.0.1:8000/retrieve"


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
    """tantivy: how text becomes terms; an Elasticsearch index has its own."""
    top_k: PositiveInt = 3
    elasticsearch: ElasticsearchConfig = ElasticsearchConfig()
    http: RetrieveServerConfig = RetrieveServerConfig()
    replay: ReplayConfig = ReplayConfig()

    def files(self) -> dict[str, Path]:
        """Every path that has to exist before a search, by its field."""
        # With ``only`` the engine is not opened.
        name, path = ("replay.store", self.replay.store) if self.replay.mode == "only" else ("corpus", self.corpus)
        return {} if path is None else {f"retrieval.{name}": path}
