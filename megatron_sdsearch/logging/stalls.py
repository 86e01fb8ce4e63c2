"""Steps in a row that teach nothing, found in a run's metrics, and what usually is behind them.

Counts whole runs of ``metrics.jsonl``, so that a resumed run goes on counting. Shown by the loop while it trains, and
by whatever reads the metrics later.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Final, Literal

from megatron_sdsearch.logging import names

STALL_STEPS: Final = 5
"""A warning from so many steps in a row on: with few questions a step, one or two happen in healthy runs."""
Row = Mapping[str, Any]
Kind = Literal["contrast", "gradient"]
_SHARE: Final = "train/share_"
_STATUS: Final = "train/status/"
_MOST: Final = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Stall:
    """Steps in a row, from ``first`` to ``last``, that lack the same.

    Attributes:
        kind: ``contrast``: in no group did any trajectory have an advantage. ``gradient``: its norm was exactly 0.
        row: metrics of the last step.
    """

    kind: Kind
    first: int
    last: int
    row: Row

    @property
    def num_steps(self) -> int:
        """Both ends counted."""
        return self.last - self.first + 1

    @property
    def words(self) -> str:
        """One line for people."""
        steps = f"for {self.num_steps} steps ({self.first} to {self.last})"
        if self.kind == "gradient":
            return f"the gradient was exactly 0 {steps}: nothing is learned"
        causes = "; ".join(_causes(self.row))
        told = "all rewards of a question are equal, so GRPO learns nothing"
        return f"no group had contrast {steps}: {told}. Likely: {causes}"


def stalls(rows: Iterable[Row], kind: Kind) -> list[Stall]:
    """All of them, of whatever length, in the order of the steps.

    Args:
        rows: of ``metrics.jsonl``; those that are no training step, such as a lone evaluation, are passed over.
        kind: what is lacking.
    """
    steps = [row for row in rows if names.STEP_SECONDS in row]
    found = []
    for is_lacking, group in groupby(steps, key=lambda row: _lacks(row, kind)):
        if is_lacking:
            members = list(group)
            found.append(Stall(kind=kind, first=members[0]["step"], last=members[-1]["step"], row=members[-1]))
    return found


def num_stalled(rows: Iterable[Row], kind: Kind) -> int:
    """Steps of a run that lack it, in a row or not."""
    return sum(stall.num_steps for stall in stalls(rows, kind))


def warnings_of(rows: Sequence[Row]) -> list[str]:
    """A line for each time that a run taught nothing for ``STALL_STEPS`` steps or more."""
    found = [stall for kind in _kinds() for stall in stalls(rows, kind) if stall.num_steps >= STALL_STEPS]
    return [stall.words for stall in sorted(found, key=lambda stall: stall.first)]


def due_warnings(rows: Sequence[Row]) -> list[str]:
    """What is to be said after the last step of ``rows``: at ``STALL_STEPS`` in a row, then at twice as many each."""
    last = rows[-1]["step"] if rows else 0
    now = [stall for kind in _kinds() for stall in stalls(rows, kind)[-1:] if stall.last == last]
    return [stall.words for stall in now if _is_round(stall.num_steps)]


def _kinds() -> tuple[Kind, ...]:
    return "contrast", "gradient"


def _is_round(num_steps: int) -> bool:
    times, rest = divmod(num_steps, STALL_STEPS)
    return times > 0 and rest == 0 and times & (times - 1) == 0


def _lacks(row: Row, kind: Kind) -> bool:
    if kind == "contrast":
        return bool(row.get(names.SHARE_WITHOUT_ADVANTAGE) == 1.0)
    return bool(row.get(names.GRAD_NORM, 0.0) == 0.0)  # without a norm there was no token to learn from


def _causes(row: Row) -> list[str]:
    """Likely ones, by what the step's trajectories came to; most telling first."""
    status = {name.removeprefix(_STATUS): value for name, value in row.items() if name.startswith(_STATUS)}
    causes = []
    if status.get("prompt_too_long", 0.0) >= _MOST:
        causes.append("most prompts exceed rollout.max_prompt_tokens: raise it")
    if status.get("truncated", 0.0) >= _MOST:
        causes.append("most trajectories reach rollout.max_total_tokens: raise it")
    if status.get("no_answer", 0.0) >= _MOST:
        causes.append(
            "most never answer: the model may not write the tags that data.prompt_profile asks for, or is cut off by "
            "rollout.max_response_tokens; read some in trajectories/"
        )
    if not causes and row.get(f"{_SHARE}all_wrong", 0.0) == 1.0:
        causes.append(
            "all answers are wrong: look at trajectories/ (do searches find anything? does the answer's form fit the "
            "gold answers?), or begin with easier questions, or a warm start"
        )
    if not causes and row.get(f"{_SHARE}all_correct", 0.0) == 1.0:
        causes.append("all answers are right: take harder questions")
    return causes or ["look at objective.reward and at trajectories/"]
