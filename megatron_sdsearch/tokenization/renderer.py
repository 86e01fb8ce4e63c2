"""The tokenizer as the package sees it: prompts through the chat template, text to ids, ids to text.

The only file that touches a chat template. Questions and passages come from outside, so nothing in them may turn into a
control token: their text is always encoded with special tokens split into ordinary ones, and the template is rendered
around a placeholder, never around the text itself. Actions and their positions are ``spans.py``'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sdsearch.errors import DataError
from megatron_sdsearch.file_kinds import refuse_other_kind
from megatron_sdsearch.tokenization.spans import TokenBytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Private-use characters: no template trims, escapes or changes them.
_PLACEHOLDER = "\ue000user-text\ue001"


class Renderer:
    """One tokenizer with its chat template.

    Args:
        tokenizer: a fast tokenizer of the byte-level BPE family.
        eos_ids: ids that end a generation on top of the tokenizer's own end-of-sequence id.

    Raises:
        DataError: the tokenizer belongs to another family, or its chat template drops or repeats the user's text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, eos_ids: Iterable[int] = ()) -> None:
        self._tokenizer = tokenizer
        own = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        self.eos_ids: frozenset[int] = frozenset((*own, *eos_ids))
        self.token_bytes = TokenBytes(tokenizer)

    @classmethod
    def from_folder(cls, hf_dir: Path) -> Renderer:
        """Read the tokenizer, and the end-of-sequence ids of ``generation_config.json`` where there is one.

        Raises:
            DataError: the folder holds no tokenizer that can be read; names it and the mend.
        """
        from transformers import AutoTokenizer, GenerationConfig  # seconds to import: not for those who only read types

        mend = "give a Hugging Face folder that holds tokenizer.json and tokenizer_config.json"
        if not (hf_dir / "tokenizer.json").is_file():
            raise DataError(f"{hf_dir}: no tokenizer.json there; {mend}")
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            refuse_other_kind(hf_dir / name, "JSON")
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(hf_dir)
            more: int | list[int] | None = None
            if (hf_dir / "generation_config.json").is_file():
                more = GenerationConfig.from_pretrained(hf_dir).eos_token_id
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{hf_dir}: the tokenizer cannot be read ({error}); {mend}") from error
        return cls(tokenizer, [more] if isinstance(more, int) else more or [])

    @property
    def vocab_size(self) -> int:
        """Number of ids the tokenizer knows; the model's embedding may be padded beyond it."""
        return len(self._tokenizer)

    @property
    def has_template(self) -> bool:
        """Prompts go through a chat template; without one they are the raw text."""
        return self._tokenizer.chat_template is not None

    def prompt_ids(self, user_text: str) -> tuple[int, ...]:
        """Ids of a conversation with one user message, up to where the assistant starts to write.

        A tokenizer without a chat template gets the raw text. A template that trims the user's text does not see it
        and so cannot trim: callers pass stripped text.
        """
        before, after = self._template_ids
        return (*before, *self.encode(user_text), *after)

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of ``text`` as ordinary text: none added, and special tokens spelt out in it stay characters."""
        return self._encode(text, is_trusted=False)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids`` without special tokens, otherwise as it is; for people and scores, never to encode again."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _encode(self, text: str, *, is_trusted: bool) -> tuple[int, ...]:
        encoding = self._tokenizer(text, add_special_tokens=False, split_special_tokens=not is_trusted)
        return tuple(encoding["input_ids"])

    @cached_property
    def _template_ids(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What the chat template writes before and after the user's text."""
        if not self.has_template:
            return (), ()
        rendered = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": _PLACEHOLDER}], tokenize=False, add_generation_prompt=True
        )
        parts = str(rendered).split(_PLACEHOLDER)
        if len(parts) != 2:
            raise DataError(
                f"the chat template shows the user's text {len(parts) - 1} times instead of once; "
                "use a tokenizer whose template takes one plain user message"
            )
        return self._encode(parts[0], is_trusted=True), self._encode(parts[1], is_trusted=True)
