"""One physical Elasticsearch index of a corpus: its name, mapping and marker, its verification, and the alias.

Owns everything about an index but the passages on their way into it (``bulk_index.py``). The index's name is derived
from what it holds, and how far it has been loaded stands in its own mapping: whoever starts the same job again, on
whatever machine, finds both. The alias only ever points to an index that was loaded whole and verified.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import re
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from elastic_transport import TransportError
from elasticsearch import ApiError, AsyncElasticsearch
from pydantic import BaseModel, ConfigDict, ValidationError

from megatron_sdsearch.errors import ConfigError, RetrievalError
from megatron_sdsearch.retrieval.batching import Fault
from megatron_sdsearch.retrieval.elastic_connection import (
    Credentials,
    fault_of,
    fault_of_status,
    is_other_product,
    is_wrong_version,
)
from megatron_sdsearch.retrieval.encoder_folder import Similarity

T = TypeVar("T")

_LAYOUT = 1
"""Raise it when the meaning of an index changes: a corpus is then loaded into a new one."""

META = "megatron_sdsearch"
"""Under ``_meta`` of a mapping: where an index of this tool keeps its ``Marker``."""
_MIN_BACKOFF_S, _MAX_BACKOFF_S = 0.25, 15.0
_MGET = 100  # ids of one request


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexSettings:
    """What the index is to be.

    Attributes:
        name: the alias; the index itself is ``name-<hash of what it holds>``.
        analyzer: of ``contents``, ``title`` and ``text``.
        num_shards: BM25's document frequencies are counted per shard, so only one shard gives the scores of one whole
            corpus (those of tantivy, of Lucene, of the paper). More are quicker over tens of millions of passages;
            ``retrieval.elasticsearch.dfs`` then makes up for the scores, at the price of another round trip.
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
        is_good = re.fullmatch(r"[^-_+.A-Z\\/*?\"<>| ,#:][^A-Z\\/*?\"<>| ,#:]{0,199}", self.name)
        if not is_good:
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
        properties: dict[str, Any] = {"contents": text, "title": text, "text": text}
        if self.encoder is not None:
            properties["vector"] = {
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
                # These are the defaults, said aloud: a template of the cluster may have others.
                "similarity": {"default": {"type": "BM25", "k1": 1.2, "b": 0.75}},
            },
            "mappings": {
                "dynamic": False,
                # contents holds both title and text; vectors as JSON would be most of the disk.
                "_source": {"excludes": ["title", "text", "vector"]},
                "properties": properties,
            },
        }


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


class Cluster:
    """The client, patient: what may pass is tried again, everything else becomes a RetrievalError.

    Args:
        client: does not retry by itself.
        credentials: are struck out of every message.
        url: names the cluster in errors.
        patience_s: a request that fails for so long has failed.
    """

    def __init__(
        self, client: AsyncElasticsearch, credentials: Credentials, *, url: str, patience_s: float = 120.0
    ) -> None:
        self.client = client
        self._credentials = credentials
        self._url = url
        self._patience_s = patience_s

    async def check(self) -> None:
        """One look before anything long: a wrong address is not waited for.

        Raises:
            RetrievalError: nobody answers there, or refuses to.
        """
        answer = await self.try_once(self.client.info)
        if isinstance(answer, Fault):
            fix = "see that the cluster runs and --url is its address (http or https)"
            if "401" in answer.cause or "403" in answer.cause:
                fix = "set ELASTICSEARCH_API_KEY, or ELASTICSEARCH_USERNAME and ELASTICSEARCH_PASSWORD"
            raise self.failed("first contact", f"{answer.cause}; {fix}")

    async def ask(self, request: Callable[[], Awaitable[T]], what: str) -> T:
        """The answer to a request that may be sent again.

        Raises:
            RetrievalError: refused, or failing for longer than ``patience_s``.
        """
        patience = self.new_patience()
        while True:
            answer = await self.try_once(request)
            if not isinstance(answer, Fault):
                return answer
            await patience.wait(answer, what)

    async def try_once(self, request: Callable[[], Awaitable[T]]) -> T | Fault:
        """The answer, or why there is none.

        Raises:
            RetrievalError: the server speaks another version, or is none of Elasticsearch.
        """
        try:
            return await request()
        except ApiError as error:
            fault = fault_of(error, self._credentials)
            if is_wrong_version(error) or is_other_product(error):
                fix = "install the client of the cluster's major version: pip install 'elasticsearch[async]==8.*'"
                raise RetrievalError(f"{self._url}: {fault.cause}; {fix}") from error
            return fault
        except TransportError as error:
            return fault_of(error, self._credentials)

    def fault_of_item(self, status: int, result: Any) -> Fault:
        """What the answer to one document of a bulk request means."""
        return fault_of_status(status, result, self._credentials)

    def new_patience(self) -> Patience:
        """For one request."""
        return Patience(self._url, self._patience_s)

    def failed(self, what: str, cause: str) -> RetrievalError:
        """An error that names the cluster."""
        return RetrievalError(f"{self._url}: {what}: {cause}")


class Patience:
    """Waits between two attempts, ever longer, and ends it when it has taken too long."""

    def __init__(self, url: str, patience_s: float) -> None:
        self._url = url
        self._patience_s = patience_s
        self._ends_at = asyncio.get_running_loop().time() + patience_s
        self._wait_s = _MIN_BACKOFF_S

    async def wait(self, fault: Fault, what: str) -> None:
        """Sleep until the next attempt.

        Raises:
            RetrievalError: there is none: the fault is final, or time is up.
        """
        if not fault.is_retryable:
            raise RetrievalError(f"{self._url}: {what}: {fault.cause}")
        if asyncio.get_running_loop().time() > self._ends_at:
            raise RetrievalError(f"{self._url}: {what}: failing for {self._patience_s:g} s: {fault.cause}")
        wait_s = max(self._wait_s * random.uniform(0.5, 1.0), min(fault.retry_after_s or 0.0, _MAX_BACKOFF_S))
        self._wait_s = min(2 * self._wait_s, _MAX_BACKOFF_S)
        await asyncio.sleep(wait_s)


class ElasticIndex:
    """The index of one corpus.

    Attributes:
        name: physical.
    """

    def __init__(self, cluster: Cluster, settings: IndexSettings, corpus_sha256: str) -> None:
        self.cluster = cluster
        self.name = settings.physical_name(corpus_sha256)
        self._settings = settings
        self._corpus_sha256 = corpus_sha256
        self._indices = cluster.client.indices

    async def check_alias(self) -> None:
        """Find out before hours of loading whether the alias can be set.

        Raises:
            ConfigError: the name is that of an index.
        """
        alias = self._settings.name
        found = await self._ask(lambda: self._indices.get(index=alias), "cannot look it up", if_missing={})
        if alias in found:
            raise ConfigError(
                "--index", f"{alias!r} is an index, and is to become an alias", "choose another name, or delete it"
            )

    async def begin(self, num_passages: int, *, is_restart: bool = False) -> Marker:
        """Create the index, or find out how far an earlier attempt has come.

        Raises:
            ConfigError: an index of that name is not ours, or ``is_restart`` and it is complete.
            RetrievalError: the cluster failed.
        """
        exists = bool(await self._ask(lambda: self._indices.exists(index=self.name), "cannot look it up"))
        if exists and is_restart:
            if (await self.read_marker()).is_complete:
                raise ConfigError("--restart", f"{self.name} is complete", "leave the option out, or delete the index")
            await self._ask(lambda: self._indices.delete(index=self.name), "cannot delete it")
            exists = False
        if exists:
            return await self.read_marker()
        encoder = self._settings.encoder
        marker = Marker(corpus_sha256=self._corpus_sha256, encoder=encoder, num_passages=num_passages)
        await self._create(marker)
        return await self.read_marker()

    async def read_marker(self) -> Marker:
        """What the index says of itself.

        Raises:
            ConfigError: it is not ours.
        """
        answer = await self._ask(lambda: self._indices.get_mapping(index=self.name), "cannot read its marker")
        meta = answer[self.name]["mappings"].get("_meta", {})
        try:
            marker = Marker.model_validate(meta.get(META))
        except ValidationError as error:
            raise ConfigError(
                "--index", f"{self.name} was not made by this tool, or was deleted meanwhile", "delete it, start again"
            ) from error
        return marker

    async def write_marker(self, marker: Marker) -> None:
        """Say how far it is loaded."""
        meta = {META: marker.model_dump()}
        await self._ask(lambda: self._indices.put_mapping(index=self.name, meta=meta), "cannot write its marker")

    async def open_for_searches(self, *, is_merged: bool = False) -> None:
        """Restore what loading had switched off, and make everything visible.

        Args:
            is_merged: into one segment: smaller, quicker, and minutes of work per ten million passages.
        """
        settings = {"index": {"refresh_interval": None, "number_of_replicas": self._settings.num_replicas}}
        await self._ask(lambda: self._indices.put_settings(index=self.name, settings=settings), "cannot restore it")
        if is_merged:
            patient = self.cluster.client.options(request_timeout=6 * 3600.0)
            await self._ask(
                lambda: patient.indices.forcemerge(index=self.name, max_num_segments=1), "cannot merge its segments"
            )
        await self._ask(lambda: self._indices.refresh(index=self.name), "cannot refresh it")

    async def verify(self, num_expected: int, sample: Mapping[str, str], rejected: Collection[str]) -> None:
        """Count, and look up sampled passages.

        Args:
            num_expected: passages in the index.
            sample: id to contents.
            rejected: ids that may be missing.

        Raises:
            RetrievalError: something is missing, too much, or other than in the corpus.
        """
        count = int((await self._ask(lambda: self.cluster.client.count(index=self.name), "cannot count"))["count"])
        if count != num_expected:
            raise self.cluster.failed(
                self.name, f"holds {count:,} passages instead of {num_expected:,}; load it again with --restart"
            )
        ids = [passage_id for passage_id in sample if passage_id not in rejected]
        for start in range(0, len(ids), _MGET):
            await self._verify_some(ids[start : start + _MGET], sample)

    async def publish(self, *, deletes_old: bool) -> tuple[str, ...]:
        """Point the alias to this index alone, in one atomic step.

        Returns:
            The indices that it pointed to before, deleted or kept.
        """
        alias = self._settings.name
        found = await self._ask(lambda: self._indices.get_alias(name=alias), "cannot read the alias", if_missing={})
        old = tuple(sorted(name for name in found if name != self.name))
        actions: list[dict[str, Any]] = [{"add": {"index": self.name, "alias": alias}}]
        verb = "remove_index" if deletes_old else "remove"
        for name in old:
            actions.append({verb: {"index": name} if deletes_old else {"index": name, "alias": alias}})
        await self._ask(lambda: self._indices.update_aliases(actions=actions), "cannot switch the alias")
        return old

    async def _create(self, marker: Marker) -> None:
        body = self._settings.body()
        mappings = {**body["mappings"], "_meta": {META: marker.model_dump()}}
        await self._ask(
            lambda: self._indices.create(index=self.name, settings=body["settings"], mappings=mappings),
            "cannot create it",
            # The answer to a first attempt was lost, or somebody else loads the same corpus: both can go on together.
            if_refused_with="resource_already_exists_exception",
        )

    async def _verify_some(self, ids: Sequence[str], sample: Mapping[str, str]) -> None:
        client = self.cluster.client
        answer = await self._ask(
            lambda: client.mget(index=self.name, ids=ids, source_includes=["contents"]), "cannot fetch a sample"
        )
        found = {doc["_id"]: doc.get("_source", {}).get("contents") for doc in answer["docs"] if doc.get("found")}
        for passage_id in ids:
            if found.get(passage_id) != sample[passage_id]:
                problem = "is not what the corpus says" if passage_id in found else "is missing"
                raise self.cluster.failed(
                    self.name, f"passage {passage_id!r} {problem}; load the corpus again with --restart"
                )

    async def _ask(
        self,
        request: Callable[[], Awaitable[Any]],
        what: str,
        *,
        if_missing: Any = None,
        if_refused_with: str | None = None,
    ) -> Any:
        async def tolerant() -> Any:
            try:
                return await request()
            except ApiError as error:
                if if_missing is not None and error.status_code == 404:
                    return if_missing
                if if_refused_with is not None and if_refused_with in str(error.body):
                    return None
                raise

        return await self.cluster.ask(tolerant, f"{self.name}: {what}")
