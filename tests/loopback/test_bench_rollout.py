"""The rollout benchmark: what it counts is what was done, with both engines; how fast is the machine's matter."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from tests.loopback import fake_sglang
from tests.loopback.fake_sglang import FakeSGLang, running_in_thread
from tests.unit.check.tiny_run import TinyRun, save_model
from tools.bench_rollout import main

Bench = Callable[..., dict[str, Any]]
SIZES = ["data.questions_per_step=2", "rollout.group_size=3", "rollout.max_response_tokens=40", "rollout.max_turns=2"]
LENGTHS = ["rollout.max_observation_tokens=64", "rollout.max_total_tokens=500", "train.max_tokens_per_microbatch=1024"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def bench(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Bench:
    """Run it with arguments, and read the one line that it prints."""
    config = TinyRun(tmp_path, model).config

    def run(*overrides: str) -> dict[str, Any]:
        command = ["bench_rollout.py", str(config), *SIZES, *LENGTHS, *overrides, "--steps", "1"]
        monkeypatch.setattr(sys, "argv", command)
        capsys.readouterr()
        main()
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    return run


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def assert_is_consistent(found: dict[str, Any]) -> None:
    assert found["searches_per_trajectory"] == 2
    assert found["tokens_per_s"] / found["trajectories_per_s"] == pytest.approx(3 * 40, rel=1e-2)
    assert found["trajectories_per_s"] * found["s_per_step"] == pytest.approx(6, rel=1e-2)


def serve(stack: ExitStack, *versions: str) -> tuple[list[FakeSGLang], list[str]]:
    fakes = [stack.enter_context(running_in_thread(FakeSGLang(version=version))) for version in versions]
    return fakes, ["rollout.engine=sglang", f"rollout.sglang.urls={[fake.url for fake in fakes]}"]


def test_the_embedded_engine(bench: Bench) -> None:
    assert_is_consistent(bench())


@pytest.mark.parametrize("version", ["default", "7"])
def test_attached_servers_whatever_version_they_hold(
    bench: Bench, stack: ExitStack, model: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(fake_sglang, "VOCAB_SIZE", AutoConfig.from_pretrained(model).vocab_size)
    fakes, overrides = serve(stack, version, version)
    assert_is_consistent(bench(*overrides))
    assert sum(len(fake.requests) for fake in fakes) == 2 * 6 * 3  # warm-up and step, trajectories, turns
    for fake in fakes:
        assert fake.requests
        assert {route for route, _ in fake.calls} == {"/model_info"}, "it changes nothing"


def test_servers_with_different_weights_are_refused(bench: Bench, stack: ExitStack) -> None:
    _, overrides = serve(stack, "1", "2")
    with pytest.raises(SystemExit, match=r"different weights: versions \['1', '2'\]"):
        bench(*overrides)
