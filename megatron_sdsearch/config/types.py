"""Types of settings: paths, counts, durations, and the base of all sections."""

from __future__ import annotations

import os
import re
from argparse import ArgumentTypeError
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
)

from megatron_sdsearch.errors import ConfigError, raise_first


def expand_home(text: str) -> str:
    """A path or a word of a command with ``~`` or ``~user`` at its start expanded, as a shell does; ``$NAME`` stays.

    Raises:
        ValueError: no such user is known.
    """
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        user = text.partition("/")[0]
        raise ValueError(f"{user} is no home directory here: write the whole path, or ./{user} for a folder's name")
    return expanded


def path_argument(text: str) -> Path:
    """``type`` of a path on a command line of argparse."""
    try:
        return Path(expand_home(text))
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from error


def _expand_path(value: object) -> object:
    return expand_home(value) if isinstance(value, str) else value


HomePath = Annotated[Path, BeforeValidator(_expand_path)]
"""Every path of the settings; see ``expand_home``."""
ShellWord = Annotated[str, AfterValidator(expand_home)]
"""Of a command that is started without a shell."""

_MAX_INT = 2**31 - 1
"""What is counted goes through C's ``int`` in one library or another; nothing here comes near it."""
PositiveInt = Annotated[int, Field(ge=1, le=_MAX_INT)]
NonNegativeInt = Annotated[int, Field(ge=0, le=_MAX_INT)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
"""torch takes 64 bits, and megatron adds a few thousand; generators of 32 bits get the remainder."""
Seconds = Annotated[float, Field(gt=0.0, le=1e9)]
"""Up to 30 years: clocks of C overflow soon after."""
NonNegativeFloat = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
UnitFloat = Annotated[float, Field(ge=0.0, le=1.0)]


PROBLEMS = "problems"
"""In the context of a validation: a list that takes every ConfigError, where otherwise the first one is raised."""


def report_problems(errors: Iterable[ConfigError], info: ValidationInfo) -> None:
    """Collect errors where the caller lists them all, else raise the first."""
    collected = (info.context or {}).get(PROBLEMS)
    if collected is None:
        raise_first(errors)
    else:
        collected.extend(errors)


class Section(BaseModel):
    """Base of all sections: immutable, and an unknown key is an error."""

    # What pydantic says of a refused value would bring passwords into tracebacks.
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), hide_input_in_errors=True)


def shown_url(url: str) -> str:
    """A URL, or a text with one, for messages: what stands before its last ``@`` may be a password."""
    before, at, rest = url.rpartition("@")
    scheme = re.match(r"\W*\w+://", before)
    return f"{scheme.group() if scheme else ''}***@{rest}" if at else url


def without_credentials(field: str, url: str, fix: str, info: ValidationInfo) -> str:
    """Refuse ``user:password@``: addresses stand in logs, errors, checkpoints and metrics."""
    bare = re.sub(r"^(\w+://)?[^/?#]*@", r"\1", url)
    if bare != url:
        report_problems([ConfigError(field, f"{shown_url(url)} holds credentials", fix)], info)
    return bare
