"""Wraps a tokenizer: prompts with the chat template, encoding and decoding.

Questions, passages and queries are untrusted, so nothing in them may become a control token, special or not. Only the
chat template and the profile's own strings produce such tokens; elsewhere their names are ordinary text.
``chat_template.py`` renders chat templates, ``spans.py`` finds actions and their positions.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tokenizers import Tokenizer

from megatron_sdsearch.data.prompts import PromptProfile
from megatron_sdsearch.errors import ConfigError, DataError
from megatron_sdsearch.file_kinds import refuse_other_kind
from megatron_sdsearch.tokenization.chat_template import ARGUMENTS, ChatTemplate
from megatron_sdsearch.tokenization.spans import TokenBytes, special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_FILES: Final = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


class Renderer:
    """One tokenizer with its chat template.

    Args:
        tokenizer: a fast tokenizer of the byte-level BPE family.
        eos_ids: ids that end a generation, besides the tokenizer's own end-of-sequence id.
        profile: its own strings may contain control tokens; None allows none.
        arguments: of the chat template.
        run_date: the date for the chat template; today by default.
        field: setting of the tokenizer's folder, for errors.

    Raises:
        DataError: the tokenizer is not supported, one of the profile's tags is a special token, or ordinary text
            encodes to a special token.
        ConfigError: the chat template cannot be used, or not with these arguments.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        eos_ids: Iterable[int] = (),
        *,
        profile: PromptProfile | None = None,
        arguments: Mapping[str, Any] | None = None,
        run_date: date | None = None,
        field: str = "model.hf_dir",
    ) -> None:
        self._tokenizer = tokenizer
        self._profile = profile
        own = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        self.eos_ids: frozenset[int] = frozenset((*own, *eos_ids))
        self.token_bytes = TokenBytes(tokenizer, profile.tags if profile is not None else ())
        self._text_only = _without_added_tokens(tokenizer)
        # Not blanks or single characters, which some tokenizers add as pieces of ordinary text.
        self._controls = {
            token_id: token.content
            for token_id, token in tokenizer.added_tokens_decoder.items()
            if len(token.content.strip()) > 1
        }
        self._before, self._after = self._around_user_text(arguments or {}, run_date or date.today(), field)

    @classmethod
    def from_folder(
        cls,
        hf_dir: Path,
        *,
        profile: PromptProfile | None = None,
        arguments: Mapping[str, Any] | None = None,
        run_date: date | None = None,
        field: str = "model.hf_dir",
    ) -> Renderer:
        """Read the tokenizer and the end-of-sequence ids of a model's folder; arguments as above.

        Raises:
            DataError: the folder holds no readable tokenizer, or as above.
            ConfigError: as above.
        """
        from transformers import AutoTokenizer  # takes seconds to import

        fix = "give a Hugging Face folder that holds tokenizer.json and tokenizer_config.json"
        if not (hf_dir / "tokenizer.json").is_file():
            raise DataError(f"{hf_dir}: contains no tokenizer.json; {fix}")
        for name in _FILES:
            refuse_other_kind(hf_dir / name, "JSON")
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(hf_dir, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # the Rust library raises a bare Exception
            reason = " ".join(str(error).split())
            raise DataError(f"{hf_dir}: the tokenizer cannot be read ({reason}); {fix}") from error
        eos_ids = _configured_eos_ids(hf_dir)
        return cls(tokenizer, eos_ids, profile=profile, arguments=arguments, run_date=run_date, field=field)

    @property
    def vocab_size(self) -> int:
        """Number of ids of the tokenizer; the model's embedding may be padded beyond it."""
        return len(self._tokenizer)

    @property
    def has_template(self) -> bool:
        """True if prompts use a chat template; without one they are the raw text."""
        return self._tokenizer.chat_template is not None

    def prompt_ids(self, user_text: str) -> tuple[int, ...]:
        """Encode a conversation with one user message, up to the start of the assistant's reply.

        Without a chat template this is the raw text, after a beginning-of-sequence token if the tokenizer adds one. The
        text is inserted after rendering, so a template cannot trim it: callers pass stripped text.
        """
        return (*self._before, *self.encode(user_text), *self._after)

    def encode(self, text: str) -> tuple[int, ...]:
        """Encode untrusted text: names of control tokens in it stay ordinary text. Adds no tokens.

        Control tokens in the profile's own strings (instructions, tags around an observation) are kept, as in
        ``encode_own``. A text without names of control tokens has the tokenizer's usual ids.
        """
        encoding = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)[0]
        if self._controls.keys().isdisjoint(encoding.ids):
            return tuple(encoding.ids)
        return tuple(self._with_own_alone(text, encoding.ids, encoding.offsets))

    def encode_own(self, text: str) -> tuple[int, ...]:
        """Encode the profile's own strings or sampled text; only special tokens stay ordinary text."""
        return tuple(self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ``ids`` without special tokens, for display and scoring; encoding the text may give other ids."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _with_own_alone(self, text: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]]) -> Iterator[int]:
        """Yield ids with control tokens only inside the profile's own strings."""
        own_spans = self._profile.own_spans(text) if self._profile is not None else []
        position = 0
        for token_id, (start, end) in zip(ids, offsets, strict=True):
            is_own = token_id in self._controls and any(first <= start and end <= last for first, last in own_spans)
            # The library trims blanks from offsets: a token name that ends in a blank is indistinguishable from text.
            if is_own and self._controls[token_id] in text[start:end]:
                yield from self._text_only.encode(text[position:start]).ids
                yield token_id
                position = end
        yield from self._text_only.encode(text[position:]).ids

    def _around_user_text(
        self, arguments: Mapping[str, Any], run_date: date, field: str
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the ids before and after the user's text in a prompt."""
        if self.has_template:
            texts = ChatTemplate(self._tokenizer, arguments, run_date, field=field).around_user_text()
            before, after = self._tokenizer([*texts], add_special_tokens=False, split_special_tokens=False)["input_ids"]
            return tuple(before), tuple(after)
        if arguments:
            raise ConfigError(ARGUMENTS, f"{dict(arguments)}, and the tokenizer has no chat template", "leave it empty")
        # The mask marks the tokens that the tokenizer itself adds before a text.
        encoding = self._tokenizer("a", return_special_tokens_mask=True)
        marked = zip(encoding["input_ids"], encoding["special_tokens_mask"], strict=True)
        return tuple(token_id for token_id, _ in takewhile(lambda pair: pair[1], marked)), ()


def _without_added_tokens(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """Return a tokenizer with the same vocabulary, merges and splitting, but without added tokens; shares the model.

    Raises:
        DataError: the name of a special token encodes to that token even as ordinary text.
    """
    backend = tokenizer.backend_tokenizer
    bare = Tokenizer(backend.model)
    for part in ("normalizer", "pre_tokenizer"):
        if getattr(backend, part) is not None:
            setattr(bare, part, getattr(backend, part))
    for token_id, token in special_tokens(tokenizer).items():
        if token_id in bare.encode(token).ids:
            raise DataError(
                f"the special token {token!r} is also ordinary text of the tokenizer, so it would vanish from the "
                "policy's text; use a separate token"
            )
    return bare


def _configured_eos_ids(hf_dir: Path) -> list[int]:
    """Read the end-of-sequence ids of generation_config.json, else of config.json, as transformers does.

    Raises:
        DataError: one of the files is not a JSON object, or its ids are invalid.
    """
    for path in (hf_dir / "generation_config.json", hf_dir / "config.json"):
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read: {error}; fetch it again") from error
        if not isinstance(content, dict):
            raise DataError(f"{path} holds a {type(content).__name__}, not a JSON object; fetch it again")
        value = content.get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(type(token_id) is not int or token_id < 0 for token_id in ids):
            raise DataError(f"{path}: eos_token_id is {value!r}; give one token id or a list of them")
        if ids:
            return ids
    return []
