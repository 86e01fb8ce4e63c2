"""Look up settings by their dotted names: earlier names, defaults, and which may hold a secret."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, SecretStr

from megatron_sdsearch.config.run import RunConfig

RENAMED = {
    "parallel.tensor": "parallel.tensor_model_parallel_size",
    "parallel.pipeline": "parallel.pipeline_model_parallel_size",
    "parallel.sequence": "parallel.sequence_parallel",
    "rollout.sglang.tensor": "rollout.sglang.tp_size",
}
"""Renamed settings and their new names."""
DROPPED: dict[str, str] = {
    "rollout.oversample": "remove it: its groups were a biased sample of the questions",
    "retrieval.elasticsearch.dfs": "remove it: an index of one shard (index_corpus.py --shards 1) has exact scores",
    "retrieval.replay.fingerprint": "remove it, and record each engine in its own retrieval.replay.store",
    "retrieval.replay.max_mb": "remove it: the store keeps every answer, about 1.3 kB each; delete it to start over",
}
"""Removed settings, and what to do instead."""

_SECRET_NAME = re.compile(r"password|passwd|secret|credential|api[-_]?key|_key\b|_token\b", re.IGNORECASE)
_SECRET_VALUE = re.compile(r"--[a-z-]*(api-key|token|password)\b|://[^/\s]*@", re.IGNORECASE)
_MASKED = str(SecretStr("x"))
_MAY_HOLD_API_KEY = "rollout.sglang.arguments"


def with_current_names(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Rename an earlier version's flat settings to their names of today; removed ones are left out."""
    return {RENAMED.get(name, name): value for name, value in flat.items() if name not in DROPPED}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings, with names joined by dots; lists stay as they are."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def default_of(name: str) -> Any:
    """Return a setting's default in JSON's types; None for a name inside a mapping, which is empty by default."""
    *outer, last = name.split(".")
    section = section_at(outer)
    if section is None:
        return None
    default = section.model_fields[last].get_default(call_default_factory=True)
    return list(default) if isinstance(default, tuple) else default


def section_at(path: Sequence[str]) -> type[BaseModel] | None:
    """Return the section at a path; None where the path leads to a setting, such as a mapping."""
    section: type[BaseModel] = RunConfig
    for part in path:
        sections = _sections_in(section.model_fields[part].annotation)
        if not sections:
            return None
        section = sections[0]
    return section


def is_secret(name: str, value: object = None) -> bool:
    """Tell whether a setting (of a section: anything in it) may hold a secret, and must not be shown.

    True for ``rollout.sglang.environment.HF_TOKEN``, for arguments with ``--api-key``, for a URL with a user in it, and
    for values that pydantic has masked.

    Args:
        name: dotted; for an unknown name its section decides. A whole ``key=value`` is searched for secrets as well.
        value: if known. Arguments of servers are secret only by their values, or while these are unknown.
    """
    if name.startswith(_MAY_HOLD_API_KEY) and value is None:
        return True
    annotation: Any = RunConfig
    for part in name.partition("=")[0].split("."):
        sections = _sections_in(annotation)
        if not sections or part not in sections[0].model_fields:
            break
        annotation = sections[0].model_fields[part].annotation
    is_masked = str(value) == _MASKED or _holds_secret(annotation)
    return is_masked or bool(_SECRET_NAME.search(name) or _SECRET_VALUE.search(str(value)))


def shown_command(command: Sequence[str]) -> str:
    """Join a command line, with the values of flags that hold secrets masked."""
    shown: list[str] = []
    for argument in command:
        flag, equals, _ = argument.partition("=")
        if shown and _SECRET_VALUE.fullmatch(shown[-1]):
            shown.append("***")
        else:
            shown.append(f"{flag}=***" if equals and _SECRET_VALUE.fullmatch(flag) else argument)
    return " ".join(shown)


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the sections that an annotation names: one, or none."""
    return [t for t in (annotation, *get_args(annotation)) if isinstance(t, type) and issubclass(t, BaseModel)]


def _holds_secret(annotation: Any) -> bool:
    if annotation is SecretStr:
        return True
    inner = [field.annotation for section in _sections_in(annotation) for field in section.model_fields.values()]
    return any(_holds_secret(each) for each in (inner or get_args(annotation)))
