"""Types of settings: paths, counts, durations, addresses, and the base of all sections."""

from __future__ import annotations

import os
import re
from argparse import ArgumentTypeError
from pathlib import Path
from typing import Annotated, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError


def expand_home(text: str) -> str:
    """Expand ``~`` or ``~user`` at the start of a path or of an argument, as a shell does; ``$NAME`` stays.

    Raises:
        ValueError: the user does not exist.
    """
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        user = text.partition("/")[0]
        raise ValueError(f"{user} is not a user here: write the whole path, or ./{user} for a folder with that name")
    return expanded


def path_argument(text: str) -> Path:
    """Parse a path argument; for ``type=`` in argparse."""
    try:
        return Path(expand_home(text))
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from error


def shown_url(url: str) -> str:
    """Mask what precedes the last ``@`` of a URL, or of a text with one: it may be a password."""
    before, at, remainder = url.rpartition("@")
    scheme = re.match(r"\W*\w+://", before)
    return f"{scheme.group() if scheme else ''}***@{remainder}" if at else url


def _expand_path(value: object) -> object:
    return expand_home(value) if isinstance(value, str) else value


def _refuse_credentials(url: str) -> str:
    if re.match(r"(\w+://)?[^/?#]*@", url):
        fix = "leave them out; search engines have settings for them: username and password, or api_key"
        # An error type of its own, since a ValueError would show the value.
        raise PydanticCustomError(
            "credentials", "{fix}", {"problem": f"{shown_url(url)} holds credentials", "fix": fix}
        )
    return url


HomePath = Annotated[Path, BeforeValidator(_expand_path)]
"""Path with ``~`` expanded; see ``expand_home``."""
ShellWord = Annotated[str, AfterValidator(expand_home)]
"""An argument of a command that is started without a shell."""
Url = Annotated[str, AfterValidator(_refuse_credentials)]
"""An address without ``user:password@``."""

_MAX_INT = 2**31 - 1
"""Some libraries store counts in C's ``int``."""
PositiveInt = Annotated[int, Field(ge=1, le=_MAX_INT)]
NonNegativeInt = Annotated[int, Field(ge=0, le=_MAX_INT)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
"""torch takes 64 bits, and megatron adds a few thousand; 32-bit generators get the seed modulo 2**32."""
Seconds = Annotated[float, Field(gt=0.0, le=1e9)]
"""Limited to 30 years: C clocks overflow soon after."""
NonNegativeFloat = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
UnitFloat = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """Base of all sections: immutable, and an unknown key is an error. Rules over settings are in ``rules.py``."""

    # Pydantic's errors would put refused values, perhaps passwords, into tracebacks.
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), hide_input_in_errors=True)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_bool_as_number(cls, value: object, info: ValidationInfo) -> object:
        """Refuse ``true``, which pydantic reads as 1. Text such as ``"3"`` is allowed: ``${oc.env:...}`` gives text."""
        annotation = cls.model_fields[info.field_name or ""].annotation
        options = {getattr(option, "__origin__", option) for option in (annotation, *get_args(annotation))}
        if isinstance(value, bool) and options & {int, float} and bool not in options:
            raise ValueError("give a number")
        return value
