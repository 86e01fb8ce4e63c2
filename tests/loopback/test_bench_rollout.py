"""The rollout benchmark: what it counts is what was done, with both engines; how fast is the machine's matter."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from tests.loopback import fake_sglang
from tests.loopback.fake_sglang import FakeSGLang, running_in_thread
from tools.bench_rollout import _make_model, main

Bench = Callable[..., dict[str, Any]]
SIZES = ["--questions", "2", "--group", "3", "--searches", "2", "--new-tokens", "40", "--steps", "1"]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Bench:
    """Run it with arguments, and read the one line that it prints."""

    def run(*arguments: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", ["bench_rollout.py", *SIZES, *arguments])
        capsys.readouterr()
        main()
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    return run


def assert_is_consistent(found: dict[str, Any]) -> None:
    assert found["searches_per_trajectory"] == 2
    assert found["tokens_per_s"] / found["trajectories_per_s"] == pytest.approx(3 * 40, rel=1e-2)
    assert found["trajectories_per_s"] * found["s_per_step"] == pytest.approx(6, rel=1e-2)
    assert sum(found["seconds_per_trajectory"].values()) <= found["s_per_step"]


def test_the_embedded_engine_with_a_slow_search_and_few_places(bench: Bench) -> None:
    found = bench("--retriever", "tantivy", "--search-delay-s", "0.3", "--concurrency", "2")
    assert_is_consistent(found)
    assert found["max_running"] == 2
    assert found["seconds_per_trajectory"]["search"] >= 0.6
    assert found["seconds_per_trajectory"]["wait"] > 0


@pytest.mark.parametrize("version", ["default", "7"])
def test_attached_servers_whatever_version_they_hold(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    model = _make_model(tmp_path / "hf")
    monkeypatch.setattr(fake_sglang, "VOCAB_SIZE", AutoConfig.from_pretrained(model).vocab_size)
    fakes = [FakeSGLang(version=version) for _ in range(2)]
    with running_in_thread(fakes[0]), running_in_thread(fakes[1]):
        found = bench("--engine", "sglang", *urls(fakes), "--model", str(model))
    assert_is_consistent(found)
    assert sum(len(fake.requests) for fake in fakes) == 2 * 6 * 3  # warm-up and step, trajectories, turns
    for fake in fakes:
        assert fake.requests
        assert {route for route, _ in fake.calls} == {"/model_info"}, "it changes nothing"


def urls(fakes: list[FakeSGLang]) -> list[str]:
    return [argument for fake in fakes for argument in ("--url", fake.url)]


def test_servers_with_different_weights_are_refused(bench: Bench, tmp_path: Path) -> None:
    model = _make_model(tmp_path / "hf")
    fakes = [FakeSGLang(version=version) for version in ("1", "2")]
    with (
        running_in_thread(fakes[0]),
        running_in_thread(fakes[1]),
        pytest.raises(SystemExit, match=r"different weights: versions \['1', '2'\]"),
    ):
        bench("--engine", "sglang", *urls(fakes), "--model", str(model))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--engine", "sglang", "--url", "http://a:1"], "needs --url, and --model"),
        (["--url", "http://a:1"], "--url is of --engine sglang"),
        (["--new-tokens", "3"], "--new-tokens must be at least 16"),
        (["--search-delay-s", "nan"], "--search-delay-s must be 0 or more"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(
    bench: Bench, arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        bench(*arguments)
    assert caught.value.code == 2
    assert told in capsys.readouterr().err
