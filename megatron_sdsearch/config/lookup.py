"""Settings by their dotted names: sections, limits and defaults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from pydantic import (
    BaseModel,
)

from megatron_sdsearch.config.run import RunConfig

RENAMED = {
    "parallel.tensor": "parallel.tensor_model_parallel_size",
    "parallel.pipeline": "parallel.pipeline_model_parallel_size",
    "parallel.sequence": "parallel.sequence_parallel",
    "rollout.sglang.tensor": "rollout.sglang.tp_size",
}
"""Settings of earlier versions, and what they are called now; a setting that has gone has its reason in ``DROPPED``."""
DROPPED: dict[str, str] = {
    "retrieval.elasticsearch.dfs": "drop it; an index of one shard (tools/index_corpus.py --shards 1) has exact scores",
    "retrieval.replay.fingerprint": "drop it, and record each engine into a store of its own (retrieval.replay.store)",
    "retrieval.replay.max_mb": "drop it: the store keeps every answer, about 1.3 kB each; delete it to begin anew",
}
"""Settings of earlier versions without a successor, and what to do instead."""


def with_current_names(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Flat settings of an earlier version under their names of today, without those that have gone."""
    return {RENAMED.get(name, name): value for name, value in flat.items() if name not in DROPPED}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, names joined by dots; lists stay as they are."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def default_of(name: str) -> Any:
    """Of a setting, by its dotted name, as JSON has it; None of a name within a mapping, which is empty by default."""
    *outer, last = name.split(".")
    section = section_at(outer)
    if section is None:
        return None
    default = section.model_fields[last].get_default(call_default_factory=True)
    return list(default) if isinstance(default, tuple) else default


def limits_of(path: Sequence[str]) -> tuple[float, float] | None:
    """The least and the largest value of a setting; None where one of them is not declared."""
    section = section_at(path[:-1])
    if section is None:
        return None
    info = section.model_fields[path[-1]]
    optional = (f for option in get_args(info.annotation) for f in getattr(option, "__metadata__", ()))
    metadata = [*info.metadata, *(rule for field in optional for rule in getattr(field, "metadata", ()))]
    lows, highs = ([v for rule in metadata if (v := getattr(rule, name, None)) is not None] for name in ("ge", "le"))
    return (lows[0], highs[0]) if lows and highs else None


def section_at(path: Sequence[str]) -> type[BaseModel] | None:
    """None where the path leads to a setting that is no section, such as a mapping."""
    section: type[BaseModel] = RunConfig
    for part in path:
        sections = sections_of(section.model_fields[part].annotation)
        if not sections:
            return None
        section = sections[0]
    return section


def sections_of(annotation: Any) -> list[type[BaseModel]]:
    """The sections that an annotation names: one, or none."""
    return [t for t in (annotation, *get_args(annotation)) if isinstance(t, type) and issubclass(t, BaseModel)]
