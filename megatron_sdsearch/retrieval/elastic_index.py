"""What must be true of a cluster and its index before the first search: each failure is one message with its fix.

A wrong setting is a ConfigError; an engine that is down, or breaks on the way, is a RetrievalError.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from elastic_transport import TlsError, TransportError
from elasticsearch import ApiError, AsyncElasticsearch

from megatron_sdsearch.config import ElasticsearchConfig
from megatron_sdsearch.errors import ConfigError, RetrievalError
from megatron_sdsearch.retrieval.elastic_connection import (
    CLIENT_MAJOR,
    SECTION,
    Credentials,
    fault_of,
    is_other_product,
    is_wrong_version,
)
from megatron_sdsearch.retrieval.elastic_corpus import META
from megatron_sdsearch.retrieval.elastic_query import CONTENTS, TEXT, TITLE, VECTOR
from megatron_sdsearch.retrieval.encoder import TextEncoder

_log = logging.getLogger(__name__)

_TEXT_TYPES = frozenset({"text", "match_only_text", "search_as_you_type"})

_RANKING = ("analysis", "similarity", "number_of_shards")
"""Settings of an index that results depend on."""


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


class Inspection:
    """Asks a cluster about itself and its index.

    Args:
        client: of ``elastic_connection.connect``.
        config: the section.
        credentials: struck out of every message.
    """

    def __init__(self, client: AsyncElasticsearch, config: ElasticsearchConfig, credentials: Credentials) -> None:
        self._client = client
        self._config = config
        self._credentials = credentials
        self._place = ", ".join(config.urls)

    async def run(self, encoder: TextEncoder | None) -> OpenedIndex:
        """Reachable, of a fitting version, with one index that is not empty and has the fields that are asked.

        Raises:
            ConfigError: a setting is wrong.
            RetrievalError: the cluster is down.
        """
        info = await self.call(self._client.info)
        version_warning = self._version_warning(info)
        if version_warning:
            _log.warning("%s", version_warning)
        name, index = await self._one_index()
        self._check_fields(index["mappings"].get("properties", {}), encoder)
        self._check_encoder(index["mappings"].get("_meta", {}).get(META, {}), encoder)
        stats = (await self.call(lambda: self._client.indices.stats(index=name, level="shards")))["indices"][name]
        num_passages = int(stats["primaries"]["docs"]["count"])
        if num_passages == 0:
            raise ConfigError(f"{SECTION}.index", f"{name} holds no passages", "index the corpus first")
        parts = [
            str(info.get("cluster_uuid")),
            index["settings"]["index"]["uuid"],
            _digest([[index["settings"]["index"].get(name) for name in _RANKING], index["mappings"]]),
            f"{num_passages}",
            _generation(stats),
        ]
        return OpenedIndex(
            name=name, fingerprint="/".join(parts), num_passages=num_passages, version_warning=version_warning
        )

    async def call(self, ask: Callable[[], Awaitable[Any]]) -> Any:
        """One request, tried again while its fault is one that passes.

        Raises:
            ConfigError: the cluster refuses the client, or its credentials.
            RetrievalError: it did not answer.
            ApiError: it refused this request, with a status that is not retryable.
        """
        for attempt in range(1, self._config.max_attempts + 1):
            try:
                return await ask()
            except (ApiError, TransportError) as error:
                await self._raise_settings(error)
                fault = fault_of(error, self._credentials)
                if not fault.is_retryable and isinstance(error, ApiError):
                    raise
                cause = fault.cause
            if attempt < self._config.max_attempts:
                await asyncio.sleep(min(2.0, 0.1 * 2**attempt))
        raise RetrievalError(
            f"{self._place} (retrieval.elasticsearch.urls): no answer after {self._config.max_attempts} attempts: "
            f"{cause}; start the cluster, or give its address",
            num_attempts=self._config.max_attempts,
            cause=cause,
        )

    async def _raise_settings(self, error: ApiError | TransportError) -> None:
        """ConfigError when no repetition can help."""
        if isinstance(error, TlsError):
            raise ConfigError(
                f"{SECTION}.ca_file",
                f"TLS to {self._place} failed ({fault_of(error, self._credentials).cause})",
                "name the certificate of the authority that signed the cluster's, or check the URL's host",
            ) from None
        if not isinstance(error, ApiError):
            return
        if is_other_product(error):
            raise ConfigError(
                f"{SECTION}.urls", f"{self._place} is no Elasticsearch that this client knows", "check the URL"
            ) from None
        if is_wrong_version(error):
            raise await self._wrong_version() from None
        if error.status_code in (401, 403) and "license" not in str(error.body):
            cause = fault_of(error, self._credentials).cause
            raise ConfigError(
                f"{SECTION}.api_key",
                f"{self._place} refuses {self._credentials.kind} ({cause})",
                "set api_key, or username and password, of a user that may read and monitor the index",
            ) from None

    async def _wrong_version(self) -> ConfigError:
        try:
            # Below the client, which would write its major into the header again.
            headers = {"accept": "application/json", **self._credentials.headers}
            plain = await self._client.transport.perform_request("GET", "/", headers=headers)
            version = str(plain.body["version"]["number"])
        except (ApiError, TransportError, KeyError, TypeError):
            version = "unknown"
        major = version.split(".")[0]
        wanted = f">={major},<{int(major) + 1}" if major.isdigit() else "=="
        return ConfigError(
            f"{SECTION}.urls",
            f"{self._place} is of version {version} and refuses the installed client, which is of {CLIENT_MAJOR}",
            f"install the client of the cluster's major: pip install 'elasticsearch[async]{wanted}'",
        )

    def _version_warning(self, info: Any) -> str:
        """A cluster refuses a client that is newer by a major, and takes one that is older by one."""
        version = str(info["version"]["number"])
        if version.split(".")[0] == str(CLIENT_MAJOR):
            return ""
        return (
            f"{self._place} is of version {version}, the installed client is of {CLIENT_MAJOR}: it answers, but the "
            "majors should be the same"
        )

    async def _one_index(self) -> tuple[str, Any]:
        wanted = self._config.index
        try:
            found = dict(await self.call(lambda: self._client.indices.get(index=wanted)))
        except ApiError as error:
            cause = fault_of(error, self._credentials).cause
            raise ConfigError(
                f"{SECTION}.index", f"{wanted} is not there ({cause})", "give the name of an index, or create it"
            ) from None
        if len(found) != 1:
            names = ", ".join(sorted(found)) or "no index"
            raise ConfigError(
                f"{SECTION}.index", f"{wanted} stands for {names}", "give a name that stands for one index"
            )
        return next(iter(found.items()))

    def _check_fields(self, properties: dict[str, Any], encoder: TextEncoder | None) -> None:
        needed = []
        if self._config.mode != "dense":
            needed = [CONTENTS] if self._config.fields == "contents" else [TITLE, TEXT]
        for name in needed:
            if properties.get(name, {}).get("type") not in _TEXT_TYPES:
                raise self._no_field("fields", name, properties, "text")
        if self._config.mode == "bm25":
            return
        vector = properties.get(VECTOR, {})
        if vector.get("type") != "dense_vector":
            raise self._no_field("mode", VECTOR, properties, "dense_vector")
        num_dims = encoder.num_dims if encoder is not None else None
        if vector.get("dims") != num_dims:
            raise ConfigError(
                f"{SECTION}.encoder",
                f"{self._config.encoder} makes vectors of {num_dims}, field {VECTOR!r} of {self._config.index} holds "
                f"{vector.get('dims')}",
                "use the encoder that the index was made with",
            )

    def _check_encoder(self, marker: dict[str, Any], encoder: TextEncoder | None) -> None:
        """Vectors of another encoder may have the same length, and are near to nothing that this one makes."""
        loaded_with = marker.get("encoder")
        if self._config.mode == "bm25" or encoder is None or loaded_with == encoder.fingerprint:
            return
        if loaded_with is None:
            if marker and encoder.has_own_settings:
                raise ConfigError(
                    f"{SECTION}.encoder",
                    f"{self._config.encoder} says how it pools and prompts, and {self._config.index} was loaded by a "
                    "version of index_corpus that did not look",
                    "load the corpus again with --encoder",
                )
            return
        raise ConfigError(
            f"{SECTION}.encoder",
            f"{self._config.encoder} is {encoder.fingerprint}, and the vectors of {self._config.index} were made by "
            f"{loaded_with}: other weights, or another pooling, prompt or length",
            "use the encoder that the index was made with, or load the corpus again with --encoder",
        )

    def _no_field(self, setting: str, name: str, properties: dict[str, Any], wanted: str) -> ConfigError:
        kind = properties.get(name, {}).get("type", "missing")
        return ConfigError(
            f"{SECTION}.{setting}",
            f"{getattr(self._config, setting)} needs field {name!r} of type {wanted}, which is {kind} in "
            f"{self._config.index}",
            "choose another, or index the corpus with that field",
        )


def _generation(stats: Any) -> str:
    """Moves with every write: the primaries' sequence numbers, where the server tells them."""
    numbers = [
        (str(shard), copy["seq_no"]["max_seq_no"])
        for shard, copies in stats.get("shards", {}).items()
        for copy in copies
        if copy.get("routing", {}).get("primary") and "seq_no" in copy
    ]
    return _digest(sorted(numbers)) if numbers else "-"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
