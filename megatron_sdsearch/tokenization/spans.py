"""Turns token ids into bytes, and bytes into actions: which sampled tokens are a query.

Everything here works on exact bytes. A tag merges with its neighbours under BPE and a token may end in the middle of a
character, so neither ids nor decoded characters can say where a tag starts; byte offsets always can.
``renderer.py`` encodes and decodes whole texts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Literal, NamedTuple

from megatron_sdsearch.data.prompts import ACTION_TAGS
from megatron_sdsearch.errors import DataError
from megatron_sdsearch.records import Action, SampledSpan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_ANY_ACTION = re.compile(rb"<(search|answer)>(.*?)</\1>", re.DOTALL)
_ANSWER_ALONE = re.compile(rb"<(answer)>(.*?)</\1>", re.DOTALL)


def _byte_of_character() -> dict[str, int]:
    """The GPT-2 alphabet: printable Latin-1 stands for itself, every other byte for the next character from U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + rank): byte for rank, byte in enumerate(others)}


class TokenBytes:
    """The exact bytes of every id of a byte-level tokenizer.

    Special tokens have no bytes: they are never part of a text. Added tokens that are not special stand for their own
    characters. Ids that the tokenizer does not know (the padded end of an embedding) have no bytes either.

    Args:
        tokenizer: a fast tokenizer.
        tags: that must have bytes, besides those of actions.

    Raises:
        DataError: the tokenizer is not byte-level, so an id's bytes depend on its neighbours; or a special token holds
            one of the tags, which would vanish from every text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, tags: Iterable[str] = ()) -> None:
        _check_is_byte_level(tokenizer)
        alphabet = _byte_of_character()
        added, special = tokenizer.added_tokens_decoder, special_tokens(tokenizer)
        if lost := sorted({name for name in special.values() for tag in {*ACTION_TAGS, *tags} if tag in name}):
            raise DataError(
                f"{', '.join(lost)}: a special token of the tokenizer vanishes from what the policy writes; add it as "
                "a token that is not special"
            )
        vocab = tokenizer.get_vocab()
        self._table = [b""] * (max(vocab.values()) + 1)
        for text, token_id in vocab.items():
            if token_id in special:
                continue
            if token_id in added or any(character not in alphabet for character in text):
                self._table[token_id] = text.encode()  # as the tokenizer's own decoder does outside its alphabet
            else:
                self._table[token_id] = bytes(alphabet[character] for character in text)

    def __getitem__(self, token_id: int) -> bytes:
        return self._table[token_id] if 0 <= token_id < len(self._table) else b""

    def lookup(self, ids: Sequence[int]) -> list[bytes]:
        """Bytes of each of ``ids``."""
        return [self[token_id] for token_id in ids]


def special_tokens(tokenizer: PreTrainedTokenizerFast) -> dict[int, str]:
    """Every special token by its id: those with a role (beginning, end, padding) and those only marked as special."""
    roles = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    return roles | {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def _check_is_byte_level(tokenizer: PreTrainedTokenizerFast) -> None:
    supported = (
        "supported are byte-level tokenizers with a tokenizer.json: GPT-2, Llama 3, Qwen 2 and later, Mistral's Tekken "
        "(Mistral-Nemo); not SentencePiece (Llama 2, Mistral 7B v0.1 to v0.3)"
    )
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise DataError(f"{type(tokenizer).__name__} is not a fast tokenizer; {supported}")
    state = json.loads(backend.to_str())
    decoder = state["decoder"] or {"type": "none"}
    types = {step["type"] for step in decoder.get("decoders", [decoder])}
    if types != {"ByteLevel"}:
        raise DataError(f"{state['model']['type']} tokenizer with decoder {'+'.join(sorted(types))}; {supported}")


class StopMatcher:
    """Detects, token by token, when one generation has written a stop string.

    A stop string may straddle tokens, and its last token may run past it.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(text.encode() for text in stop)
        self._keep = max((len(text) for text in self._stop), default=1) - 1
        self._tail = b""

    def push(self, token: bytes) -> bool:
        """Take the next token's bytes; True when a stop string ends inside it."""
        written = self._tail + token
        self._tail = written[len(written) - self._keep :] if len(written) > self._keep else written
        return any(text in written for text in self._stop)


class ParsedAction(NamedTuple):
    """What a sampled span asks for; fields as in ``SampledSpan``."""

    action: Action
    argument: str
    query_positions: tuple[int, ...]
    text: str


def parse_action(token_bytes: Sequence[bytes], *, allow_search: bool = True) -> ParsedAction:
    """Read the first ``<search>...</search>`` or ``<answer>...</answer>`` of a sampled span.

    A query is the tokens all of whose bytes lie strictly between the tags: one that shares a byte with a tag is out,
    and so are special tokens, which have no bytes. A search for nothing but white space is INVALID, because an engine
    answers it with an error or with nothing.

    Args:
        token_bytes: bytes of each sampled token; they need not be valid UTF-8.
        allow_search: False on the last turn, where a search is text like any other.
    """
    written = b"".join(token_bytes)
    text = written.decode(errors="replace")
    match = (_ANY_ACTION if allow_search else _ANSWER_ALONE).search(written)
    argument = match[2].decode(errors="replace").strip() if match else ""
    if match is None or (match[1] == b"search" and not argument):
        return ParsedAction(action=Action.INVALID, argument="", query_positions=(), text=text)
    if match[1] == b"answer":
        return ParsedAction(action=Action.ANSWER, argument=argument, query_positions=(), text=text)
    first, last = match.span(2)
    ends = accumulate(len(token) for token in token_bytes)
    positions = tuple(
        position
        for position, (token, end) in enumerate(zip(token_bytes, ends, strict=True))
        if token and first <= end - len(token) and end <= last
    )
    return ParsedAction(action=Action.SEARCH, argument=argument, query_positions=positions, text=text)


def span_of(
    token_bytes: TokenBytes,
    *,
    token_ids: Sequence[int],
    logprobs: Sequence[float],
    finish_reason: Literal["stop", "eos", "length", "abort"],
    policy_version: int,
    allow_search: bool = True,
) -> SampledSpan:
    """The record of one engine call: its ids as sampled, with the action that their bytes spell.

    Raises:
        ValueError: ``token_ids`` and ``logprobs`` differ in length.
    """
    parsed = parse_action(token_bytes.lookup(token_ids), allow_search=allow_search)
    return SampledSpan(
        token_ids=tuple(token_ids),
        logprobs=tuple(logprobs),
        policy_version=policy_version,
        finish_reason=finish_reason,
        **parsed._asdict(),
    )
