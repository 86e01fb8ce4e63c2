"""Read a run's settings from YAML and dotted overrides."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    ValidationError,
)

from megatron_sdsearch.config.lookup import DROPPED, RENAMED, limits_of, section_at
from megatron_sdsearch.config.run import RunConfig
from megatron_sdsearch.config.secrets import may_hold_secret
from megatron_sdsearch.config.types import expand_home, shown_url
from megatron_sdsearch.errors import ConfigError


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply ``section.key=value`` overrides, and check everything that needs no other file.

    Args:
        path: the YAML file; OmegaConf interpolation such as ``${run_dir}`` works.
        overrides: dotted, applied in order, values in YAML syntax.

    Raises:
        ConfigError: one message that names each wrong field and its fix.
    """
    return parse_config(read_tree(path, overrides))


def read_tree(path: Path, overrides: Sequence[str] = ()) -> Any:
    """The nested dict that a YAML file and its overrides come to, before anything in it is checked.

    Raises:
        ConfigError: there is no such file, it is no YAML, or an override is no ``key=value``.
    """
    try:
        path = Path(expand_home(str(path)))
    except ValueError as error:
        raise ConfigError("CONFIG", f"{path} does not exist", str(error)) from error
    if not path.is_file():
        told = "is a folder" if path.is_dir() else "does not exist"
        raise ConfigError("CONFIG", f"{path} {told}", "give the path of a YAML file")
    for number, override in enumerate(overrides, start=1):
        _read_override(override, number)
    try:
        merged = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides)))
        return OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, yaml.YAMLError, OSError, TypeError, ValueError) as error:
        # Without its cause, which would show values in a traceback.
        raise ConfigError(str(path), _yaml_problem(error), "fix the YAML or the override") from None


def _read_override(override: str, number: int) -> None:
    """Refuse what is no ``key=value``; shows it whole only where it can hold no secret.

    A shell makes two arguments of ``password= secret``: a word that is no setting is not shown either.
    """
    key = re.split(r"[\s:=]", override, maxsplit=1)[0]
    is_setting = key.split(".")[0] in RunConfig.model_fields
    if is_setting:
        shown = repr(override if override == key or not may_hold_secret(key.split(".")) else f"{key}...")
    else:
        shown = f"number {number}"
    if "=" not in override or override.startswith("="):
        raise ConfigError("override", f"{shown} is not key=value", "write e.g. objective.alpha=0, without spaces")
    try:
        OmegaConf.from_dotlist([override])
    except (OmegaConfBaseException, yaml.YAMLError, ValueError) as error:  # the last: a number of 5,000 digits
        problem = f"{shown} is no YAML: {_yaml_problem(error)}"
        raise ConfigError(override.partition("=")[0], problem, "quote or fix its value") from None


def _yaml_problem(error: Exception) -> str:
    """What is wrong with some YAML, in one line, without a value that may be a secret."""
    text = " ".join(str(error).split())
    key = str(getattr(error, "full_key", None) or "")
    if key and may_hold_secret(key.split(".")) and "Environment variable" not in text:
        return f"{key}: ${{...}} in its value cannot be resolved (a dollar sign is written as \\$)"
    return shown_url(re.sub(r"\b(tag|alias) '[^']*'", r"\1", text))


def parse_config(tree: Any) -> RunConfig:
    """Validate a plain nested dict.

    Raises:
        ConfigError: see ``load_config``.
    """
    check_is_mapping(tree)
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise _as_one_error(field_errors(error)) from None  # its text has no values, its ``errors()`` have


def check_is_mapping(tree: Any) -> None:
    """Refuse YAML that is a list or a bare value.

    Raises:
        ConfigError: it is.
    """
    if not isinstance(tree, dict):
        raise ConfigError("CONFIG", "is not a mapping of sections", "start from examples/tiny/config.yaml")


def field_errors(error: ValidationError) -> list[ConfigError]:
    """One for each field that pydantic refuses; shows no value that may be a secret."""
    return [ConfigError(*_describe(dict(item))) for item in error.errors(include_url=False)]


def _as_one_error(errors: Sequence[ConfigError]) -> ConfigError:
    first = errors[0]
    return ConfigError(first.field, first.problem, first.fix + "".join(f"\n{error}" for error in errors[1:]))


def _describe(item: dict[str, Any]) -> tuple[str, str, str]:
    path = [str(part) for part in item["loc"]]
    field, value = ".".join(path), item["input"]
    if item["type"] == "extra_forbidden":
        return _describe_unknown_key(path)
    if item["type"] == "missing":
        return field, "missing", f"set {field}"
    if item["type"] in ("greater_than_equal", "less_than_equal") and (limits := limits_of(path)):
        return field, f"{value!r} is out of range", f"give a number from {limits[0]} to {limits[1]}"
    if not may_hold_secret(path):
        return field, f"{shown_url(repr(value))} is not valid", item["msg"].removeprefix("Value error, ")
    fix = "write it in quotes" if isinstance(value, int | float) else item["msg"].removeprefix("Value error, ")
    return field, f"{_kind(value)} is not valid (not shown: it may hold a secret)", fix


def _describe_unknown_key(path: Sequence[str]) -> tuple[str, str, str]:
    section = section_at(path[:-1])
    known = list(section.model_fields) if section is not None else []
    name, colon, _ = path[-1].partition(":")
    if colon:  # what follows is a value, which may be a secret
        return ".".join([*path[:-1], name]), "unknown key", f"write a space after the colon: {name}: ..."
    field = ".".join(path)
    if field in RENAMED:
        return field, "was renamed", f"write {RENAMED[field]}"
    if field in DROPPED:
        return field, "is no setting any more", DROPPED[field]
    near = difflib.get_close_matches(name, known, n=1)
    return field, "unknown key", f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"


def _kind(value: object) -> str:
    kinds = {int: "a number", float: "a number", str: "a text", list: "a list", dict: "a mapping"}
    return kinds.get(type(value), "this")
