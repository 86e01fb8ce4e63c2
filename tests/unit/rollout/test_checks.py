"""What is refused before anything is sampled: prompts that cannot be asked, requests that a server would not take."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_sdsearch.config import RunConfig, parse_config
from megatron_sdsearch.data.prompts import get_profile
from megatron_sdsearch.records import Question
from megatron_sdsearch.rollout.checks import (
    context_problems,
    own_server_problems,
    prompt_lengths,
    prompt_problems,
)
from megatron_sdsearch.tokenization.renderer import Renderer

PROFILE = get_profile("plain")
QUESTIONS = [
    Question(question_id=f"q{i}", text="where is " + "the far " * i, gold_answers=("x",)) for i in (300, 2, 500, 3)
]


def config(*, probe: bool = False, alpha: float = 0.1, **sglang: Any) -> RunConfig:
    return parse_config(
        {
            "run_dir": "run",
            "model": {"hf_dir": "model"},
            "data": {"train": "train.jsonl"},
            "retrieval": {"corpus": "corpus.jsonl"},
            "rollout": {"engine": "sglang", "sglang": sglang, "max_total_tokens": 3000},
            "hindsight": {"max_block_tokens": 1000},
            "objective": {"alpha": alpha},
            "telemetry": {"query_probe": probe},
        }
    )


def test_one_question_that_can_be_asked_is_enough(renderer: Renderer) -> None:
    lengths = prompt_lengths(QUESTIONS, renderer, PROFILE)
    assert list(prompt_problems(QUESTIONS, "data.train", renderer, PROFILE, lengths["q2"])) == []
    assert list(prompt_problems([], "data.train", renderer, PROFILE, 1)) == []


def test_none_that_can_be_asked_is_a_wrong_setting_with_the_length_that_is_needed(renderer: Renderer) -> None:
    lengths = prompt_lengths(QUESTIONS, renderer, PROFILE)
    limit = lengths["q2"] - 1
    (found,) = prompt_problems(QUESTIONS, "data.heldout", renderer, PROFILE, limit)
    assert found.field == "rollout.max_prompt_tokens"
    assert found.problem == (
        f"{limit}, and the prompts of all 4 questions of data.heldout are longer, the shortest has {lengths['q2']} "
        "tokens: none of their trajectories would begin"
    )
    assert found.fix == f"set it to at least {lengths['q500']}"


def test_the_longest_request_must_be_one_that_a_server_takes() -> None:
    """The last prompt may have max_total_tokens - 1 tokens; one of max_req_input_len is refused."""
    assert list(context_problems(config(), "http://h:1", 3000)) == []
    (problem,) = context_problems(config(), "http://h:1", 2999)
    assert (problem.field, problem.problem.split(" (")[0]) == (
        "rollout.max_total_tokens",
        "rollout.max_total_tokens makes requests of up to 3000 tokens, and http://h:1 takes 2999",
    )
    assert problem.fix.startswith("lower it to 2999, or ")
    (problem,) = context_problems(config(probe=True), "http://h:1", 3500)
    assert (
        "rollout.max_total_tokens + hindsight.max_block_tokens makes requests of up to 4000 tokens" in problem.problem
    )
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
