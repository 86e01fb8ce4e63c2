"""Bytes of tokens, stop strings, and actions under any segmentation of the bytes."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_sdsearch.errors import DataError
from megatron_sdsearch.records import Action
from megatron_sdsearch.tokenization.spans import StopMatcher, TokenBytes, parse_action, span_of
from tests.unit.conftest import wrap

_PIECES = ["<search>", "</search>", "<answer>", "</answer>", " ", "cap", "é", "日本", "<", ">", "/", "\n", "<|im_end|>"]
texts = st.lists(st.sampled_from(_PIECES), max_size=12).map("".join)


@st.composite
def segmented(draw: st.DrawFn, source: st.SearchStrategy[bytes]) -> list[bytes]:
    """Some bytes, cut anywhere, also inside characters and tags, with empty tokens in between."""
    data = draw(source)
    cuts = draw(st.lists(st.integers(0, len(data)), max_size=12))
    return [data[start:end] for start, end in pairwise(sorted([0, *cuts, len(data)]))]


@given(st.text())
def test_bytes_of_ids_join_to_the_text(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert b"".join(TokenBytes(tokenizer).lookup(ids)) == text.encode()


def test_special_added_and_unknown_ids(tagged_tokenizer: PreTrainedTokenizerFast) -> None:
    token_bytes = TokenBytes(tagged_tokenizer)
    start, end, tag = (tagged_tokenizer.get_vocab()[token] for token in ("<|im_start|>", "<|im_end|>", "</search>"))
    assert token_bytes.lookup([start, end, tag, len(tagged_tokenizer) + 3, -1]) == [b"", b"", b"</search>", b"", b""]


def test_other_tokenizer_families_are_refused_by_name() -> None:
    backend = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(DataError, match="WordLevel tokenizer with decoder none; supported are byte-level"):
        TokenBytes(wrap(backend))


def test_a_tag_as_special_token_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    spoilt = wrap(Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))
    spoilt.add_special_tokens({"additional_special_tokens": ["<search>"]})
    with pytest.raises(DataError, match="<search>: special tokens"):
        TokenBytes(spoilt)


def test_tags_that_would_vanish_are_refused_by_name(tokenizer: PreTrainedTokenizerFast) -> None:
    spoilt = wrap(Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))
    spoilt.add_special_tokens({"additional_special_tokens": ["<refine>", "</think>\n", "<other>"]})
    TokenBytes(spoilt)  # another profile's
    with pytest.raises(DataError, match="</think>\n, <refine>: special tokens of the tokenizer vanish"):
        TokenBytes(spoilt, ["<refine>", "</refine>", "</think>"])


def test_sentencepiece_is_refused_with_what_is_supported() -> None:
    backend = Tokenizer(models.BPE({"<unk>": 0, "▁": 1, "a": 2, "▁a": 3}, [("▁", "a")], unk_token="<unk>"))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    with pytest.raises(DataError, match=r"ByteFallback.*; supported are .*Mistral-Nemo.*not .*Mistral 7B v0.1 to v0.3"):
        TokenBytes(wrap(backend))


@pytest.mark.parametrize(
    ("text", "action", "argument"),
    [
        ("<search> a b </search>", Action.SEARCH, "a b"),
        ("<think>x</think><answer>\n y </answer> rest", Action.ANSWER, "y"),
        ("<answer>1</answer><search>2</search>", Action.ANSWER, "1"),
        ("<search>1</search><answer>2</answer>", Action.SEARCH, "1"),
        ("<search>open <answer>2</answer>", Action.ANSWER, "2"),
        ("<search>a <search>b</search>", Action.SEARCH, "a <search>b"),
        ("<answer></answer>", Action.ANSWER, ""),
        ("<search> \n </search>", Action.INVALID, ""),
        ("</search><search>", Action.INVALID, ""),
        ("", Action.INVALID, ""),
    ],
)
def test_first_action(text: str, action: Action, argument: str) -> None:
    parsed = parse_action([text.encode()])
    assert (parsed.action, parsed.argument, parsed.text) == (action, argument, text)


def test_a_search_on_the_last_turn_is_text() -> None:
    token_bytes = [b"<search>", b"q", b"</search>", b"<answer>", b"a", b"</answer>"]
    parsed = parse_action(token_bytes, allow_search=False)
    assert (parsed.action, parsed.argument, parsed.query_positions) == (Action.ANSWER, "a", ())
    assert parse_action(token_bytes[:3], allow_search=False).action is Action.INVALID


def test_tokens_that_share_a_byte_with_a_tag_are_no_query() -> None:
    token_bytes = [b"x<sea", b"rch> ", b"who", b"", b" wrote", b" it<", b"/search>\n"]
    assert parse_action(token_bytes).query_positions == (2, 4)
    assert parse_action(token_bytes).argument == "who wrote it"


@given(segmented(texts.map(str.encode)))
def test_query_positions_survive_any_segmentation(token_bytes: list[bytes]) -> None:
    whole = parse_action([b"".join(token_bytes)])
    parsed = parse_action(token_bytes)
    assert (parsed.action, parsed.argument, parsed.text) == (whole.action, whole.argument, whole.text)
    # The oracle labels every byte: one byte per token says exactly which bytes are query.
    single = [bytes([byte]) for byte in b"".join(token_bytes)]
    query_bytes = set(parse_action(single).query_positions)
    if whole.action is Action.SEARCH:
        assert b"".join(single[position] for position in sorted(query_bytes)).decode().strip() == whole.argument
    offset, expected = 0, []
    for position, token in enumerate(token_bytes):
        if token and query_bytes.issuperset(range(offset, offset + len(token))):
            expected.append(position)
        offset += len(token)
    assert list(parsed.query_positions) == expected


@given(segmented(st.binary(max_size=40)))
def test_bytes_that_are_no_text_do_not_crash(token_bytes: list[bytes]) -> None:
    assert parse_action(token_bytes).text == b"".join(token_bytes).decode(errors="replace")


@given(st.lists(st.sampled_from([" ", "cap", "é", "日本", "<", "x>", "?"]), max_size=8).map("".join))
def test_query_tokens_of_a_real_tokenizer_lie_inside_the_query(tokenizer: PreTrainedTokenizerFast, query: str) -> None:
    text = f"<think>t</think><search>{query}</search>\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    token_bytes = TokenBytes(tokenizer)
    span = span_of(token_bytes, token_ids=ids, logprobs=[-1.0] * len(ids), finish_reason="stop", policy_version=3)
    written = b"".join(token_bytes.lookup([ids[position] for position in span.query_positions]))
    assert written in query.encode()
    assert span.token_ids == tuple(ids)
    assert (span.action is Action.SEARCH) == bool(query.strip())


@given(segmented(texts.map(str.encode)), st.lists(st.sampled_from(_PIECES), min_size=1, max_size=2))
def test_stop_matcher_fires_at_the_token_that_completes_a_stop(token_bytes: list[bytes], stop: list[str]) -> None:
    matcher = StopMatcher(stop)
    written = b""
    for token in token_bytes:
        written += token
        is_complete = any(text.encode() in written for text in stop)
        if not token and not is_complete:
            continue
        assert matcher.push(token) == is_complete
        if is_complete:
            return
