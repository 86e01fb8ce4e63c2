"""Opens the search engine of a run; the only module that depends on all engines."""

from __future__ import annotations

from megatron_sdsearch.config import RetrievalConfig
from megatron_sdsearch.errors import ConfigError
from megatron_sdsearch.logging import names
from megatron_sdsearch.retrieval.base import Retriever
from megatron_sdsearch.retrieval.batched import BatchedRetriever
from megatron_sdsearch.retrieval.http import RetrieveServerBackend
from megatron_sdsearch.retrieval.replay import ReplayRetriever, open_with_replay
from megatron_sdsearch.retrieval.tantivy_index import TantivyRetriever, index_root


async def open_retriever(config: RetrievalConfig) -> Retriever:
    """Open and check the configured engine, with the store of ``retrieval.replay`` before it or in its place.

    Use it on the event loop on which it was opened.

    Raises:
        ConfigError: a setting does not fit the engine, or its client is not installed.
        DataError: the corpus is invalid.
        RetrievalError: the engine is down.
    """
    return await open_with_replay(config.replay, lambda: _open_engine(config))


def take_counts(retriever: Retriever) -> dict[str, int]:
    """Return the counts since the last call, by metric, of the replay store and of a remote engine.

    Evaluations and probes search through the same retriever, so their searches count in the next step. All ranks of a
    run return the same metrics; their values are summed over ranks.
    """
    counts = retriever.take_counts() if isinstance(retriever, ReplayRetriever) else {}
    engine = retriever.engine if isinstance(retriever, ReplayRetriever) else retriever
    if isinstance(engine, BatchedRetriever):
        counts |= {names.RETRIEVAL_PREFIX + name: value for name, value in engine.take_counts().items()}
    return counts


async def _open_engine(config: RetrievalConfig) -> Retriever:
    if config.engine == "tantivy":
        assert config.corpus is not None  # RetrievalConfig has checked it
        return TantivyRetriever.open_or_build(config.corpus, config.analyzer, index_root(config.corpus, config.index))
    if config.engine == "http":
        return BatchedRetriever(await RetrieveServerBackend.open(config.http), config.http)
    try:
        from megatron_sdsearch.retrieval.elasticsearch import ElasticsearchBackend
    except ModuleNotFoundError as error:
        raise client_is_missing(error) from error
    elastic, encoder = config.elasticsearch, None
    if elastic.mode != "bm25" and elastic.encoder is not None:
        # Imports torch and transformers, which only dense search needs.
        from megatron_sdsearch.retrieval.folder_encoder import FolderEncoder

        encoder = FolderEncoder(elastic.encoder)
    return BatchedRetriever(await ElasticsearchBackend.open(elastic, encoder), elastic)


def client_is_missing(error: ModuleNotFoundError) -> ConfigError:
    """Return the error for a failed import of ``retrieval.elasticsearch*``."""
    fix = "pip install 'megatron-sdsearch[elasticsearch]', of the cluster's major version"
    return ConfigError("retrieval.engine", f"elasticsearch needs {error.name}, which is not installed", fix)
