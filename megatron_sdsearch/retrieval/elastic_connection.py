"""The official client as this project uses it: addresses, credentials, TLS, and what its errors mean.

Owns secrets: they come from the settings or the environment, go into the client, and are struck out of every text that
comes back.
"""

from __future__ import annotations

import logging
import os
import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from elastic_transport import ConnectionTimeout, SerializationError, TlsError, TransportError
from elasticsearch import ApiError, AsyncElasticsearch, UnsupportedProductError
from elasticsearch import __version__ as _client_version

from megatron_sdsearch.config import ElasticsearchConfig, shown_url
from megatron_sdsearch.errors import ConfigError
from megatron_sdsearch.retrieval.batching import Fault
from megatron_sdsearch.retrieval.secrets import basic_token, shorten, strike_out

SECTION = "retrieval.elasticsearch"
CLIENT_MAJOR = int(_client_version[0])
_OVERLOADED = frozenset({429, 503})
_RETRYABLE = frozenset({408, 429, 502, 503, 504})


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """One way to authenticate, or none. Its repr names the way alone.

    Attributes:
        api_key: as Elasticsearch gave it, base64.
        basic: username and password.
    """

    api_key: str | None = field(default=None, repr=False)
    basic: tuple[str, str] | None = field(default=None, repr=False)

    @classmethod
    def of(cls, config: ElasticsearchConfig, environment: Mapping[str, str] = os.environ) -> Credentials:
        """What the settings say; else the environment; an API key before a name and password.

        Raises:
            ConfigError: a name without a password, or the reverse, or a key that is none.
        """
        api_key, basic = cls._choose(config, environment)
        if api_key is not None and not re.fullmatch(r"[!-~]+", api_key):
            problem = "holds white space, or a character that is none of base64"  # no header takes a line's end
            raise ConfigError(f"{SECTION}.api_key", problem, 'give "encoded" of Elasticsearch\'s answer, and no more')
        return cls(api_key=api_key, basic=basic)

    @staticmethod
    def _choose(
        config: ElasticsearchConfig, environment: Mapping[str, str]
    ) -> tuple[str | None, tuple[str, str] | None]:
        """Key, or name and password, or neither."""
        if config.api_key is not None:
            return config.api_key.get_secret_value(), None
        is_set = config.username is not None or config.password is not None
        if not is_set and environment.get("ELASTICSEARCH_API_KEY"):
            return environment["ELASTICSEARCH_API_KEY"], None
        username = config.username or environment.get("ELASTICSEARCH_USERNAME")
        password = config.password.get_secret_value() if config.password else environment.get("ELASTICSEARCH_PASSWORD")
        if bool(username) != bool(password):
            known, lacking = ("username", "password") if username else ("password", "username")
            raise ConfigError(
                f"{SECTION}.{lacking}", f"missing, and {known} is set", f"set it or ELASTICSEARCH_{lacking.upper()}"
            )
        return None, (username, password) if username and password else None

    @property
    def kind(self) -> str:
        """For messages."""
        return "an API key" if self.api_key else "a username and password" if self.basic else "no credentials"

    @property
    def headers(self) -> dict[str, str]:
        """For a request beside the client."""
        if self.api_key:
            return {"authorization": f"ApiKey {self.api_key}"}
        return {"authorization": f"Basic {basic_token(*self.basic)}"} if self.basic else {}

    def strike_out(self, text: str) -> str:
        """``text`` without any secret, in whatever form it may have been echoed."""
        secrets = [self.api_key] if self.api_key else []
        if self.basic:
            secrets += [self.basic[1], basic_token(*self.basic)]
        return strike_out(text, secrets)


def connect(config: ElasticsearchConfig, credentials: Credentials) -> AsyncElasticsearch:
    """A client that neither retries nor sniffs: ``batching.py`` retries, and knows better when. Opens no connection.

    Raises:
        ConfigError: an address, or the certificate file, is wrong.
    """
    is_tls = [_check_url(url) == "https" for url in config.urls]
    if not is_tls:
        raise ConfigError(f"{SECTION}.urls", "empty", "name at least one node, e.g. http://127.0.0.1:9200")
    # On DEBUG the client logs whole answers, and a proxy in between may echo the header that it refuses.
    logging.getLogger("elastic_transport.node").setLevel(logging.INFO)
    # It warns of every failure of a node; ours are counted, and end in one error that names the cause.
    logging.getLogger("elastic_transport.node_pool").setLevel(logging.ERROR)
    tls: dict[str, Any] = {}
    if config.ca_file is not None:
        if not all(is_tls):
            raise ConfigError(f"{SECTION}.ca_file", "set, and a URL is http", "use https URLs or unset it")
        if not config.ca_file.is_file():
            raise ConfigError(f"{SECTION}.ca_file", f"{config.ca_file} does not exist", "give a path that exists")
        tls["ca_certs"] = str(config.ca_file)
    try:
        return AsyncElasticsearch(
            list(config.urls),
            api_key=credentials.api_key,
            basic_auth=credentials.basic,
            request_timeout=config.timeout_s,
            connections_per_node=config.max_requests,
            max_retries=0,
            retry_on_timeout=False,
            **tls,
        )
    except ssl.SSLError as error:
        raise ConfigError(
            f"{SECTION}.ca_file", f"{config.ca_file} holds no certificate ({error.reason})", "give a PEM file"
        ) from error


def _check_url(url: str) -> str:
    """The scheme."""
    try:
        parts = urlsplit(url)
        is_whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port is not None
    except ValueError:  # a port that is no number
        is_whole = False
    if not is_whole:
        fix = "give scheme, host and port: http://host:9200"
        raise ConfigError(f"{SECTION}.urls", f"{shown_url(url)!r} is not whole", fix)
    return parts.scheme


def fault_of(error: TransportError | ApiError, credentials: Credentials) -> Fault:
    """What a failed request means for its queries."""
    if isinstance(error, ApiError):
        return fault_of_status(
            error.status_code, error.body, credentials, retry_after=error.meta.headers.get("retry-after")
        )
    words = shorten(credentials.strike_out(str(error.message))) or type(error).__name__
    if isinstance(error, ConnectionTimeout):
        return Fault(cause=f"no answer in time: {words}", is_retryable=True, is_overload=True)
    if isinstance(error, SerializationError):
        return Fault(cause=f"answer is no JSON: {words}", is_retryable=True)
    kind = "TLS failed" if isinstance(error, TlsError) else "no connection"
    return Fault(cause=f"{kind}: {words}", is_retryable=True)


def fault_of_status(status: int, body: Any, credentials: Credentials, *, retry_after: str | None = None) -> Fault:
    """What a status that is not success means; ``body`` is Elasticsearch's error object, or whatever came instead."""
    cause = f"HTTP {status}: {reason_of(body, credentials)}"
    if is_too_many_clauses(body):
        cause += "; raise the cluster's indices.query.bool.max_clause_count"
    wait = float(retry_after) if retry_after and re.fullmatch(r"\d+(\.\d+)?", retry_after) else None
    return Fault(cause=cause, is_retryable=status in _RETRYABLE, is_overload=status in _OVERLOADED, retry_after_s=wait)


def reason_of(body: Any, credentials: Credentials) -> str:
    """``type: reason`` of the innermost known cause, shortened and without secrets."""
    error = body.get("error", body) if isinstance(body, Mapping) else body
    if not isinstance(error, Mapping):
        return shorten(credentials.strike_out(str(error))) or "no reason given"
    causes = error.get("root_cause") or [error]
    inner = causes[0] if isinstance(causes[0], Mapping) else error
    deepest = inner
    while isinstance(deepest.get("caused_by"), Mapping):
        deepest = deepest["caused_by"]
    words = f"{inner.get('type', 'error')}: {inner.get('reason', 'no reason given')}"
    if deepest is not inner:
        words += f" ({deepest.get('reason')})"
    return shorten(credentials.strike_out(words))


def is_too_many_clauses(body: Any) -> bool:
    """Whether the cluster found the query to have too many terms."""
    words = str(body)
    return "too_many_clauses" in words or "too_many_nested_clauses" in words or "maxClauseCount" in words


def is_wrong_version(error: ApiError) -> bool:
    """Whether the cluster refused the client's major version: it does so by the media type of the first request."""
    return error.status_code in (400, 406, 415) and (
        "media_type_header_exception" in str(error.body) or "compatible-with" in str(error.body)
    )


def is_other_product(error: ApiError) -> bool:
    """Whether the answer came from something that is not Elasticsearch."""
    return isinstance(error, UnsupportedProductError)
