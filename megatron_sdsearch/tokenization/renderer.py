"""The tokenizer as the package sees it: prompts through the chat template, text to ids, ids to text.

Questions, passages and queries come from outside, so nothing in them may turn into a control token, special or not:
such a token is written by the chat template or by the profile's own wording alone. Everywhere else its name is
ordinary text. ``chat_template.py`` renders chat templates, ``spans.py`` finds actions and their positions.
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
        eos_ids: ids that end a generation on top of the tokenizer's own end-of-sequence id.
        profile: whose wording may hold control tokens; None for none.
        arguments: of the chat template.
        run_date: the date that a chat template gets when it asks; today by default.
        field: the setting that names the tokenizer's folder, for error messages.

    Raises:
        DataError: the tokenizer belongs to another family; one of the profile's tags is a special token; or a special
            token is what ordinary text turns into.
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
        # Blanks and single characters are no control tokens: some tokenizers add such pieces of ordinary text.
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
        """Read the tokenizer, and the end-of-sequence ids of the model's configuration files; arguments as above.

        Raises:
            DataError: the folder holds no tokenizer that can be read; names it and the fix. Or as above.
            ConfigError: as above.
        """
        from transformers import AutoTokenizer  # takes seconds to import

        fix = "give a Hugging Face folder that holds tokenizer.json and tokenizer_config.json"
        if not (hf_dir / "tokenizer.json").is_file():
            raise DataError(f"{hf_dir}: no tokenizer.json there; {fix}")
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
        """Number of ids the tokenizer knows; the model's embedding may be padded beyond it."""
        return len(self._tokenizer)

    @property
    def has_template(self) -> bool:
        """Prompts go through a chat template; without one they are the raw text."""
        return self._tokenizer.chat_template is not None

    def prompt_ids(self, user_text: str) -> tuple[int, ...]:
        """Ids of a conversation with one user message, up to where the assistant starts to write.

        A tokenizer without a chat template gets the raw text, behind the beginning-of-sequence token where the
        tokenizer puts one in front of a text. A template that trims the user's text does not see it and so cannot
        trim: callers pass stripped text.
        """
        return (*self._before, *self.encode(user_text), *self._after)

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of a text from outside, with none added: control tokens that it spells out stay characters.

        Those in the profile's own wording (the instructions of a prompt, the tags around an observation) are tokens,
        as in ``encode_own``. A text that spells no control token has the ids that the tokenizer itself gives it.
        """
        encoding = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)[0]
        if self._controls.keys().isdisjoint(encoding.ids):
            return tuple(encoding.ids)
        return tuple(self._with_own_alone(text, encoding.ids, encoding.offsets))

    def encode_own(self, text: str) -> tuple[int, ...]:
        """Ids of the profile's own wording, or of sampled text, in which only special tokens stay characters."""
        return tuple(self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids`` without special tokens, otherwise as it is; for people and scores, never to encode again."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _with_own_alone(self, text: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]]) -> Iterator[int]:
        """Control tokens within the profile's own wording; the text between them without any other."""
        own_spans = self._profile.own_spans(text) if self._profile is not None else []
        position = 0
        for token_id, (start, end) in zip(ids, offsets, strict=True):
            is_own = token_id in self._controls and any(first <= start and end <= last for first, last in own_spans)
            # The library cuts blanks off offsets: a token whose name ends in one cannot be told from its text.
            if is_own and self._controls[token_id] in text[start:end]:
                yield from self._text_only.encode(text[position:start]).ids
                yield token_id
                position = end
        yield from self._text_only.encode(text[position:]).ids

    def _around_user_text(
        self, arguments: Mapping[str, Any], run_date: date, field: str
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids before and after the user's text in a prompt."""
        if self.has_template:
            texts = ChatTemplate(self._tokenizer, arguments, run_date, field=field).around_user_text()
            before, after = self._tokenizer([*texts], add_special_tokens=False, split_special_tokens=False)["input_ids"]
            return tuple(before), tuple(after)
        if arguments:
            raise ConfigError(ARGUMENTS, f"{dict(arguments)}, and the tokenizer has no chat template", "leave it empty")
        # By the tokenizer's own rule: what it adds in front of a text is marked, the text is not.
        encoding = self._tokenizer("a", return_special_tokens_mask=True)
        marked = zip(encoding["input_ids"], encoding["special_tokens_mask"], strict=True)
        return tuple(token_id for token_id, _ in takewhile(lambda pair: pair[1], marked)), ()


def _without_added_tokens(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """The same vocabulary, merges and splitting, in which no added token is ever found: one model, shared.

    Raises:
        DataError: a special token is what its own name turns into as ordinary text, so that it cannot be kept out, and
            would vanish from what the policy writes.
    """
    backend = tokenizer.backend_tokenizer
    bare = Tokenizer(backend.model)
    for part in ("normalizer", "pre_tokenizer"):
        if getattr(backend, part) is not None:
            setattr(bare, part, getattr(backend, part))
    for token_id, token in special_tokens(tokenizer).items():
        if token_id in bare.encode(token).ids:
            raise DataError(
                f"the special token {token!r} is ordinary text to the tokenizer as well: it would vanish from what the "
                "policy writes; use a token of its own"
            )
    return bare


def _configured_eos_ids(hf_dir: Path) -> list[int]:
    """End-of-sequence ids of generation_config.json, or where it names none of config.json, as in transformers.

    Raises:
        DataError: one of the files is no JSON object, or its ids are no ids.
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
