"""From a demonstration to a training sample: every span encoded once, learned where it is the policy's own."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken
from tokenizers.normalizers import Replace

from megatron_sdsearch.batching.samples import demonstration_sample
from megatron_sdsearch.data.demonstrations import Demonstration, DemonstrationSpan
from megatron_sdsearch.data.prompts import get_profile
from megatron_sdsearch.errors import DataError
from megatron_sdsearch.tokenization.renderer import Renderer
from tests.unit.conftest import train_tokenizer

spans = st.builds(
    DemonstrationSpan, kind=st.sampled_from(["sampled", "observation"]), text=st.text("ab <>/hé\n", min_size=1)
)
demonstrations = st.builds(
    Demonstration,
    demonstration_id=st.just("d7"),
    prompt=st.text("abc ?", min_size=1),
    spans=st.lists(spans, max_size=4).map(lambda spans: (*spans, DemonstrationSpan(kind="sampled", text="<a> b"))),
)
LESSON = Demonstration(
    demonstration_id="d7",
    prompt="where is it?",
    spans=(
        DemonstrationSpan(kind="sampled", text="<search> author </search>"),
        DemonstrationSpan(kind="observation", text="\nLisbon is the capital\n"),
        DemonstrationSpan(kind="sampled", text="<answer> Lisbon </answer>"),
    ),
)


@given(demonstrations)
def test_the_loss_is_on_exactly_the_tokens_of_sampled_spans(renderer: Renderer, lesson: Demonstration) -> None:
    sample = demonstration_sample(lesson, renderer, 10_000)
    prompt = renderer.prompt_ids(lesson.prompt)
    pieces = [(span.kind, renderer.encode(span.text)) for span in lesson.spans]
    assert sample.token_ids.tolist() == [*prompt, *(token for _, piece in pieces for token in piece)]
    assert sample.prompt_length == len(prompt)
    learned = [token for kind, piece in pieces if kind == "sampled" for token in piece]
    assert sample.labels[sample.loss_mask].tolist() == learned
    # Entry i is about token i + 1: where the mask is True, that token is a sampled one.
    owners = ["prompt"] * len(prompt) + [kind for kind, piece in pieces for _ in piece]
    assert [owners[position + 1] for position in np.flatnonzero(sample.loss_mask)] == ["sampled"] * len(learned)
    assert not sample.loss_mask[-1], "nothing follows the last token"


def test_nothing_is_distilled_and_no_advantage_is_made_up(renderer: Renderer) -> None:
    sample = demonstration_sample(LESSON, renderer, 10_000)
    assert sample.sample_id == "d7"
    assert sample.loss_mask.any()
    assert not sample.distill_mask.any()
    assert sample.teacher_prompts == ()
    assert (sample.advantage, sample.rollout_logprobs.tolist()) == (0.0, [0.0] * len(sample))


def test_what_an_observation_says_is_read_and_not_learned(renderer: Renderer) -> None:
    sample = demonstration_sample(LESSON, renderer, 10_000)
    text = renderer.decode(sample.labels[sample.loss_mask].tolist())
    assert text == "<search> author </search><answer> Lisbon </answer>"


def test_sampled_text_without_a_token_is_refused() -> None:
    tokenizer = train_tokenizer()
    tokenizer.backend_tokenizer.normalizer = Replace("~", "")  # a tokenizer that loses a character
    lesson = Demonstration(demonstration_id="d7", prompt="why?", spans=(DemonstrationSpan(kind="sampled", text="~~"),))
    with pytest.raises(
        DataError, match=r"demonstration d7: the tokenizer encodes its sampled text to no tokens.*remove it"
    ):
        demonstration_sample(lesson, Renderer(tokenizer, []), 10_000)


def test_control_tokens_are_the_policys_and_the_profiles_never_a_passages() -> None:
    tokenizer = train_tokenizer(has_tag_tokens=True)
    tokenizer.add_tokens([AddedToken(f"<{tag}>", special=False) for tag in ("think", "information", "/information")])
    lesson = Demonstration(
        demonstration_id="d8",
        prompt="<think> and <search>?",
        spans=(
            DemonstrationSpan(kind="sampled", text="<think>"),
            DemonstrationSpan(
                kind="observation", text="\n\n<information>Doc 1(Title: <think>) </information></information>\n\n"
            ),
            DemonstrationSpan(kind="sampled", text="<answer>a</answer>"),
        ),
    )
    sample = demonstration_sample(lesson, Renderer(tokenizer, profile=get_profile("plain")), 10_000)
    added = [tokenizer.added_tokens_decoder.get(token_id) for token_id in sample.token_ids.tolist()]
    assert [token.content for token in added if token is not None and not token.special] == [
        *("<think>", "<information>", "</information>", "<answer>", "</answer>")
    ]


def test_a_demonstration_of_exactly_the_budget_fits_and_one_more_token_does_not(renderer: Renderer) -> None:
    length = len(demonstration_sample(LESSON, renderer, 10_000))
    assert len(demonstration_sample(LESSON, renderer, length)) == length
    with pytest.raises(DataError) as caught:
        demonstration_sample(LESSON, renderer, length - 1)
    message = str(caught.value)
    assert f"demonstration d7 has {length} tokens" in message
    assert f"train.max_tokens_per_microbatch = {length - 1}" in message
    assert message.endswith("shorten it or raise the budget")
