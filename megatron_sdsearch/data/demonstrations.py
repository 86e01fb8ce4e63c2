"""Demonstrations for the warm start, from JSONL: a prompt, then alternating sampled and observed text."""

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
    """Text that the policy writes (``sampled``, trained on) or reads (``observation``, not trained on)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["sampled", "observation"]
    text: Annotated[str, Field(min_length=1)]


class Demonstration(BaseModel):
    """One row of the file; ``prompt`` is the user message, without a chat template."""

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
        DataError: a row is malformed or has no sampled text (names file, line and field), there are no rows, or the
            file has another format.
    """
    refuse_other_kind(path, "JSON Lines")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}; give a JSONL file in UTF-8") from error
    # Not splitlines, which also splits at characters such as U+2028 inside JSON strings.
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
        raise DataError(f"{path} holds no demonstrations; write at least one row")
    return tuple(rows)


def check_profile(demonstrations: Sequence[Demonstration], profile: PromptProfile) -> None:
    """Check that demonstrations use the action tags of rollouts and the observation tags of the profile.

    Raises:
        ConfigError: none ends a search or an answer, or no observation has the profile's tag.
    """
    sampled = [span.text for row in demonstrations for span in row.spans if span.kind == "sampled"]
    if sampled and not any(SEARCH_END in text or ANSWER_END in text for text in sampled):
        example = f"none contains {SEARCH_END} or {ANSWER_END}, for example {sampled[0].strip()!r:.60}"
        raise ConfigError(
            "train.demonstrations",
            f"{example}: the policy would learn actions that rollouts do not recognize",
            "write actions as <search> query </search> and <answer> answer </answer>",
        )
    observed = [span.text for row in demonstrations for span in row.spans if span.kind == "observation"]
    if observed and not any(profile.observation_open in text for text in observed):
        problem = f"{profile.name} shows search results in {profile.observation_open}, the demonstrations do not"
        example = f"for example {observed[0].strip()!r:.60}"
        raise ConfigError("data.prompt_profile", f"{problem}, {example}", "set it to the profile with their tags")


class DemonstrationSampler:
    """Selects the demonstrations of each step: a pure function of (seed, step), in shuffled epochs."""

    def __init__(self, demonstrations: tuple[Demonstration, ...], seed: int, per_step: int) -> None:
        self._demonstrations = demonstrations
        self._seed = seed
        self._per_step = per_step

    def batch(self, step: int) -> tuple[Demonstration, ...]:
        """Return the demonstrations of a step (0-based)."""
        size = len(self._demonstrations)
        positions = range(step * self._per_step, (step + 1) * self._per_step)
        epochs = {position // size for position in positions}
        orders = {epoch: np.random.default_rng((self._seed, epoch)).permutation(size) for epoch in epochs}
        return tuple(self._demonstrations[orders[position // size][position % size]] for position in positions)
