"""Elasticsearch indices of passages: fields and settings, loading progress, and the checks before a search.

``tools/index_corpus.py`` creates such indices (``elasticsearch_load.py``); any other index with matching fields works
as well.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from megatron_sdsearch.config import ElasticsearchConfig
from megatron_sdsearch.errors import ConfigError, RetrievalError
from megatron_sdsearch.retrieval.batched import SearchError, retry
from megatron_sdsearch.retrieval.corpus import CorpusRow
from megatron_sdsearch.retrieval.elasticsearch_client import CLIENT_MAJOR, SECTION, ElasticsearchClient
from megatron_sdsearch.retrieval.encoder import Similarity, TextEncoder

_log = logging.getLogger(__name__)

T = TypeVar("T")

CONTENTS, TITLE, TEXT, VECTOR = "contents", "title", "text", "vector"
"""Fields of the index."""
META = "megatron_sdsearch"
"""Key of the ``Marker`` under ``_meta`` in the mapping of an index made by ``tools/index_corpus.py``."""

_LAYOUT = 1
"""Increase it when the meaning of an index changes, so that a corpus is loaded into a new one."""
_TEXT_TYPES = frozenset({"text", "match_only_text", "search_as_you_type"})
_MERGE_LIMIT_S = 6 * 3600.0
_RANKING = ("analysis", "similarity", "number_of_shards")
"""Index settings that affect search results."""


class Marker(BaseModel):
    """Loading progress of an index, stored in its mapping.

    Attributes:
        layout: ``_LAYOUT`` of the version that loaded it.
        corpus_sha256: of the corpus file's bytes.
        encoder: fingerprint of the encoder; None: there are no vectors, or an older version loaded it.
        num_passages: of the corpus.
        num_done: passages loaded or rejected, counted from the start of the corpus.
        num_rejected: those rejected by Elasticsearch.
        is_complete: loaded and verified.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    layout: int = _LAYOUT
    corpus_sha256: str
    encoder: str | None = None
    num_passages: int
    num_done: int = 0
    num_rejected: int = 0
    is_complete: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexSettings:
    """Settings of a new index.

    Attributes:
        name: the alias; the index itself is ``name-<hash of its content>``.
        analyzer: of ``contents``, ``title`` and ``text``.
        num_shards: BM25 counts document frequencies per shard, so only a single shard gives the scores of the whole
            corpus (those of tantivy, Lucene and the paper). More are faster over tens of millions of passages.
        num_replicas: once loaded.
        encoder: fingerprint of the encoder; None for an index without vectors.
        num_dims: length of the vectors.
        similarity: how vectors are compared.
    """

    name: str
    analyzer: Literal["standard", "english"] = "standard"
    num_shards: int = 1
    num_replicas: int = 1
    encoder: str | None = None
    num_dims: int | None = None
    similarity: Similarity = "cosine"

    def __post_init__(self) -> None:
        """Check what Elasticsearch would reject only after the corpus was read.

        Raises:
            ConfigError: the name or a number is invalid.
        """
        if not re.fullmatch(r"[^-_+.A-Z\\/*?\"<>| ,#:][^A-Z\\/*?\"<>| ,#:]{0,199}", self.name):
            raise ConfigError("--index", f"{self.name!r} is not an index name", "use lower case, digits, - and _")
        for option, number, least in (("--shards", self.num_shards, 1), ("--replicas", self.num_replicas, 0)):
            if number < least:
                raise ConfigError(option, f"{number} is too few", f"set it to at least {least}")

    def physical_name(self, corpus_sha256: str) -> str:
        """Return the index name for a corpus: a hash of the corpus and the settings."""
        parts = (str(_LAYOUT), corpus_sha256, self.analyzer, str(self.num_shards), self.encoder or "")
        return f"{self.name}-{hashlib.sha256('/'.join(parts).encode()).hexdigest()[:12]}"

    def body(self) -> dict[str, Any]:
        """Return settings and mappings of a new index, tuned for loading: no refresh, no replicas."""
        text = {"type": "text", "analyzer": self.analyzer}
        properties: dict[str, Any] = {CONTENTS: text, TITLE: text, TEXT: text}
        if self.encoder is not None:
            properties[VECTOR] = {
                "type": "dense_vector",
                "dims": self.num_dims,
                "index": True,
                # For unit vectors cosine ranks like the dot product, and tolerates rounding errors in their length.
                "similarity": "cosine" if self.similarity == "cosine" else "max_inner_product",
                # One byte per number. The default depends on the version: since 9.1 it is one bit for long vectors.
                "index_options": {"type": "int8_hnsw"},
            }
        return {
            "settings": {
                "number_of_shards": self.num_shards,
                "number_of_replicas": 0,
                "refresh_interval": "-1",
                # The defaults, set explicitly because an index template of the cluster may override them.
                "similarity": {"default": {"type": "BM25", "k1": 1.2, "b": 0.75}},
            },
            "mappings": {
                "dynamic": False,
                # contents holds both title and text; vectors as JSON would be most of the disk.
                "_source": {"excludes": [TITLE, TEXT, VECTOR]},
                "properties": properties,
            },
        }


def to_action(row: CorpusRow, vector: Sequence[float] | None) -> dict[str, Any]:
    """Return the ``create`` action of a passage for ``elasticsearch.helpers``."""
    title, text = row.title_and_text()
    source: dict[str, Any] = {CONTENTS: row.contents, TITLE: title, TEXT: text}
    if vector is not None:
        source[VECTOR] = vector
    return {"_op_type": "create", "_id": row.id, "_source": source}


class CorpusIndex:
    """The index of one corpus during loading, and its alias.

    Attributes:
        name: of the index itself, not the alias.
    """

    def __init__(
        self, client: ElasticsearchClient, settings: IndexSettings, corpus_sha256: str, retry_limit_s: float
    ) -> None:
        self.client = client
        self.name = settings.physical_name(corpus_sha256)
        self._settings = settings
        self._corpus_sha256 = corpus_sha256
        self._retry_limit_s = retry_limit_s
        self._indices = client.api.indices
        self._indices_or_404 = client.api.options(ignore_status=404).indices

    async def send(self, request: Callable[[], Awaitable[T]], action: str) -> T:
        """Send a request, with retries, and return the response.

        Raises:
            RetrievalError: it was refused, or failed for longer than the limit.
        """
        try:
            return await retry(lambda: self.client.send_once(request), limit_s=self._retry_limit_s)
        except SearchError as failure:
            lasting = f"failing for {self._retry_limit_s:g} s: " if failure.is_retryable else ""
            raise self.error(f"{action}: {lasting}{failure}") from None

    def error(self, problem: str) -> RetrievalError:
        """Return an error that names cluster and index."""
        return RetrievalError(f"{self.client.addresses}: {self.name}: {problem}")

    async def begin(self, num_passages: int, *, is_restart: bool) -> Marker:
        """Create the index, or read the progress of an earlier attempt.

        Raises:
            ConfigError: the alias is an index, the index was not made by this tool, or ``is_restart`` and it is
                complete.
            RetrievalError: the cluster failed.
        """
        alias = self._settings.name
        # The alias is set after hours of loading: check first that it can be.
        found = await self.send(lambda: self._indices_or_404.get(index=alias), "cannot look up the alias")
        if found.meta.status == 200 and alias in found:
            problem = f"{alias!r} is an index, and is to become an alias"
            raise ConfigError("--index", problem, "choose another name, or delete it")
        exists = bool(await self.send(lambda: self._indices.exists(index=self.name), "cannot look it up"))
        if exists and is_restart:
            if (await self._read_marker()).is_complete:
                raise ConfigError("--restart", f"{self.name} is complete", "leave the option out, or delete the index")
            await self.send(lambda: self._indices.delete(index=self.name), "cannot delete it")
            exists = False
        if not exists:
            encoder, body = self._settings.encoder, self._settings.body()
            marker = Marker(corpus_sha256=self._corpus_sha256, encoder=encoder, num_passages=num_passages)
            body["mappings"]["_meta"] = {META: marker.model_dump()}
            try:
                await self.send(lambda: self._indices.create(index=self.name, **body), "cannot create it")
            except RetrievalError as error:
                # The response to a first attempt was lost, or another process loads the same corpus: both can continue.
                if "resource_already_exists_exception" not in str(error):
                    raise
        return await self._read_marker()

    async def _read_marker(self) -> Marker:
        answer = await self.send(lambda: self._indices.get_mapping(index=self.name), "cannot read its marker")
        meta = answer[self.name]["mappings"].get("_meta", {})
        try:
            return Marker.model_validate(meta.get(META))
        except ValidationError as error:
            problem = f"{self.name} was not made by this tool, or was deleted meanwhile"
            raise ConfigError("--index", problem, "delete it and start again") from error

    async def write_marker(self, marker: Marker) -> None:
        """Store the loading progress."""
        meta = {META: marker.model_dump()}
        await self.send(lambda: self._indices.put_mapping(index=self.name, meta=meta), "cannot write its marker")

    async def open_for_searches(self, *, is_merged: bool) -> None:
        """Restore the settings that were changed for loading, and make all passages visible.

        Args:
            is_merged: merge into one segment: smaller and faster; takes minutes per ten million passages.
        """
        settings = {"index": {"refresh_interval": None, "number_of_replicas": self._settings.num_replicas}}
        await self.send(lambda: self._indices.put_settings(index=self.name, settings=settings), "cannot restore it")
        if is_merged:
            merge = self.client.api.options(request_timeout=_MERGE_LIMIT_S).indices.forcemerge
            await self.send(lambda: merge(index=self.name, max_num_segments=1), "cannot merge its segments")
        await self.send(lambda: self._indices.refresh(index=self.name), "cannot refresh it")

    async def verify(self, num_expected: int, sample: dict[str, str]) -> None:
        """Count the passages, and compare a sample with the corpus.

        Args:
            num_expected: passages in the index.
            sample: id to contents.

        Raises:
            RetrievalError: the count is wrong, or a passage is missing or differs from the corpus.
        """
        api = self.client.api
        count = int((await self.send(lambda: api.count(index=self.name), "cannot count"))["count"])
        if count != num_expected:
            raise self.error(f"holds {count:,} passages instead of {num_expected:,}; load it again with --restart")
        found: dict[str, Any] = {}
        if ids := list(sample):
            mget = partial(api.mget, index=self.name, ids=ids, source_includes=[CONTENTS])
            answer = await self.send(mget, "cannot fetch a sample")
            found = {doc["_id"]: doc.get("_source", {}).get(CONTENTS) for doc in answer["docs"] if doc.get("found")}
        for passage_id, contents in sample.items():
            if found.get(passage_id) != contents:
                problem = "differs from the corpus" if passage_id in found else "is missing"
                raise self.error(f"passage {passage_id!r} {problem}; load the corpus again with --restart")

    async def publish(self, *, deletes_old: bool) -> tuple[str, ...]:
        """Point the alias to this index alone, atomically.

        Returns:
            The indices that it pointed to before, deleted or kept.
        """
        alias = self._settings.name
        found = await self.send(lambda: self._indices_or_404.get_alias(name=alias), "cannot read the alias")
        old = tuple(sorted(name for name in found if name != self.name)) if found.meta.status == 200 else ()
        actions: list[dict[str, Any]] = [{"add": {"index": self.name, "alias": alias}}]
        for name in old:
            target = {"index": name}
            actions.append({"remove_index": target} if deletes_old else {"remove": target | {"alias": alias}})
        await self.send(lambda: self._indices.update_aliases(actions=actions), "cannot switch the alias")
        return old


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedIndex:
    """The index behind the configured name.

    Attributes:
        name: of the index itself, not an alias.
        fingerprint: cluster, index, settings and generation.
        num_passages: size of the index.
        version_warning: a warning about the cluster's version; empty if there is none.
    """

    name: str
    fingerprint: str
    num_passages: int
    version_warning: str


async def open_index(
    client: ElasticsearchClient, config: ElasticsearchConfig, encoder: TextEncoder | None
) -> OpenedIndex:
    """Check that the configured name denotes one index, with passages and the searched fields.

    Raises:
        ConfigError: a setting is wrong.
        RetrievalError: the cluster is down.
    """
    indices = client.api.indices
    try:
        info = await client.send(client.api.info)
        found = await client.send(lambda: indices.get(index=config.index))
        if len(found) != 1:
            problem = f"{config.index} denotes {', '.join(sorted(found)) or 'no index'}"
            raise ConfigError(f"{SECTION}.index", problem, "give a name that denotes one index")
        ((name, index),) = found.items()
        stats = (await client.send(lambda: indices.stats(index=name, level="shards")))["indices"][name]
    except SearchError as failure:
        raise client.error_from(failure) from None
    # Clusters reject a client one major version newer, and accept one that is one older.
    version, warning = str(info["version"]["number"]), ""
    if version.split(".")[0] != str(CLIENT_MAJOR):
        warning = (
            f"{client.addresses} has version {version}, the installed client {CLIENT_MAJOR}: it answers, but the major "
            "versions should be equal"
        )
        _log.warning("%s", warning)
    settings, mappings = index["settings"]["index"], index["mappings"]
    _check_fields(config, mappings.get("properties", {}), encoder)
    if encoder is not None:
        _check_encoder(config, mappings.get("_meta", {}).get(META, {}), encoder)
    num_passages = int(stats["primaries"]["docs"]["count"])
    if num_passages == 0:
        raise ConfigError(f"{SECTION}.index", f"{name} holds no passages", "index the corpus first")
    # Sequence numbers change with every write; not every server reports them.
    generation = sorted(
        (str(shard), copy["seq_no"]["max_seq_no"])
        for shard, copies in stats.get("shards", {}).items()
        for copy in copies
        if copy.get("routing", {}).get("primary") and "seq_no" in copy
    )
    parts = (
        str(info.get("cluster_uuid")),
        settings["uuid"],
        _digest([[settings.get(each) for each in _RANKING], mappings]),
        str(num_passages),
        _digest(generation) if generation else "-",
    )
    return OpenedIndex(name=name, fingerprint="/".join(parts), num_passages=num_passages, version_warning=warning)


def _check_fields(config: ElasticsearchConfig, properties: dict[str, Any], encoder: TextEncoder | None) -> None:
    names = [] if config.mode == "dense" else [CONTENTS] if config.fields == "contents" else [TITLE, TEXT]
    for name in names if encoder is None else [*names, VECTOR]:
        setting, wanted, types = "fields", "text", _TEXT_TYPES
        if name == VECTOR:
            setting, wanted, types = "mode", "dense_vector", frozenset({"dense_vector"})
        found = properties.get(name, {}).get("type", "missing")
        if found not in types:
            problem = f"{getattr(config, setting)} needs field {name!r} of type {wanted}, which is {found}"
            fix = "choose another, or index the corpus with that field"
            raise ConfigError(f"{SECTION}.{setting}", f"{problem} in {config.index}", fix)
    if encoder is not None and (num_dims := properties[VECTOR].get("dims")) != encoder.num_dims:
        problem = f"{config.encoder} makes vectors of length {encoder.num_dims}, field {VECTOR!r} of {config.index}"
        fix = "use the encoder that the index was made with"
        raise ConfigError(f"{SECTION}.encoder", f"{problem} holds {num_dims}", fix)


def _check_encoder(config: ElasticsearchConfig, marker: dict[str, Any], encoder: TextEncoder) -> None:
    """Refuse a different encoder: its vectors may have the same length, but are not comparable."""
    loaded_with, problem = marker.get("encoder"), ""
    if loaded_with is None and marker and encoder.has_own_settings:
        problem = (
            f"{config.encoder} configures pooling and prompts, and {config.index} was loaded by a version of "
            "index_corpus that ignored them"
        )
    elif loaded_with not in (None, encoder.fingerprint):
        problem = (
            f"{config.encoder} is {encoder.fingerprint}, and the vectors of {config.index} were made by {loaded_with}: "
            "the weights, pooling, prompts or length differ"
        )
    if problem:
        fix = "load the corpus again with --encoder, or use the encoder that the index was made with"
        raise ConfigError(f"{SECTION}.encoder", problem, fix)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
