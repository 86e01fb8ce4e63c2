"""Read a run's settings from YAML and dotted overrides."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from megatron_sdsearch.config.lookup import DROPPED, RENAMED, is_secret, section_at
from megatron_sdsearch.config.rules import setting_problems
from megatron_sdsearch.config.run import RunConfig
from megatron_sdsearch.config.types import expand_home, shown_url
from megatron_sdsearch.errors import ConfigError, raise_problems


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply ``section.key=value`` overrides, and check everything that needs no other file.

    Args:
        path: the YAML file; OmegaConf interpolation such as ``${run_dir}`` works.
        overrides: dotted, values in YAML syntax, each key once.

    Raises:
        ConfigError: one message that names each wrong field and its fix.
    """
    return parse_config(read_tree(path, overrides))


def parse_config(tree: Any) -> RunConfig:
    """Validate a plain nested dict.

    Raises:
        ConfigError: see ``load_config``.
    """
    config, problems = examine_tree(tree)
    raise_problems(problems)
    assert config is not None  # else there are problems
    return config


def examine_tree(tree: Any) -> tuple[RunConfig | None, list[ConfigError]]:
    """Validate a plain nested dict as far as possible.

    Refused values are replaced by their defaults, so that the others can be checked as well: such a configuration is
    for inspection, never for training.

    Returns:
        The configuration, or None if a required setting is unusable; and all problems.
    """
    if not isinstance(tree, dict):
        problem = ConfigError("CONFIG", "is not a mapping of sections", "start from examples/tiny/config.yaml")
        return None, [problem]
    problems: list[ConfigError] = []
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:  # its text has no values, but ``errors()`` does
        refused = error.errors(include_url=False)
        problems = [ConfigError(*_describe(dict(item))) for item in refused]
        tree = deepcopy(tree)
        for item in refused:
            _remove(tree, item["loc"])
        try:
            config = RunConfig.model_validate(tree)
        except ValidationError:  # a required setting is missing
            return None, problems
    # A rule's verdict on a default that replaced a refused value means nothing.
    refused_fields = {problem.field for problem in problems}
    return config, problems + [p for p in setting_problems(config) if p.field not in refused_fields]


def read_tree(path: Path, overrides: Sequence[str] = ()) -> Any:
    """Merge a YAML file and its overrides into a nested dict, without checking any value.

    Raises:
        ConfigError: the file is missing or not YAML, or an override is not ``key=value``.
    """
    try:
        path = Path(expand_home(str(path)))
    except ValueError as error:
        raise ConfigError("CONFIG", f"{path} does not exist", str(error)) from error
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "does not exist"
        raise ConfigError("CONFIG", f"{path} {problem}", "give the path of a YAML file")
    for number, override in enumerate(overrides, start=1):
        _check_override(override, number)
    try:
        merged = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides)))
        return OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, yaml.YAMLError, OSError, TypeError, ValueError) as error:
        # ``from None``: the cause would show values in a traceback.
        raise ConfigError(str(path), _yaml_problem(error), "fix the YAML or the override") from None


def _check_override(override: str, number: int) -> None:
    """Refuse what is not ``key=value``; show it only if it cannot hold a secret.

    A shell splits ``password= secret`` into two arguments, so an argument without a section's name is not shown either.
    """
    key = re.split(r"[\s:=]", override, maxsplit=1)[0]
    shown = f"number {number}"
    if key.split(".")[0] in RunConfig.model_fields:
        shown = repr(f"{key}..." if override != key and is_secret(key) else override)
    if "=" not in override or override.startswith("="):
        raise ConfigError("override", f"{shown} is not key=value", "write e.g. objective.alpha=0, without spaces")
    try:
        OmegaConf.from_dotlist([override])
    except (OmegaConfBaseException, yaml.YAMLError, ValueError) as error:  # ValueError: a number of 5,000 digits
        problem = f"{shown} is not YAML: {_yaml_problem(error)}"
        raise ConfigError(override.partition("=")[0], problem, "quote or fix its value") from None


def _yaml_problem(error: Exception) -> str:
    """Describe a YAML error in one line, without values that may be secrets."""
    text = " ".join(str(error).split())
    key = str(getattr(error, "full_key", None) or "")
    if key and is_secret(key) and "Environment variable" not in text:
        return f"{key}: ${{...}} in its value cannot be resolved (a dollar sign is written as \\$)"
    return shown_url(re.sub(r"\b(tag|alias) '[^']*'", r"\1", text))


def _remove(tree: dict[str, Any], location: Sequence[int | str]) -> None:
    """Remove a value; for one inside a list, the whole list."""
    section: Any = tree
    *outer, last = location
    for name in outer:
        if not isinstance(section.get(name), dict):
            last = name
            break
        section = section[name]
    section.pop(last, None)


def _describe(item: dict[str, Any]) -> tuple[str, str, str]:
    """Return field, problem and fix of one of pydantic's errors, without values that may be secrets."""
    path, value = [str(part) for part in item["loc"]], item["input"]
    field, fix = ".".join(path), item["msg"].removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        return _describe_unknown_key(path)
    if item["type"] == "missing":
        return field, "missing", f"set {field}"
    if item["type"] == "credentials":
        return field, item["ctx"]["problem"], fix
    if is_secret(field):
        types = {int: "a number", float: "a number", str: "a text", list: "a list", dict: "a mapping"}
        problem = f"{types.get(type(value), 'this')} is not valid (not shown: it may hold a secret)"
        return field, problem, "write it in quotes" if isinstance(value, int | float) else fix
    if item["type"] == "tuple_type" and isinstance(value, str):
        return field, f"{shown_url(value)!r} is not a list", f"write [{shown_url(value)}]"
    return field, f"{shown_url(repr(value))} is not valid", fix


def _describe_unknown_key(path: Sequence[str]) -> tuple[str, str, str]:
    section = section_at(path[:-1])
    known = list(section.model_fields) if section is not None else []
    name, colon, _ = path[-1].partition(":")
    if colon:  # the value that follows may be a secret
        return ".".join([*path[:-1], name]), "unknown key", f"write a space after the colon: {name}: ..."
    field = ".".join(path)
    if field in RENAMED:
        return field, "was renamed", f"write {RENAMED[field]}"
    if field in DROPPED:
        return field, "was removed", DROPPED[field]
    near = difflib.get_close_matches(name, known, n=1)
    return field, "unknown key", f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"
