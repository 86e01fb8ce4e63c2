"""Secrets of a search engine, struck out of what it, or a proxy before it, says of a request."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from urllib.parse import quote

MAX_CAUSE = 400
"""Characters of a server's words that a message quotes."""


def basic_token(username: str, password: str) -> str:
    """What the header of HTTP's basic authentication holds."""
    return base64.b64encode(f"{username}:{password}".encode()).decode()


def strike_out(text: str, secrets: Iterable[str]) -> str:
    """``text`` without any of them, as they are, quoted in Python's or JSON's way, or as in a URL."""
    forms = {form for secret in secrets for form in (secret, repr(secret)[1:-1], quote(secret, safe=""))}
    for form in sorted(forms - {""}, key=len, reverse=True):
        text = text.replace(form, "***")
    return text


def shorten(text: str) -> str:
    """``text`` in one line; of a long one both ends, for a reason may come last. Strike secrets out before."""
    text = " ".join(text.split())
    half = MAX_CAUSE // 2
    return text if len(text) <= MAX_CAUSE else f"{text[:half]} ... {text[-half:]}"
