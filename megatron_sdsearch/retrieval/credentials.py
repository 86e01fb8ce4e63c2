"""Secrets of a search engine, and texts without them."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from urllib.parse import quote

_MAX_CHARACTERS = 400
"""The longest part of a server's answer that a message quotes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """One way to authenticate, or none. Its repr holds no secret.

    Attributes:
        api_key: of Elasticsearch, base64.
        basic: username and password.
    """

    api_key: str | None = field(default=None, repr=False)
    basic: tuple[str, str] | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """What a message calls them."""
        return "an API key" if self.api_key else "a username and password" if self.basic else "no credentials"

    @property
    def basic_token(self) -> str:
        """What the header of HTTP's basic authentication holds after its name; empty without a username."""
        return base64.b64encode(":".join(self.basic).encode()).decode() if self.basic else ""

    def clean(self, text: str) -> str:
        """``text`` in one line without any secret, and of a long one both ends, for a reason may come last.

        A server, or a proxy before it, may echo the header that it refuses. Secrets are replaced as they are, quoted in
        Python's or JSON's way, and as in a URL; before white space is folded and the text cut, which would leave parts.
        """
        secrets = (self.api_key or "", self.basic[1] if self.basic else "", self.basic_token)
        forms = {form for secret in secrets for form in (secret, repr(secret)[1:-1], quote(secret, safe=""))}
        for form in sorted(forms - {""}, key=len, reverse=True):
            text = text.replace(form, "***")
        text = " ".join(text.split())
        half = _MAX_CHARACTERS // 2
        return text if len(text) <= _MAX_CHARACTERS else f"{text[:half]} ... {text[-half:]}"
