"""The search engine of a run, by its section: the one place that knows all of them."""

from __future__ import annotations

from megatron_sdsearch.config import ElasticsearchConfig, RetrievalConfig
from megatron_sdsearch.errors import ConfigError
from megatron_sdsearch.logging import names
from megatron_sdsearch.retrieval.base import Retriever
from megatron_sdsearch.retrieval.batching import CountsSearches
from megatron_sdsearch.retrieval.http import RetrieveServerRetriever
from megatron_sdsearch.retrieval.replay import ReplayRetriever, replay_counts, with_replay_async
from megatron_sdsearch.retrieval.tantivy_index import TantivyRetriever, index_root


async def open_retriever(config: RetrievalConfig) -> Retriever:
    """The configured engine, checked and ready, behind the store of ``retrieval.replay`` or replaced by it.

    To be used on the event loop on which it is opened.

    Raises:
        ConfigError: a setting does not fit the engine, or its client is not installed.
        DataError: the corpus has a bad row.
        RetrievalError: the engine is down.
    """
    return await with_replay_async(config.replay, lambda: _open_engine(config))


def take_counts(retriever: Retriever) -> dict[str, int]:
    """What happened since the last call, under names of metrics: of the replay store, and of a remote engine.

    Evaluations and probes search through the same retriever, so their searches are in the next step's counts. Every
    rank of a run gets the same names, and the numbers add up over ranks.
    """
    engine: object = retriever.engine if isinstance(retriever, ReplayRetriever) else retriever
    counts = replay_counts(retriever)
    if isinstance(engine, CountsSearches):
        counts |= {names.RETRIEVAL_PREFIX + name: value for name, value in engine.take_counts().to_dict().items()}
    return counts


async def _open_engine(config: RetrievalConfig) -> Retriever:
    if config.engine == "elasticsearch":
        return await _open_elastic(config.elasticsearch)
    if config.engine == "http":
        return await RetrieveServerRetriever.open(config.http)
    assert config.corpus is not None  # RetrievalConfig has checked it
    return TantivyRetriever.open_or_build(config.corpus, config.analyzer, index_root(config.corpus, config.index))


async def _open_elastic(config: ElasticsearchConfig) -> Retriever:
    try:
        from megatron_sdsearch.retrieval.elastic import ElasticRetriever
    except ModuleNotFoundError as error:
        raise client_is_missing(error) from error
    if config.mode == "bm25" or config.encoder is None:
        return await ElasticRetriever.open(config)
    from megatron_sdsearch.retrieval.folder_encoder import (
        FolderEncoder,  # torch and transformers, for dense search alone
    )

    return await ElasticRetriever.open(config, FolderEncoder.from_folder(config.encoder))


def client_is_missing(error: ModuleNotFoundError) -> ConfigError:
    """What it means that ``retrieval.elastic*`` cannot be imported."""
    return ConfigError(
        "retrieval.engine",
        f"elasticsearch, and {error.name} is not installed",
        "pip install 'megatron-sdsearch[elasticsearch]', of the cluster's major version",
    )
