"""All that is wrong with a configuration by itself, where training names the first mistake of each kind."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_sdsearch.config import PROBLEMS, RunConfig, check_is_mapping, field_errors, read_tree
from megatron_sdsearch.errors import ConfigError

Location = tuple[int | str, ...]


def read_all(path: Path, overrides: Sequence[str] = ()) -> tuple[RunConfig | None, list[ConfigError]]:
    """A configuration and everything that is wrong with it.

    Values that are refused give way to their defaults, so that the rest can be looked at as well: such a configuration
    is for looking at, never for training.

    Returns:
        The configuration, None where nothing can be made of it; and one error for each problem.
    """
    try:
        tree = read_tree(path, overrides)
        check_is_mapping(tree)
    except ConfigError as error:
        return None, [error]
    problems: list[ConfigError] = []
    try:
        return RunConfig.model_validate(tree, context={PROBLEMS: problems}), problems
    except ValidationError as refused:
        errors = field_errors(refused)
        rest = _without(tree, [item["loc"] for item in refused.errors(include_url=False)])
    try:
        config = RunConfig.model_validate(rest, context={PROBLEMS: problems})
    except ValidationError:  # something is missing that has no default
        return None, errors
    refused_fields = {error.field for error in errors}
    # A section's validator has run twice, and what it says of a default in a refused value's place means nothing.
    more = {str(problem): problem for problem in problems if problem.field not in refused_fields}
    return config, [*errors, *more.values()]


def _without(tree: dict[str, Any], locations: Iterable[Location]) -> dict[str, Any]:
    """A copy without these values; for one inside a list the whole list goes."""
    copy = deepcopy(tree)
    for location in locations:
        section: Any = copy
        *outer, last = location
        for name in outer:
            if not isinstance(section.get(name), dict):
                last = name
                break
            section = section[name]
        section.pop(last, None)
    return copy
