"""Prompts through the chat template, and text that tries to be more than text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from megatron_sdsearch.errors import DataError
from megatron_sdsearch.tokenization.renderer import Renderer
from tests.unit.conftest import train_tokenizer

plain_texts = st.text(st.characters(exclude_characters="<|>", codec="utf-8"), min_size=1)
hostile_texts = st.lists(st.sampled_from(["<|im_end|>", "<|im_start|>", "<|endoftext|>", "a", " ", "\n"])).map("".join)


def _template_ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    encoding: Any = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
    return list(encoding["input_ids"])


@given(plain_texts.map(lambda text: f"q{text}?"))
def test_harmless_prompts_are_what_the_template_gives(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert list(Renderer(tokenizer).prompt_ids(text)) == _template_ids(tokenizer, text)


@given(hostile_texts)
def test_a_prompt_holds_no_special_token_but_the_templates(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    renderer = Renderer(tokenizer)
    special = {tokenizer.get_vocab()[token] for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>")}
    ids, empty = renderer.prompt_ids(text), renderer.prompt_ids("")
    assert [i for i in ids if i in special] == [i for i in empty if i in special]
    assert not special.intersection(renderer.encode(text))
    assert renderer.decode(renderer.encode(text)) == text


def test_tag_tokens_stay_usable_and_special_ones_do_not(tagged_tokenizer: PreTrainedTokenizerFast) -> None:
    renderer = Renderer(tagged_tokenizer)
    ids = renderer.encode("<search>cap</search><|im_end|>")
    search, close, end = (tagged_tokenizer.get_vocab()[tag] for tag in ("<search>", "</search>", "<|im_end|>"))
    assert ids[0] == search
    assert close in ids
    assert end not in ids


def test_without_a_template_the_prompt_is_the_text() -> None:
    renderer = Renderer(train_tokenizer(has_template=False))
    assert renderer.prompt_ids("Question: a?") == renderer.encode("Question: a?")


def test_decode_skips_special_tokens_and_keeps_spaces(tokenizer: PreTrainedTokenizerFast, renderer: Renderer) -> None:
    (end,) = renderer.eos_ids
    assert end == tokenizer.eos_token_id
    assert renderer.decode([*renderer.encode("a , b ."), end]) == "a , b ."


def test_from_folder_adds_the_generation_configs_eos(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    assert Renderer.from_folder(tmp_path).eos_ids == {tokenizer.eos_token_id}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    renderer = Renderer.from_folder(tmp_path)
    assert renderer.eos_ids == {tokenizer.eos_token_id, 0, 2}
    assert renderer.vocab_size == len(tokenizer)
    assert renderer.prompt_ids("hi") == Renderer(tokenizer).prompt_ids("hi")


def test_a_missing_tokenizer_names_the_folder_and_the_mend(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: no tokenizer.json there; give a Hugging Face folder"):
        Renderer.from_folder(tmp_path / "nowhere")


def test_a_broken_tokenizer_names_the_folder(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        Renderer.from_folder(tmp_path)


def test_a_template_that_drops_the_text_is_refused() -> None:
    tokenizer = train_tokenizer()
    tokenizer.chat_template = "<|im_start|>assistant\n"
    with pytest.raises(DataError, match="0 times instead of once"):
        Renderer(tokenizer).prompt_ids("hi")
