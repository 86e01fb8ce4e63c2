"""Credentials for a search engine, and how they are kept out of messages."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from urllib.parse import quote

_MAX_CHARACTERS = 400
"""Messages quote at most this much of a server's answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """An API key, a username and password, or neither. The repr holds no secret.

    Attributes:
        api_key: Elasticsearch's, in base64.
        basic: username and password.
    """

    api_key: str | None = field(default=None, repr=False)
    basic: tuple[str, str] | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """The description used in messages."""
        return "an API key" if self.api_key else "a username and password" if self.basic else "no credentials"

    @property
    def basic_token(self) -> str:
        """The token of HTTP basic authentication; empty without a username."""
        return base64.b64encode(":".join(self.basic).encode()).decode() if self.basic else ""

    def clean(self, text: str) -> str:
        """Return ``text`` as one line without secrets. A long text keeps both ends: the reason may come last.

        A server or proxy may echo the header that it rejects. Secrets are replaced in plain, Python- or JSON-quoted and
        URL-quoted form, before white space is folded and the text is cut, since either could leave part of a secret.
        """
        secrets = (self.api_key or "", self.basic[1] if self.basic else "", self.basic_token)
        forms = {form for secret in secrets for form in (secret, repr(secret)[1:-1], quote(secret, safe=""))}
        for form in sorted(forms - {""}, key=len, reverse=True):
            text = text.replace(form, "***")
        text = " ".join(text.split())
        half = _MAX_CHARACTERS // 2
        return text if len(text) <= _MAX_CHARACTERS else f"{text[:half]} ... {text[-half:]}"
