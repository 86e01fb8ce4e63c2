"""Wrapper of the official client: addresses, credentials, TLS, retries and error messages.

Secrets come from the settings or the environment, and are masked in every message.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from elastic_transport import ConnectionTimeout, SerializationError, TlsError, TransportError
from elastic_transport.client_utils import DEFAULT
from elasticsearch import ApiError, AsyncElasticsearch, UnsupportedProductError
from elasticsearch import __version__ as _client_version

from megatron_sdsearch.config import ElasticsearchConfig, shown_url
from megatron_sdsearch.errors import ConfigError, RetrievalError, cause_of
from megatron_sdsearch.retrieval.batched import SearchError, parse_retry_after, retry
from megatron_sdsearch.retrieval.credentials import Credentials

T = TypeVar("T")

SECTION = "retrieval.elasticsearch"
CLIENT_MAJOR = int(_client_version[0])
_RETRYABLE = frozenset({408, 429, 502, 503, 504})


class ElasticsearchClient:
    """A client with its own retries: ``elastic_transport`` retries without a delay, which does not survive an outage.

    Opens no connection until the first request.

    Args:
        config: addresses and certificate; ``max_attempts`` of ``send``.
        credentials: from ``read_credentials``.

    Attributes:
        api: the official client, for requests in ``send`` and ``send_once``.
        credentials: masked in every message.
        addresses: of the nodes, for messages.

    Raises:
        ConfigError: an address or the certificate file is invalid.
    """

    def __init__(self, config: ElasticsearchConfig, credentials: Credentials) -> None:
        self.credentials = credentials
        self.addresses = ", ".join(config.urls)
        self._max_attempts = config.max_attempts
        # At DEBUG the client logs whole responses, in which a proxy may echo the header that it rejects.
        logging.getLogger("elastic_transport.node").setLevel(logging.INFO)
        # It logs a warning for every failed node; failures are counted here, and end in one error with the cause.
        logging.getLogger("elastic_transport.node_pool").setLevel(logging.ERROR)
        for url in config.urls:
            if not re.fullmatch(r"https?://[^/?#]+:\d+(/.*)?", url):
                problem = f"{shown_url(url)!r} is not a full URL"
                raise ConfigError(f"{SECTION}.urls", problem, "give scheme, host and port: http://host:9200")
        try:
            self.api = AsyncElasticsearch(
                list(config.urls),
                api_key=credentials.api_key,
                basic_auth=credentials.basic,
                request_timeout=config.timeout_s,
                connections_per_node=config.max_requests,
                max_retries=0,
                retry_on_timeout=False,
                ca_certs=DEFAULT if config.ca_file is None else str(config.ca_file),
            )
        except (ValueError, OSError) as error:
            if not config.urls or config.ca_file is None:
                fix = "name at least one node, e.g. http://127.0.0.1:9200"
                raise ConfigError(f"{SECTION}.urls", f"refused by the client ({cause_of(error)})", fix) from error
            problem = f"{config.ca_file} holds no certificate for these URLs ({cause_of(error)})"
            raise ConfigError(f"{SECTION}.ca_file", problem, "give a PEM file, and https URLs") from error

    async def send_once(self, request: Callable[[], Awaitable[T]]) -> T:
        """Send a request and return the response.

        Raises:
            SearchError: it failed.
        """
        try:
            return await request()
        except (ApiError, TransportError) as error:
            failure = self._failure_from(error)
        raise failure  # not chained: the client's own error may hold the header with the secret

    async def send(self, request: Callable[[], Awaitable[T]]) -> T:
        """Send a request, with at most ``max_attempts``, and return the response.

        Raises:
            SearchError: the last failure.
        """
        return await retry(lambda: self.send_once(request), max_attempts=self._max_attempts)

    def error_from(self, failure: SearchError) -> ConfigError | RetrievalError:
        """Convert a failure of the checks before the first search to an error."""
        if failure.setting:
            problem = failure.cause if failure.setting == "index" else f"{self.addresses}: {failure.cause}"
            return ConfigError(f"{SECTION}.{failure.setting}", problem, failure.fix)
        times = f"no answer after {self._max_attempts} attempts: " if failure.is_retryable else ""
        return RetrievalError(
            f"{self.addresses} ({SECTION}.urls): {times}{failure}; start the cluster, or give its address",
            num_attempts=self._max_attempts,
            cause=failure.cause,
        )

    def failure_from_status(self, status: int, body: Any, retry_after: str | None = None) -> SearchError:
        """Convert an error status, with Elasticsearch's error object or any other body."""
        text = str(body)
        cause = f"HTTP {status}: {self.reason_of(body)}"
        if "too_many_clauses" in text or "too_many_nested_clauses" in text or "maxClauseCount" in text:
            cause += "; raise the cluster's indices.query.bool.max_clause_count"
        setting = fix = ""
        if status in (400, 406, 415) and ("media_type_header_exception" in text or "compatible-with" in text):
            # A cluster rejects another major version of the client by the media type of the first request.
            cause = f"the cluster refuses the installed client, version {CLIENT_MAJOR} ({cause})"
            older = f"pip install 'elasticsearch[async]=={CLIENT_MAJOR - 1}.*'"
            setting, fix = "urls", f"install the client of the cluster's major version: {older}"
        elif status in (401, 403) and "license" not in text:
            cause = f"the cluster refuses {self.credentials.name} ({cause})"
            setting = "api_key"
            fix = (
                "set api_key, or username and password, of a user that may read and monitor the index, or "
                "ELASTICSEARCH_API_KEY, or ELASTICSEARCH_USERNAME and ELASTICSEARCH_PASSWORD"
            )
        elif status == 404 and "index_not_found" in text:
            cause = f"the index does not exist ({cause})"
            setting, fix = "index", "give the name of an index, or create it"
        elif status == 413:
            fix = "send less in one request: lower batch_queries, or --chunk of index_corpus"
        wait = parse_retry_after(retry_after)
        return SearchError(cause, is_retryable=status in _RETRYABLE, retry_after_s=wait, setting=setting, fix=fix)

    def reason_of(self, body: Any) -> str:
        """Return ``type: reason`` of the innermost known cause, shortened and without secrets."""
        error = body.get("error", body) if isinstance(body, Mapping) else body
        if not isinstance(error, Mapping):
            return self.credentials.clean(str(error)) or "no reason given"
        causes = error.get("root_cause") or [error]
        inner = causes[0] if isinstance(causes[0], Mapping) else error
        deepest = inner
        while isinstance(deepest.get("caused_by"), Mapping):
            deepest = deepest["caused_by"]
        reason = f"{inner.get('type', 'error')}: {inner.get('reason', 'no reason given')}"
        return self.credentials.clean(reason if deepest is inner else f"{reason} ({deepest.get('reason')})")

    def _failure_from(self, error: ApiError | TransportError) -> SearchError:
        if isinstance(error, UnsupportedProductError):
            cause = "the server is not an Elasticsearch that this client supports"
            return SearchError(cause, is_retryable=False, setting="urls", fix="check the URL")
        if isinstance(error, ApiError):
            return self.failure_from_status(error.status_code, error.body, error.meta.headers.get("retry-after"))
        text = self.credentials.clean(str(error.message)) or type(error).__name__
        if isinstance(error, TlsError):
            fix = "give the CA certificate that signed the cluster's, or check the URL's host"
            return SearchError(f"TLS failed: {text}", is_retryable=True, setting="ca_file", fix=fix)
        problems: dict[type, str] = {ConnectionTimeout: "no answer in time", SerializationError: "answer is not JSON"}
        problem = problems.get(type(error), "no connection")
        return SearchError(f"{problem}: {text}", is_retryable=True)


def read_credentials(config: ElasticsearchConfig, environment: Mapping[str, str] = os.environ) -> Credentials:
    """Read credentials from the settings, else from the environment; an API key before a username and password.

    Raises:
        ConfigError: a username without a password, or the reverse, or an API key with invalid characters.
    """
    has_name = config.username is not None or config.password is not None
    api_key = None if has_name else environment.get("ELASTICSEARCH_API_KEY") or None
    if config.api_key is not None:
        api_key = config.api_key.get_secret_value()
    if api_key is not None:
        if not re.fullmatch(r"[!-~]+", api_key):
            problem = "holds white space, or a character that is not base64"
            raise ConfigError(f"{SECTION}.api_key", problem, 'give only "encoded" of Elasticsearch\'s answer')
        return Credentials(api_key=api_key)
    username = config.username or environment.get("ELASTICSEARCH_USERNAME")
    password = config.password.get_secret_value() if config.password else environment.get("ELASTICSEARCH_PASSWORD")
    if bool(username) != bool(password):
        known, lacking = ("username", "password") if username else ("password", "username")
        fix = f"set it or ELASTICSEARCH_{lacking.upper()}"
        raise ConfigError(f"{SECTION}.{lacking}", f"missing, and {known} is set", fix)
    return Credentials(basic=(username, password) if username and password else None)
