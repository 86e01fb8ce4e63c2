"""What is refused before anything is sampled: prompts that cannot be asked."""

from __future__ import annotations

from megatron_sdsearch.data.prompts import get_profile
from megatron_sdsearch.records import Question
from megatron_sdsearch.rollout.checks import prompt_lengths, prompt_problems
from megatron_sdsearch.tokenization.renderer import Renderer

PROFILE = get_profile("plain")
QUESTIONS = [
    Question(question_id=f"q{i}", text="where is " + "the far " * i, gold_answers=("x",)) for i in (300, 2, 500, 3)
]


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
        f"{limit}, but the prompts of all 4 questions of data.heldout are longer (the shortest has {lengths['q2']} "
        "tokens), so no trajectory would be sampled"
    )
    assert found.fix == f"set it to at least {lengths['q500']}"
