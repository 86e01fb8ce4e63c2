"""Real servers under the supervisor: they serve what transformers computes, and come back from SIGKILL."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.integration.sglang.conftest import (
    PROMPTS,
    Servers,
    assert_equals_transformers,
    generate,
    wait_until,
    weight_version,
)

pytestmark = pytest.mark.timeout(600)  # the first test waits for the servers


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_both_servers_sample_from_the_model_that_they_were_given(
    servers: Servers, models: tuple[Path, Path], temperature: float
) -> None:
    version = servers.load(models[0])
    for url in servers.urls:
        assert weight_version(url) == str(version)
        assert_equals_transformers(url, models[0], temperature)
    with pytest.raises(AssertionError):  # the other model is another one
        assert_equals_transformers(servers.urls[0], models[1], temperature)


def test_servers_sample_with_different_seeds(servers: Servers) -> None:
    first, second = (generate(url, PROMPTS, 1.0) for url in servers.urls)
    assert first != second


def test_a_killed_server_comes_back_with_the_published_weights(servers: Servers, models: tuple[Path, Path]) -> None:
    url = servers.urls[1]
    version = servers.load(models[1])
    old, old_segments = servers.main_process(url), servers.segments()
    before = servers.supervisor.restart_counts()
    seen: set[str | None] = set()

    def is_back() -> bool:
        seen.add(weight_version(url))
        return str(version) in seen and servers.supervisor.restart_counts()[url] == before[url] + 1

    old.send_signal(signal.SIGKILL)
    old.wait(10)
    seen.clear()
    wait_until(is_back, 400.0, servers.supervisor)
    assert seen <= {None, "default", str(version)}
    assert_equals_transformers(url, models[1], 0.0)
    assert servers.supervisor.restart_counts() == before | {url: before[url] + 1}
    gone = old_segments - servers.segments()
    assert len(gone) >= 2  # its load snapshot, a semaphore
    assert [segment for segment in gone if segment.exists()] == []
