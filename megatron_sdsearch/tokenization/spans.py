"""Converts token ids to bytes, finds actions in them, and the sampled tokens of a query.

Works on exact bytes: BPE merges tags with their neighbours and a token may end inside a character, so the start of a
tag can be located neither in ids nor in decoded characters. ``renderer.py`` encodes and decodes whole texts.
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
    """GPT-2's alphabet: printable Latin-1 bytes map to themselves, other bytes to characters from U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + rank): byte for rank, byte in enumerate(others)}


class TokenBytes:
    """The exact bytes of every id of a byte-level tokenizer.

    Special tokens and unknown ids (the padding of an embedding) have no bytes. Added tokens that are not special have
    those of their text.

    Args:
        tokenizer: a fast tokenizer.
        tags: must have bytes, like the tags of actions.

    Raises:
        DataError: the tokenizer is not byte-level, so that an id's bytes depend on its neighbours; or a special token
            contains one of the tags, which would vanish from every text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, tags: Iterable[str] = ()) -> None:
        _check_is_byte_level(tokenizer)
        alphabet = _byte_of_character()
        added, special = tokenizer.added_tokens_decoder, special_tokens(tokenizer)
        if lost := sorted({name for name in special.values() for tag in {*ACTION_TAGS, *tags} if tag in name}):
            problem = "special tokens of the tokenizer vanish from the policy's text"
            raise DataError(f"{', '.join(lost)}: {problem}; add them as tokens that are not special")
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
        """Return the bytes of each id."""
        return [self[token_id] for token_id in ids]


def special_tokens(tokenizer: PreTrainedTokenizerFast) -> dict[int, str]:
    """Return special tokens by id: those with a role (beginning, end, padding) and those only marked as special."""
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
    """Detects stop strings in a generation, token by token.

    A stop string may span tokens, and its last token may extend past it.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(text.encode() for text in stop)
        self._keep = max((len(text) for text in self._stop), default=1) - 1
        self._tail = b""

    def push(self, token: bytes) -> bool:
        """Add the next token's bytes; True if a stop string ends in them."""
        written = self._tail + token
        self._tail = written[len(written) - self._keep :] if len(written) > self._keep else written
        return any(text in written for text in self._stop)


class ParsedAction(NamedTuple):
    """The action of a sampled span; fields as in ``SampledSpan``."""

    action: Action
    argument: str
    query_positions: tuple[int, ...]
    text: str


def parse_action(token_bytes: Sequence[bytes], *, allow_search: bool = True) -> ParsedAction:
    """Parse the first ``<search>...</search>`` or ``<answer>...</answer>`` of a sampled span.

    A query consists of the tokens that lie entirely between the tags: not those that share a byte with a tag, nor
    special tokens, which have no bytes. A blank query is INVALID, because engines answer it with an error or no hits.

    Args:
        token_bytes: bytes of each sampled token, not necessarily valid UTF-8.
        allow_search: False on the last turn, where a search is ordinary text.
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
    """Create the record of one engine call: its sampled ids, and the action that they spell.

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
