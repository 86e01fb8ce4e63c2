"""An index of passages in Elasticsearch: its fields and settings, how far it is loaded, and the checks before a search.

``tools/index_corpus.py`` makes such indices (``elasticsearch_load.py``); an index that others made serves as well, if
its fields fit.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from megatron_sdsearch.config import ElasticsearchConfig
from megatron_sdsearch.errors import ConfigError, RetrievalError
from megatron_sdsearch.retrieval.batched import SearchError
from megatron_sdsearch.retrieval.elasticsearch_client import CLIENT_MAJOR, SECTION, ElasticsearchClient
from megatron_sdsearch.retrieval.encoder import Similarity, TextEncoder

_log = logging.getLogger(__name__)

T = TypeVar("T")

CONTENTS, TITLE, TEXT, VECTOR = "contents", "title", "text", "vector"
"""Fields of the index."""
META = "megatron_sdsearch"
"""Under ``_meta`` of a mapping: where an index of ``tools/index_corpus.py`` keeps its ``Marker``."""

_LAYOUT = 1
"""Raise it when the meaning of an index changes: a corpus is then loaded into a new one."""
_TEXT_TYPES = frozenset({"text", "match_only_text", "search_as_you_type"})
_MERGE_LIMIT_S = 6 * 3600.0
_RANKING = ("analysis", "similarity", "number_of_shards")
"""Settings of an index that results depend on."""


class Marker(BaseModel):
    """How far an index has been loaded; kept in its mapping.

    Attributes:
        layout: of this module.
        corpus_sha256: of the corpus file's bytes.
        encoder: fingerprint of what made the vectors; None: there are none, or an older version loaded it.
        num_passages: of the corpus.
        num_done: so many passages from its start are in, or were rejected.
        num_rejected: of those, by Elasticsearch.
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
    """An index that is to be made.

    Attributes:
        name: the alias; the index itself is ``name-<hash of what it holds>``.
        analyzer: of ``contents``, ``title`` and ``text``.
        num_shards: BM25's document frequencies are counted per shard, so only one shard gives the scores of one whole
            corpus (those of tantivy, of Lucene, of the paper). More are quicker over tens of millions of passages.
        num_replicas: once it is loaded.
        encoder: fingerprint of what made the vectors; None: there are none.
        num_dims: of the vectors.
        similarity: by which they are compared.
    """

    name: str
    analyzer: Literal["standard", "english"] = "standard"
    num_shards: int = 1
    num_replicas: int = 1
    encoder: str | None = None
    num_dims: int | None = None
    similarity: Similarity = "cosine"

    def __post_init__(self) -> None:
        """Check what Elasticsearch would refuse only after the corpus was read.

        Raises:
            ConfigError: the name, or a number, is not usable.
        """
        if not re.fullmatch(r"[^-_+.A-Z\\/*?\"<>| ,#:][^A-Z\\/*?\"<>| ,#:]{0,199}", self.name):
            raise ConfigError("--index", f"{self.name!r} is no name of an index", "use lower case, digits, - and _")
        if self.num_shards < 1:
            raise ConfigError("--shards", f"{self.num_shards} is too few", "set it to at least 1")
        if self.num_replicas < 0:
            raise ConfigError("--replicas", f"{self.num_replicas} is too few", "set it to at least 0")

    def physical_name(self, corpus_sha256: str) -> str:
        """The index of that corpus: the same corpus and settings give the same name, others another."""
        parts = (str(_LAYOUT), corpus_sha256, self.analyzer, str(self.num_shards), self.encoder or "")
        return f"{self.name}-{hashlib.sha256('/'.join(parts).encode()).hexdigest()[:12]}"

    def body(self) -> dict[str, Any]:
        """Settings and mappings of a new index, tuned for loading: no refresh, no replicas."""
        text = {"type": "text", "analyzer": self.analyzer}
        properties: dict[str, Any] = {CONTENTS: text, TITLE: text, TEXT: text}
        if self.encoder is not None:
            properties[VECTOR] = {
                "type": "dense_vector",
                "dims": self.num_dims,
                "index": True,
                # For rows of length 1 cosine ranks as a dot product does, and forgives the last bit of rounding.
                "similarity": "cosine" if self.similarity == "cosine" else "max_inner_product",
                # A byte for each number. Left unsaid, it depends on the version: since 9.1 long vectors get one bit.
                "index_options": {"type": "int8_hnsw"},
            }
        return {
            "settings": {
                "number_of_shards": self.num_shards,
                "number_of_replicas": 0,
                "refresh_interval": "-1",
                # These are the defaults, spelled out: a template of the cluster may have others.
                "similarity": {"default": {"type": "BM25", "k1": 1.2, "b": 0.75}},
            },
            "mappings": {
                "dynamic": False,
                # contents holds both title and text; vectors as JSON would be most of the disk.
                "_source": {"excludes": [TITLE, TEXT, VECTOR]},
                "properties": properties,
            },
        }


class CorpusIndex:
    """The index of one corpus while it is loaded, and the alias.

    Attributes:
        name: physical.
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

    async def ask(self, request: Callable[[], Awaitable[T]], what: str) -> T:
        """The answer to a request that may be sent again.

        Raises:
            RetrievalError: refused, or failing for longer than the limit.
        """
        try:
            return await self.client.ask(request, max_attempts=float("inf"), limit_s=self._retry_limit_s)
        except SearchError as failure:
            lasting = f"failing for {self._retry_limit_s:g} s: " if failure.is_retryable else ""
            raise self.error(f"{what}: {lasting}{failure}") from None

    def error(self, problem: str) -> RetrievalError:
        """An error that names cluster and index."""
        return RetrievalError(f"{self.client.addresses}: {self.name}: {problem}")

    async def begin(self, num_passages: int, *, is_restart: bool) -> Marker:
        """Create the index, or find out how far an earlier attempt has come.

        Raises:
            ConfigError: the alias is an index, an index of that name is not ours, or ``is_restart`` and it is complete.
            RetrievalError: the cluster failed.
        """
        alias = self._settings.name
        # Before hours of loading: can the alias be set?
        found = await self.ask(lambda: self._indices_or_404.get(index=alias), "cannot look up the alias")
        if found.meta.status == 200 and alias in found:
            problem = f"{alias!r} is an index, and is to become an alias"
            raise ConfigError("--index", problem, "choose another name, or delete it")
        exists = bool(await self.ask(lambda: self._indices.exists(index=self.name), "cannot look it up"))
        if exists and is_restart:
            if (await self._read_marker()).is_complete:
                raise ConfigError("--restart", f"{self.name} is complete", "leave the option out, or delete the index")
            await self.ask(lambda: self._indices.delete(index=self.name), "cannot delete it")
            exists = False
        if not exists:
            encoder = self._settings.encoder
            marker = Marker(corpus_sha256=self._corpus_sha256, encoder=encoder, num_passages=num_passages)
            body = self._settings.body()
            body["mappings"]["_meta"] = {META: marker.model_dump()}
            try:
                await self.ask(lambda: self._indices.create(index=self.name, **body), "cannot create it")
            except RetrievalError as error:
                # The answer to a first attempt was lost, or another process loads the same corpus: both can go on.
                if "resource_already_exists_exception" not in str(error):
                    raise
        return await self._read_marker()

    async def _read_marker(self) -> Marker:
        answer = await self.ask(lambda: self._indices.get_mapping(index=self.name), "cannot read its marker")
        meta = answer[self.name]["mappings"].get("_meta", {})
        try:
            return Marker.model_validate(meta.get(META))
        except ValidationError as error:
            problem = f"{self.name} was not made by this tool, or was deleted meanwhile"
            raise ConfigError("--index", problem, "delete it, start again") from error

    async def write_marker(self, marker: Marker) -> None:
        """Note how far it is loaded."""
        meta = {META: marker.model_dump()}
        await self.ask(lambda: self._indices.put_mapping(index=self.name, meta=meta), "cannot write its marker")

    async def open_for_searches(self, *, is_merged: bool) -> None:
        """Restore what loading had switched off, and make everything visible.

        Args:
            is_merged: into one segment: smaller, quicker, and minutes of work per ten million passages.
        """
        settings = {"index": {"refresh_interval": None, "number_of_replicas": self._settings.num_replicas}}
        await self.ask(lambda: self._indices.put_settings(index=self.name, settings=settings), "cannot restore it")
        if is_merged:
            merge = self.client.api.options(request_timeout=_MERGE_LIMIT_S).indices.forcemerge
            await self.ask(lambda: merge(index=self.name, max_num_segments=1), "cannot merge its segments")
        await self.ask(lambda: self._indices.refresh(index=self.name), "cannot refresh it")

    async def verify(self, num_expected: int, sample: dict[str, str]) -> None:
        """Count, and look up sampled passages.

        Args:
            num_expected: passages in the index.
            sample: id to contents.

        Raises:
            RetrievalError: something is missing, too much, or other than in the corpus.
        """
        api = self.client.api
        count = int((await self.ask(lambda: api.count(index=self.name), "cannot count"))["count"])
        if count != num_expected:
            raise self.error(f"holds {count:,} passages instead of {num_expected:,}; load it again with --restart")
        found: dict[str, Any] = {}
        if ids := list(sample):
            answer = await self.ask(
                lambda: api.mget(index=self.name, ids=ids, source_includes=[CONTENTS]), "cannot fetch a sample"
            )
            found = {doc["_id"]: doc.get("_source", {}).get(CONTENTS) for doc in answer["docs"] if doc.get("found")}
        for passage_id, contents in sample.items():
            if found.get(passage_id) != contents:
                problem = "is not what the corpus says" if passage_id in found else "is missing"
                raise self.error(f"passage {passage_id!r} {problem}; load the corpus again with --restart")

    async def publish(self, *, deletes_old: bool) -> tuple[str, ...]:
        """Point the alias to this index alone, in one atomic step.

        Returns:
            The indices that it pointed to before, deleted or kept.
        """
        alias = self._settings.name
        found = await self.ask(lambda: self._indices_or_404.get_alias(name=alias), "cannot read the alias")
        old = tuple(sorted(name for name in found if name != self.name)) if found.meta.status == 200 else ()
        actions: list[dict[str, Any]] = [{"add": {"index": self.name, "alias": alias}}]
        for name in old:
            actions.append(
                {"remove_index": {"index": name}} if deletes_old else {"remove": {"index": name, "alias": alias}}
            )
        await self.ask(lambda: self._indices.update_aliases(actions=actions), "cannot switch the alias")
        return old


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedIndex:
    """The one index behind the configured name.

    Attributes:
        name: of the index itself, not of an alias.
        fingerprint: cluster, index, settings and generation.
        num_passages: in it.
        version_warning: what is doubtful about the cluster's version; empty when nothing is.
    """

    name: str
    fingerprint: str
    num_passages: int
    version_warning: str


async def open_index(
    client: ElasticsearchClient, config: ElasticsearchConfig, encoder: TextEncoder | None
) -> OpenedIndex:
    """Check that there is one index behind the configured name, with passages and the fields that are searched.

    Raises:
        ConfigError: a setting is wrong.
        RetrievalError: the cluster is down.
    """
    indices = client.api.indices
    try:
        info = await client.ask(client.api.info)
        found = await client.ask(lambda: indices.get(index=config.index))
        if len(found) != 1:
            names = ", ".join(sorted(found)) or "no index"
            fix = "give a name that stands for one index"
            raise ConfigError(f"{SECTION}.index", f"{config.index} stands for {names}", fix)
        ((name, index),) = found.items()
        stats = (await client.ask(lambda: indices.stats(index=name, level="shards")))["indices"][name]
    except SearchError as failure:
        raise client.error_from(failure) from None
    # A cluster refuses a client that is newer by a major, and takes one that is older by one.
    version, version_warning = str(info["version"]["number"]), ""
    if version.split(".")[0] != str(CLIENT_MAJOR):
        version_warning = (
            f"{client.addresses} is of version {version}, the installed client is of {CLIENT_MAJOR}: it answers, but "
            "the majors should be the same"
        )
        _log.warning("%s", version_warning)
    settings, mappings = index["settings"]["index"], index["mappings"]
    _check_fields(config, mappings.get("properties", {}), encoder)
    if encoder is not None:
        _check_encoder(config, mappings.get("_meta", {}).get(META, {}), encoder)
    num_passages = int(stats["primaries"]["docs"]["count"])
    if num_passages == 0:
        raise ConfigError(f"{SECTION}.index", f"{name} holds no passages", "index the corpus first")
    # Sequence numbers, where the server gives them, move with every write.
    generation = sorted(
        (str(shard), copy["seq_no"]["max_seq_no"])
        for shard, copies in stats.get("shards", {}).items()
        for copy in copies
        if copy.get("routing", {}).get("primary") and "seq_no" in copy
    )
    fingerprint = (
        str(info.get("cluster_uuid")),
        settings["uuid"],
        _digest([[settings.get(each) for each in _RANKING], mappings]),
        str(num_passages),
        _digest(generation) if generation else "-",
    )
    return OpenedIndex(
        name=name, fingerprint="/".join(fingerprint), num_passages=num_passages, version_warning=version_warning
    )


def _check_fields(config: ElasticsearchConfig, properties: dict[str, Any], encoder: TextEncoder | None) -> None:
    needed: list[tuple[str, str, frozenset[str]]] = []  # setting, field, types
    if config.mode != "dense":
        names = [CONTENTS] if config.fields == "contents" else [TITLE, TEXT]
        needed += [("fields", name, _TEXT_TYPES) for name in names]
    if encoder is not None:
        needed.append(("mode", VECTOR, frozenset({"dense_vector"})))
    for setting, name, types in needed:
        found = properties.get(name, {}).get("type", "missing")
        if found not in types:
            wanted = "text" if "text" in types else "dense_vector"
            raise ConfigError(
                f"{SECTION}.{setting}",
                f"{getattr(config, setting)} needs field {name!r} of type {wanted}, which is {found} in {config.index}",
                "choose another, or index the corpus with that field",
            )
    if encoder is not None and properties[VECTOR].get("dims") != encoder.num_dims:
        raise ConfigError(
            f"{SECTION}.encoder",
            f"{config.encoder} makes vectors of {encoder.num_dims}, field {VECTOR!r} of {config.index} holds "
            f"{properties[VECTOR].get('dims')}",
            "use the encoder that the index was made with",
        )


def _check_encoder(config: ElasticsearchConfig, marker: dict[str, Any], encoder: TextEncoder) -> None:
    """Vectors of another encoder may have the same length, and are near to nothing that this one makes."""
    loaded_with = marker.get("encoder")
    if loaded_with is None and marker and encoder.has_own_settings:
        raise ConfigError(
            f"{SECTION}.encoder",
            f"{config.encoder} says how it pools and prompts, and {config.index} was loaded by a version of "
            "index_corpus that did not look",
            "load the corpus again with --encoder",
        )
    if loaded_with is not None and loaded_with != encoder.fingerprint:
        raise ConfigError(
            f"{SECTION}.encoder",
            f"{config.encoder} is {encoder.fingerprint}, and the vectors of {config.index} were made by {loaded_with}: "
            "other weights, or another pooling, prompt or length",
            "use the encoder that the index was made with, or load the corpus again with --encoder",
        )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
