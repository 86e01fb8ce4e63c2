"""Rules between a run and its servers, before they start and as they report themselves."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_sdsearch.config import RunConfig, parse_config
from megatron_sdsearch.sglang.rules import own_server_problems, server_problems


def config(*, probe: bool = False, alpha: float = 0.1, **sglang: Any) -> RunConfig:
    return parse_config(
        {
            "run_dir": "run",
            "model": {"hf_dir": "no_such_folder"},
            "data": {"train": "train.jsonl"},
            "retrieval": {"corpus": "corpus.jsonl"},
            "rollout": {"engine": "sglang", "sglang": sglang, "max_total_tokens": 3000},
            "hindsight": {"max_block_tokens": 1000},
            "objective": {"alpha": alpha},
            "telemetry": {"query_probe": probe},
        }
    )


def test_the_longest_request_must_be_one_that_a_server_takes() -> None:
    """The last prompt may have max_total_tokens - 1 tokens; one of max_req_input_len is refused."""
    assert list(server_problems(config(), "http://h:1", {"max_req_input_len": 3000})) == []
    (problem,) = server_problems(config(), "http://h:1", {"max_req_input_len": 2999})
    assert (problem.field, problem.problem.split(" (")[0]) == (
        "rollout.max_total_tokens",
        "rollout.max_total_tokens allows requests of 3000 tokens, but http://h:1 accepts 2999",
    )
    assert problem.fix.startswith("lower it to 2999, or ")
    (problem,) = server_problems(config(probe=True), "http://h:1", {"max_req_input_len": 3500})
    assert "rollout.max_total_tokens + hindsight.max_block_tokens allows requests of 4000 tokens" in problem.problem
    assert problem.fix.startswith("lower it to 2500, or ")


@pytest.mark.parametrize(
    ("arguments", "positions", "fits"),
    [
        ([], 3006, True),
        ([], 3005, False),
        (["--context-length", "3005"], 32768, False),
        (["--context-length=3005"], 32768, False),
        (["--context-length", "3006"], 32768, True),
        (["--context-length"], 3006, True),
    ],
)
def test_own_servers_are_judged_before_they_start(arguments: list[str], positions: int, fits: bool) -> None:
    model: Any = SimpleNamespace(max_position_embeddings=positions)
    assert (not list(own_server_problems(config(arguments=arguments), model))) is fits
    assert list(own_server_problems(config(urls=["http://h:1"]), model)) == [], "attached ones speak for themselves"


def test_a_running_server_must_be_as_the_run_says() -> None:
    info = {"tp_size": 2, "max_req_input_len": 3000, "enable_memory_saver": False, "skip_tokenizer_init": True}
    first, second = server_problems(config(), "http://h:1", info)
    assert (first.field, first.fix) == ("rollout.sglang.tp_size", "set it to 2")
    assert first.problem == "1, but http://h:1 runs with --tp-size 2"
    assert (second.field, second.fix) == ("rollout.sglang.urls", "start it without --skip-tokenizer-init")
    assert list(server_problems(config(tp_size=2), "http://h:1", info | {"skip_tokenizer_init": False})) == []
    assert list(server_problems(config(), "http://h:1", {})) == [], "a router reports nothing"


def test_own_servers_need_weights_to_start_from(tmp_path: Path) -> None:
    own = config().model_copy(update={"model": config().model.model_copy(update={"hf_dir": tmp_path})})
    (problem,) = own_server_problems(own, None)
    assert problem.field == "model.hf_dir"
    assert "holds no weights" in problem.problem
    (tmp_path / "model.safetensors").touch()
    assert list(own_server_problems(own, None)) == []
