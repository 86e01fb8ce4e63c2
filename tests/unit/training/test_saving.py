"""When a run saves: by steps, by the first rank's clock, at the end."""

from __future__ import annotations

from datetime import date
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_sdsearch.config import RunConfig, parse_config, setting_warnings
from megatron_sdsearch.logging import names
from megatron_sdsearch.model.checkpoint import TrainingState
from megatron_sdsearch.training import saving
from megatron_sdsearch.training.saving import CheckpointScheduler


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


class Store:
    """Stands for CheckpointStore and remembers its calls."""

    def __init__(self, *_: Any) -> None:
        self.calls: list[tuple[str, int]] = []
        self.states: list[TrainingState] = []

    def load(self) -> TrainingState:
        return TrainingState(step=2, wall_s=30.0, scores={1: 0.1, 2: 0.2, 3: 0.3})

    def save(self, state: TrainingState) -> None:
        self.calls.append(("save", state.step))
        self.states.append(state)

    def poll(self) -> None:
        self.calls.append(("poll", 0))

    def finish(self) -> None:
        self.calls.append(("finish", 0))

    def prune(self, state: TrainingState) -> None:
        self.calls.append(("prune", state.step))


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    store = Store()
    monkeypatch.setattr(saving, "CheckpointStore", lambda *_: store)
    return store


def config(num_steps: int = 100, **checkpoint: Any) -> RunConfig:
    tree: dict[str, Any] = {"run_dir": "r", "model": {"hf_dir": "m"}, "data": {"train": "t"}}
    settings = {"train": {"num_steps": num_steps}, "checkpoint": checkpoint}
    return parse_config(tree | settings | {"retrieval": {"corpus": "c"}})


def scheduler(config: RunConfig, clock: Clock, peers: Any = None) -> CheckpointScheduler:
    policy: Any = SimpleNamespace(parallel=peers or Peers())
    return CheckpointScheduler(config, policy, 0.0, date(2025, 2, 5), clock)


def saved(store: Store, config: RunConfig, minutes_per_step: float, peers: Any = None) -> list[int]:
    clock = Clock()
    checkpoints = scheduler(config, clock, peers)
    store.calls.clear()
    for step in range(1, config.train.num_steps + 1):
        clock.minutes += minutes_per_step
        checkpoints.after_step(step)
    assert len(store.calls) == config.train.num_steps, "where nothing is due, a save that was begun may be completed"
    return [step for call, step in store.calls if call == "save"]


def test_by_default_half_an_hour_is_the_most_that_a_crash_costs(store: Store) -> None:
    assert saved(store, config(), minutes_per_step=7) == [5, 10, 15, 20, *range(25, 100, 5), 100]
    assert saved(store, config(num_steps=3), minutes_per_step=45) == [1, 2, 3]
    assert saved(store, config(num_steps=40), minutes_per_step=0.01) == [40]


def test_minutes_count_from_the_last_save_of_either_kind(store: Store) -> None:
    assert saved(store, config(num_steps=20, every=8, every_minutes=30), minutes_per_step=5) == [6, 8, 14, 16, 20]


def test_without_minutes_no_clock_is_looked_at_and_no_rank_asked(store: Store) -> None:
    peers = Peers()
    settings = config(num_steps=6, every=4, every_minutes=0)
    assert saved(store, settings, minutes_per_step=1000, peers=peers) == [4, 6]
    assert peers.num_calls == 0


@pytest.mark.parametrize(("first", "steps"), [(True, [1, 2, 3]), (False, [3])])
def test_the_first_ranks_clock_decides_for_all(store: Store, first: bool, steps: list[int]) -> None:
    assert saved(store, config(num_steps=3), minutes_per_step=20, peers=Peers(first)) == steps


def test_time_and_scores_go_on_from_the_loaded_state_and_the_end_is_saved_whole(store: Store) -> None:
    clock = Clock()
    checkpoints = scheduler(config(), clock)
    assert checkpoints.load().step == 2
    clock.minutes = 1
    assert checkpoints.wall_s == 90.0
    checkpoints.score(3, {names.EVAL_EM: 0.5})
    checkpoints.score(4, {"eval/f1": 0.9})
    checkpoints.finish(4)
    assert store.calls == [("save", 4), ("finish", 0), ("prune", 4)]
    assert store.states == [
        TrainingState(step=4, wall_s=90.0, scores={1: 0.1, 2: 0.2, 3: 0.5}, run_date=date(2025, 2, 5))
    ]


def test_nothing_is_saved_of_a_run_that_stops_before_its_first_step(store: Store) -> None:
    scheduler(config(), Clock()).finish(0)
    assert store.calls == [("finish", 0), ("prune", 0)]


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
