"""Demonstrations of the warm start: a prompt, then sampled and observed text in turn, from JSONL."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from megatron_sdsearch.data.prompts import ANSWER_END, SEARCH_END, PromptProfile
from megatron_sdsearch.errors import ConfigError, DataError
from megatron_sdsearch.file_kinds import refuse_other_kind


class DemonstrationSpan(BaseModel):
    """Text that the policy would write (``sampled``, learned) or read (``observation``, not learned)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["sampled", "observation"]
    text: Annotated[str, Field(min_length=1)]


class Demonstration(BaseModel):
    """One row of the file; ``prompt`` is the user's message, before any chat template."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    demonstration_id: str
    prompt: Annotated[str, Field(min_length=1)]
    spans: Annotated[tuple[DemonstrationSpan, ...], Field(min_length=1)]

    @field_validator("spans")
    @classmethod
    def _check_sampled(cls, spans: tuple[DemonstrationSpan, ...]) -> tuple[DemonstrationSpan, ...]:
        if not any(span.kind == "sampled" and span.text.strip() for span in spans):
            raise PydanticCustomError("nothing_sampled", "No span is sampled text, so there is nothing to learn")
        return spans


def read_demonstrations(path: Path) -> tuple[Demonstration, ...]:
    """Read the whole file.

    Raises:
        DataError: a row is malformed or has no sampled text, naming file, line and field; there is no row; or the file
            is of another kind.
    """
    refuse_other_kind(path, "JSON Lines")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}; give a JSONL file in UTF-8") from error
    # Not splitlines: JSON strings may hold characters such as U+2028, at which it would cut a row in two.
    lines = text.removesuffix("\n").split("\n") if text else []
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(Demonstration.model_validate_json(line))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(str(part) for part in first["loc"]) or "the row"
            raise DataError(f"{path}:{number}: {field}: {first['msg']}; fix or remove the row") from error
    if not rows:
        raise DataError(f"{path} holds no demonstration: write at least one row")
    return tuple(rows)


def check_profile(demonstrations: Sequence[Demonstration], profile: PromptProfile) -> None:
    """Check that demonstrations act with the tags of rollouts, and see search results between the tags of the profile.

    Raises:
        ConfigError: none ends a search or an answer; or there are observations, and none has the profile's tag.
    """
    sampled = [span.text for row in demonstrations for span in row.spans if span.kind == "sampled"]
    if sampled and not any(SEARCH_END in text or ANSWER_END in text for text in sampled):
        raise ConfigError(
            "train.demonstrations",
            f"none writes {SEARCH_END} or {ANSWER_END}, such as {sampled[0].strip()!r:.60}: the policy would "
            "learn to act in a way that rollouts do not know",
            "write actions as <search> query </search> and <answer> answer </answer>",
        )
    observed = [span.text for row in demonstrations for span in row.spans if span.kind == "observation"]
    if observed and not any(profile.observation_open in text for text in observed):
        raise ConfigError(
            "data.prompt_profile",
            f"{profile.name} shows search results in {profile.observation_open}, which no observation of the "
            f"demonstrations holds, such as {observed[0].strip()!r:.60}",
            "set it to the profile whose tags they have",
        )


class DemonstrationSampler:
    """Which demonstrations each step gets: a pure function of (seed, step), in shuffled epochs."""

    def __init__(self, demonstrations: tuple[Demonstration, ...], seed: int, per_step: int) -> None:
        self._demonstrations = demonstrations
        self._seed = seed
        self._per_step = per_step

    def batch(self, step: int) -> tuple[Demonstration, ...]:
        """The demonstrations of that step (0-based)."""
        size = len(self._demonstrations)
        positions = range(step * self._per_step, (step + 1) * self._per_step)
        epochs = {position // size for position in positions}
        orders = {epoch: np.random.default_rng((self._seed, epoch)).permutation(size) for epoch in epochs}
        return tuple(self._demonstrations[orders[position // size][position % size]] for position in positions)
