"""Section ``retrieval``: the search engine, and the store of its recorded answers."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import SecretStr

from megatron_sdsearch.config.types import HomePath, NonNegativeFloat, PositiveInt, Seconds, Section, Url


class RemoteSearchConfig(Section):
    """Requests of one rank to a search engine on other machines."""

    username: str | None = None
    """User for HTTP basic authentication. Elasticsearch falls back to ELASTICSEARCH_USERNAME."""
    password: SecretStr | None = None
    """Password, e.g. ``${oc.env:NAME}`` for a variable. Elasticsearch falls back to ELASTICSEARCH_PASSWORD."""
    timeout_s: Seconds = 30.0
    """Timeout of one request."""
    max_attempts: PositiveInt = 5
    """Attempts per query; those during an outage do not count."""
    down_timeout_s: Seconds = 120.0
    """The run stops when no search has succeeded for this long."""
    max_requests: PositiveInt = 16
    """Most concurrent requests."""
    batch_queries: PositiveInt = 64
    """Most queries per request."""
    batch_window_ms: NonNegativeFloat = 5.0
    """Milliseconds that the first query of a request waits for others."""


class ElasticsearchConfig(RemoteSearchConfig):
    """An Elasticsearch cluster and the search in it."""

    urls: tuple[Url, ...] = ("http://127.0.0.1:9200",)
    """Addresses of the cluster's nodes."""
    index: str = "wiki-18"
    """Name of the index, or an alias of it."""
    mode: Literal["bm25", "dense", "hybrid"] = "bm25"
    """``bm25``: lexical. ``dense``: by the encoder's embeddings. ``hybrid``: both, fused by rank."""
    fields: Literal["contents", "title_and_text"] = "contents"
    """Text that BM25 matches: the whole passage, or title and text as two fields."""
    encoder: HomePath | None = None
    """Folder of a text encoder, for ``dense`` and ``hybrid``. With sentence-transformers' module files, their pooling,
    prompts and normalisation apply; without them it must be an E5 model."""
    api_key: SecretStr | None = None
    """API key; falls back to ELASTICSEARCH_API_KEY."""
    ca_file: HomePath | None = None
    """CA certificate for TLS; the system's by default."""


class RetrieveServerConfig(RemoteSearchConfig):
    """A server with Search-R1's /retrieve API; a proxy before it may require a password."""

    url: Url = "http://127.0.0.1:8000/retrieve"
    """Address of the route, path included."""


class ReplayConfig(Section):
    """Recorded answers of the search engine."""

    mode: Literal["off", "cache", "only"] = "off"
    """``cache``: recorded queries are answered from the store; others go to the engine and are recorded. ``only``: the
    engine is never opened, and an unrecorded query is an error."""
    store: HomePath | None = None
    """SQLite file with the answers; ranks of one machine, and runs, may share it."""


class RetrievalConfig(Section):
    """The search engine."""

    engine: Literal["tantivy", "elasticsearch", "http"] = "tantivy"
    """``tantivy``: BM25 inside each rank. ``elasticsearch``: a cluster. ``http``: a Search-R1 server."""
    corpus: HomePath | None = None
    """tantivy: JSONL of passages ``{"id", "contents"}``. The index is built once per content and analyzer."""
    index: HomePath | None = None
    """tantivy: folder for indices, or the one made by ``tools/index_corpus.py --out``. null is the folder ``index``
    beside the corpus, which all runs share; set it when the corpus's folder is read-only."""
    analyzer: Literal["standard", "english"] = "standard"
    """tantivy: Lucene analyzer that turns text into terms. An Elasticsearch index has its own."""
    top_k: PositiveInt = 3
    """Passages per query; the paper's value, and the number that the autorefine prompt announces."""
    elasticsearch: ElasticsearchConfig = ElasticsearchConfig()
    http: RetrieveServerConfig = RetrieveServerConfig()
    replay: ReplayConfig = ReplayConfig()

    def files(self) -> dict[str, Path]:
        """Return the paths that must exist before a search, by field."""
        # With ``only`` the engine is not opened, so the corpus may be gone.
        name, path = ("replay.store", self.replay.store) if self.replay.mode == "only" else ("corpus", self.corpus)
        return {} if path is None else {f"retrieval.{name}": path}
