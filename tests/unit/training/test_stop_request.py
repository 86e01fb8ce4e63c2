from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_sdsearch.training.stop_request import LAUNCHER_GONE, SAME_REQUEST_S, StopRequest, write_stopped


class Peers:
    """Stands for ParallelState: the other rank has heard ``theirs``."""

    def __init__(self, theirs: str = "") -> None:
        self.theirs = theirs

    def all_gather_object(self, value: str) -> list[str]:
        return [value, self.theirs]


def request(theirs: str = "") -> StopRequest:
    peers: Any = Peers(theirs)
    return StopRequest(peers)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_heard_and_handlers_are_given_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with request() as stop:
        assert not stop.is_agreed()
        os.kill(os.getpid(), number)
        assert stop.is_agreed()
        assert stop.name == number.name
    assert signal.getsignal(number) == before


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
