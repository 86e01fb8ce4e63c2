"""Which settings may hold a secret, and how a command line is shown without it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, get_args

from pydantic import (
    SecretStr,
)

from megatron_sdsearch.config.lookup import sections_of
from megatron_sdsearch.config.run import RunConfig

_SECRET_NAME = re.compile(r"password|passwd|secret|credential|api[-_]?key|_key\b|_token\b", re.IGNORECASE)
_MAY_HOLD_API_KEY = "rollout.sglang.arguments"
_SECRET_VALUE = re.compile(r"--[a-z-]*(api-key|token|password)\b|://[^/\s]*@", re.IGNORECASE)


def is_secret(name: str, value: object) -> bool:
    """Whether a setting may hold a secret, by its dotted name or by what its value looks like.

    True for ``rollout.sglang.environment.HF_TOKEN``, for arguments with ``--api-key``, for a URL with a user in it, and
    for what pydantic has masked.
    """
    return str(value) == str(SecretStr("x")) or bool(_SECRET_NAME.search(name) or _SECRET_VALUE.search(str(value)))


def shown_command(words: Sequence[str]) -> str:
    """A command line without the values of flags that hold secrets."""
    shown: list[str] = []
    for word in words:
        flag, equals, _ = word.partition("=")
        if shown and _SECRET_VALUE.fullmatch(shown[-1]):
            shown.append("***")
        else:
            shown.append(f"{flag}=***" if equals and _SECRET_VALUE.fullmatch(flag) else word)
    return " ".join(shown)


def may_hold_secret(path: Sequence[str]) -> bool:
    """Whether what stands at this path is, or holds, a secret; of an unknown name, whether its section does."""
    if ".".join(path[:3]) == _MAY_HOLD_API_KEY:
        return True
    annotation: Any = RunConfig
    for part in path:
        fields = sections_of(annotation)
        if not fields or part not in fields[0].model_fields:
            break
        annotation = fields[0].model_fields[part].annotation
    return _has_secret(annotation)


def _has_secret(annotation: Any) -> bool:
    if annotation is SecretStr:
        return True
    sections = sections_of(annotation)
    inner = [field.annotation for section in sections for field in section.model_fields.values()]
    return any(_has_secret(each) for each in (inner or get_args(annotation)))
