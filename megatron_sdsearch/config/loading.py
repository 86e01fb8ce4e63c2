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

    Refused values give way to their defaults, so that the others can be looked at as well: such a configuration is for
    looking at, never for training.

    Returns:
        The configuration, None where nothing can be made of it; and everything that is wrong with it.
    """
    if not isinstance(tree, dict):
        problem = ConfigError("CONFIG", "is not a mapping of sections", "start from examples/tiny/config.yaml")
        return None, [problem]
    problems: list[ConfigError] = []
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:  # its text has no values, its ``errors()`` have
        refused = error.errors(include_url=False)
        problems = [ConfigError(*_describe(dict(item))) for item in refused]
        tree = deepcopy(tree)
        for item in refused:
            _remove(tree, item["loc"])
        try:
            config = RunConfig.model_validate(tree)
        except ValidationError:  # something is missing that has no default
            return None, problems
    # What a rule says of a default in a refused value's stead means nothing.
    refused_fields = {problem.field for problem in problems}
    return config, problems + [p for p in setting_problems(config) if p.field not in refused_fields]


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
        problem = "is a folder" if path.is_dir() else "does not exist"
        raise ConfigError("CONFIG", f"{path} {problem}", "give the path of a YAML file")
    for number, override in enumerate(overrides, start=1):
        _check_override(override, number)
    try:
        merged = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides)))
        return OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, yaml.YAMLError, OSError, TypeError, ValueError) as error:
        # Without its cause, which would show values in a traceback.
        raise ConfigError(str(path), _yaml_problem(error), "fix the YAML or the override") from None


def _check_override(override: str, number: int) -> None:
    """Refuse what is not ``key=value``; it is shown whole only where it can hold no secret.

    A shell makes two arguments of ``password= secret``: an argument that begins with no section is not shown either.
    """
    key = re.split(r"[\s:=]", override, maxsplit=1)[0]
    shown = f"number {number}"
    if key.split(".")[0] in RunConfig.model_fields:
        shown = repr(f"{key}..." if override != key and is_secret(key) else override)
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
    if key and is_secret(key) and "Environment variable" not in text:
        return f"{key}: ${{...}} in its value cannot be resolved (a dollar sign is written as \\$)"
    return shown_url(re.sub(r"\b(tag|alias) '[^']*'", r"\1", text))


def _remove(tree: dict[str, Any], location: Sequence[int | str]) -> None:
    """Take a value away; for one inside a list the whole list goes."""
    section: Any = tree
    *outer, last = location
    for name in outer:
        if not isinstance(section.get(name), dict):
            last = name
            break
        section = section[name]
    section.pop(last, None)


def _describe(item: dict[str, Any]) -> tuple[str, str, str]:
    """Field, problem and fix of what pydantic refuses; shows no value that may be a secret."""
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
        return field, f"{shown_url(value)!r} is no list", f"write [{shown_url(value)}]"
    return field, f"{shown_url(repr(value))} is not valid", fix


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
