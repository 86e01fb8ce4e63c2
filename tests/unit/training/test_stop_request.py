from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_sdsearch.training.stop_request import (
    LAUNCHER_GONE,
    SAME_REQUEST_S,
    StopRequest,
    announcement,
    write_stopped,
)

SIGNALS = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP]


class Peers:
    """Stands for ParallelState: the other rank has heard ``theirs``."""

    def __init__(self, theirs: str = "", *, is_main: bool = True) -> None:
        self.theirs = theirs
        self.is_main = is_main

    def all_gather_object(self, value: str) -> list[str]:
        return [value, self.theirs]


@pytest.fixture(autouse=True)
def _no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)


def request(theirs: str = "", *, is_main: bool = True, said: list[str] | None = None) -> StopRequest:
    peers: Any = Peers(theirs, is_main=is_main)
    heard: list[str] = [] if said is None else said
    return StopRequest(peers, heard.append)


def wait_for(said: list[str]) -> list[str]:
    deadline = time.monotonic() + 10
    while not said and time.monotonic() < deadline:
        time.sleep(0.001)
    return said


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_heard_and_handlers_are_given_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with request() as stop:
        assert not stop.is_agreed()
        os.kill(os.getpid(), number)
        assert stop.is_agreed()
        assert stop.name == number.name
    assert signal.getsignal(number) == before


def test_the_first_rank_says_at_once_that_it_has_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    with request(said=said) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert wait_for(said) == [announcement("SIGINT", is_under_torchrun=False)], "no rank has agreed yet"
        assert stop.is_agreed()
    assert len(said) == 1
    assert said[0].startswith("SIGINT: stopping")
    assert "Ctrl-C again ends the run at once" in said[0]
    assert "--shutdown-timeout" in announcement("SIGINT", is_under_torchrun=True)


def test_what_another_rank_has_heard_is_said_by_the_first_one_alone() -> None:
    first: list[str] = []
    other: list[str] = []
    with request(theirs="SIGTERM", said=first) as stop:
        assert stop.is_agreed()
        assert wait_for(first)[0].startswith("SIGTERM: ")
    with request(is_main=False, said=other) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.is_agreed()
    assert other == []


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with request() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.is_agreed()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_terminal_that_has_gone_is_not_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "isatty", lambda descriptor: descriptor == 1)
    pointed: list[int] = []
    monkeypatch.setattr(os, "dup2", lambda _, descriptor: pointed.append(descriptor))
    with request() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.is_agreed()
    assert pointed == [1]


@pytest.mark.parametrize(
    ("has_torchrun", "second", "after_s", "ends"),
    [
        (False, signal.SIGINT, 0.2, True),  # a person, twice
        (True, signal.SIGINT, 0.2, False),  # the terminal of srun, and torchrun's own hand
        (True, signal.SIGINT, SAME_REQUEST_S + 0.1, True),
        (True, signal.SIGTERM, 0.2, True),  # torchrun's answer to a second Ctrl-C
    ],
)
def test_ctrl_c_again_ends_at_once(
    has_torchrun: bool, second: signal.Signals, after_s: float, ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if has_torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    sent: list[tuple[int, Any]] = []
    with request() as stop:
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now)
        stop._on_signal(signal.SIGINT, None)
        monkeypatch.setattr(os, "kill", lambda _, number: sent.append((number, signal.getsignal(number))))
        monkeypatch.setattr(time, "monotonic", lambda: now + after_s)
        stop._on_signal(second, None)
    assert sent == ([(second, signal.SIG_DFL)] if ends else [])


def test_what_another_rank_has_heard_counts() -> None:
    with request(theirs="SIGUSR1") as stop:
        assert stop.is_agreed()
    assert stop.name == "SIGUSR1"


def test_the_second_signal_ends_unless_it_is_the_first_again(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, Any]] = []
    with request() as stop:
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now)
        stop._on_signal(signal.SIGTERM, None)
        monkeypatch.setattr(time, "monotonic", lambda: now + SAME_REQUEST_S - 0.1)
        monkeypatch.setattr(os, "kill", lambda _, number: sent.append((number, signal.getsignal(number))))
        stop._on_signal(signal.SIGTERM, None)
        assert sent == []
        monkeypatch.setattr(time, "monotonic", lambda: now + SAME_REQUEST_S + 0.1)
        stop._on_signal(signal.SIGTERM, None)
        assert sent == [(signal.SIGTERM, signal.SIG_DFL)]


def test_a_launcher_that_has_gone_asks_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    with request() as stop:
        monkeypatch.setattr(os, "getppid", lambda: 1)
        assert stop.is_agreed()
    assert stop.name == LAUNCHER_GONE


def test_word_is_left(tmp_path: Path) -> None:
    write_stopped(tmp_path, "SIGTERM", 3)
    assert [path.name for path in tmp_path.iterdir()] == ["stopped.json"]
    assert json.loads((tmp_path / "stopped.json").read_text()) == {"signal": "SIGTERM", "step": 3}
