"""When a run saves: by steps, by the first rank's clock, at the end."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_sdsearch.config import RunConfig, parse_config, setting_warnings
from megatron_sdsearch.training.saving import SaveSchedule


class Clock:
    def __init__(self) -> None:
        self.minutes = 0.0

    def __call__(self) -> float:
        return self.minutes * 60


class Peers:
    """Stands for ParallelState: ``first`` is what the first rank says, None when this rank is it."""

    def __init__(self, first: bool | None = None) -> None:
        self.first = first
        self.num_calls = 0

    def all_gather_object(self, value: bool) -> list[bool]:
        self.num_calls += 1
        return [value if self.first is None else self.first, value]


def config(num_steps: int = 100, **checkpoint: Any) -> RunConfig:
    tree: dict[str, Any] = {"run_dir": "r", "model": {"hf_dir": "m"}, "data": {"train": "t"}}
    settings = {"train": {"num_steps": num_steps}, "checkpoint": checkpoint}
    return parse_config(tree | settings | {"retrieval": {"corpus": "c"}})


def saved(config: RunConfig, minutes_per_step: float, peers: Any = None) -> list[int]:
    clock = Clock()
    ranks: Any = peers or Peers()
    schedule = SaveSchedule(config, ranks, clock)
    steps = []
    for step in range(1, config.train.num_steps + 1):
        clock.minutes += minutes_per_step
        if schedule.is_due(step):
            steps.append(step)
    return steps


def test_by_default_half_an_hour_is_the_most_that_a_crash_costs() -> None:
    assert saved(config(), minutes_per_step=7) == [5, 10, 15, 20, *range(25, 100, 5), 100]
    assert saved(config(num_steps=3), minutes_per_step=45) == [1, 2, 3]
    assert saved(config(num_steps=40), minutes_per_step=0.01) == [40]


def test_minutes_count_from_the_last_save_of_either_kind() -> None:
    assert saved(config(num_steps=20, every=8, every_minutes=30), minutes_per_step=5) == [6, 8, 14, 16, 20]


def test_without_minutes_no_clock_is_looked_at_and_no_rank_asked() -> None:
    peers = Peers()
    assert saved(config(num_steps=6, every=4, every_minutes=0), minutes_per_step=1000, peers=peers) == [4, 6]
    assert peers.num_calls == 0


@pytest.mark.parametrize(("first", "steps"), [(True, [1, 2, 3]), (False, [3])])
def test_the_first_ranks_clock_decides_for_all(first: bool, steps: list[int]) -> None:
    assert saved(config(num_steps=3), minutes_per_step=20, peers=Peers(first)) == steps


@pytest.mark.parametrize(
    ("checkpoint", "is_saved"),
    [
        ({}, True),
        ({"every_minutes": 0}, False),
        ({"every_minutes": 0, "every": 100}, False),
        ({"every_minutes": 0, "every": 99}, True),
        ({"every_minutes": 0.5, "every": 0}, True),
    ],
)
def test_a_run_that_would_lose_everything_is_a_problem(checkpoint: dict[str, Any], is_saved: bool) -> None:
    problems = [p for p in setting_warnings(config(**checkpoint)) if p.field == "checkpoint.every_minutes"]
    assert bool(problems) != is_saved
    assert all("before the end of 100 steps" in problem.problem for problem in problems)
