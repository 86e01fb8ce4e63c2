"""Find consecutive steps without learning in a run's metrics, and name their likely causes.

Works on the rows of ``metrics.jsonl``, so a resumed run continues the count. The loop warns while it trains; page and
summary show the same warnings afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any, Final, Literal

from megatron_sdsearch.logging import names

#: Steps in a row before the first warning: with few questions per step, one or two happen in healthy runs.
WARN_AFTER: Final = 5
Row = Mapping[str, Any]
Lacking = Literal["contrast", "gradient"]
_LACKINGS: Final[tuple[Lacking, ...]] = ("contrast", "gradient")
_MOST: Final = 0.5


def find_idle_steps(rows: Iterable[Row], lacking: Lacking) -> list[list[Row]]:
    """Find stretches of consecutive steps without contrast or gradient, of any length, in order.

    Args:
        rows: rows of ``metrics.jsonl``; those without a training step, such as a lone evaluation, are skipped.
        lacking: ``contrast``: no trajectory had an advantage. ``gradient``: its norm was exactly 0.
    """

    def is_idle(row: Row) -> bool:
        if lacking == "contrast":
            return bool(row.get(names.SHARE_WITHOUT_ADVANTAGE) == 1.0)
        return bool(row.get(names.GRAD_NORM, 0.0) == 0.0)  # no norm: there was no token to train on

    steps = (row for row in rows if names.STEP_SECONDS in row)
    return [list(stretch) for idle, stretch in groupby(steps, key=is_idle) if idle]


def idle_step_warnings(rows: Sequence[Row]) -> list[str]:
    """Return one line per stretch of at least ``WARN_AFTER`` steps without learning."""
    return [line for stretch, line in _find_warnings(rows) if len(stretch) >= WARN_AFTER]


def due_warnings(rows: Sequence[Row]) -> list[str]:
    """Return warnings to print after the last step of ``rows``: at ``WARN_AFTER`` steps, then at each doubling."""
    due = []
    for stretch, line in _find_warnings(rows):
        times, remainder = divmod(len(stretch), WARN_AFTER)
        if stretch[-1]["step"] == rows[-1]["step"] and remainder == 0 and times.bit_count() == 1:
            due.append(line)
    return due


def _find_warnings(rows: Sequence[Row]) -> list[tuple[list[Row], str]]:
    """Return all stretches with a line about each, by first step."""
    found = []
    for lacking in _LACKINGS:
        for stretch in find_idle_steps(rows, lacking):
            steps = f"for {len(stretch)} steps ({stretch[0]['step']} to {stretch[-1]['step']})"
            if lacking == "contrast":
                effect = "all rewards of a question are equal, so GRPO learns nothing"
                line = f"no group had contrast {steps}: {effect}. Likely: {'; '.join(_likely_causes(stretch[-1]))}"
            else:
                line = f"the gradient was exactly 0 {steps}: nothing is learned"
            found.append((stretch, line))
    return sorted(found, key=lambda pair: pair[0][0]["step"])


def _likely_causes(row: Row) -> list[str]:
    """Derive causes from how the step's trajectories ended, most specific first."""
    causes = []
    if row.get(f"{names.STATUS_PREFIX}prompt_too_long", 0.0) >= _MOST:
        causes.append("most prompts exceed rollout.max_prompt_tokens: raise it")
    if row.get(f"{names.STATUS_PREFIX}truncated", 0.0) >= _MOST:
        causes.append("most trajectories reach rollout.max_total_tokens: raise it")
    if row.get(f"{names.STATUS_PREFIX}no_answer", 0.0) >= _MOST:
        causes.append(
            "most never answer: the model may not write the tags of data.prompt_profile, or is cut off by "
            "rollout.max_response_tokens; read some in trajectories/"
        )
    if not causes and row.get(names.SHARE_ALL_WRONG, 0.0) == 1.0:
        causes.append(
            "all answers are wrong: look at trajectories/ (do searches find anything? does the answer's form fit the "
            "gold answers?), or start with easier questions, or a warm start"
        )
    if not causes and row.get(names.SHARE_ALL_CORRECT, 0.0) == 1.0:
        causes.append("all answers are correct: use harder questions")
    return causes or ["look at objective.reward and at trajectories/"]
