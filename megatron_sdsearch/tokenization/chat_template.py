"""Renders a tokenizer's chat template around a user message, with the run's arguments and date.

The only module that uses chat templates. A template is a program that came with the model and may fail in any way:
every failure becomes one error that names the folder and quotes the template's message.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from datetime import date, datetime, time
from typing import TYPE_CHECKING, Any, Final

from megatron_sdsearch.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ARGUMENTS: Final = "data.chat_template_arguments"

# Private-use characters: no template trims, escapes or changes them.
_USER_TEXT: Final = "\ue000user-text\ue001"
_REPLY: Final = "\ue000reply\ue001"
_USER_TURN: Final = {"role": "user", "content": _USER_TEXT}
# Variables that this module sets, besides the tokenizer's special tokens.
_RESERVED: Final = {"messages", "tools", "documents", "add_generation_prompt", "strftime_now", "raise_exception"}
_FIX: Final = "repair chat_template.jinja there (or chat_template in tokenizer_config.json)"


class ChatTemplate:
    """The chat template of one tokenizer.

    Args:
        tokenizer: has a chat template.
        arguments: for variables that the template reads, such as Qwen3's ``enable_thinking``.
        run_date: the date for ``strftime_now``; the time is always midnight.
        field: setting of the tokenizer's folder, for errors.

    Raises:
        ConfigError: the template is not valid Jinja; there are several and no default; or the template does not read an
            argument, or the program sets it.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, arguments: Mapping[str, Any], run_date: date, *, field: str
    ) -> None:
        # The environment of apply_chat_template, used directly because apply_chat_template cannot pass functions such
        # as strftime_now to a template.
        from jinja2 import meta
        from transformers.utils.chat_template_utils import _compile_jinja_template

        self._field = field
        self._where = f"the chat template of {tokenizer.name_or_path or 'the tokenizer'}"
        try:
            source = tokenizer.get_chat_template()
            self._template: Any = _compile_jinja_template(source)
        except Exception as error:  # not Jinja, or no default among several
            raise self._failure("cannot be read", error, _FIX) from error
        midnight = datetime.combine(run_date, time())
        given = {"tools": None, "documents": None, "strftime_now": midnight.strftime, **tokenizer.special_tokens_map}
        self._variables: dict[str, Any] = {**given, **arguments}
        reserved = _RESERVED.union(tokenizer.SPECIAL_TOKENS_ATTRIBUTES, tokenizer.special_tokens_map)
        self._readable = meta.find_undeclared_variables(self._template.environment.parse(source)) - reserved
        for name in arguments:
            if name in reserved:
                problem = "is set by the program or the tokenizer"
                raise ConfigError(f"{ARGUMENTS}.{name}", problem, "leave it out")
            if name not in self._readable:
                near = difflib.get_close_matches(name, self._readable, n=1)
                fix = f"did you mean {near[0]}?" if near else f"leave it out: {self._reads()}"
                raise ConfigError(f"{ARGUMENTS}.{name}", f"{self._where} never reads it", fix)

    def around_user_text(self) -> tuple[str, str]:
        """Return the text before and after one user message, up to the start of the assistant's reply.

        Raises:
            ConfigError: the template fails, drops or repeats the user's text, or does not open the assistant's turn.
        """
        whole = self._render(add_generation_prompt=True)
        before, *others = whole.split(_USER_TEXT)
        if len(others) != 1:
            problem = f"{self._where} shows the user's text {len(others)} times instead of once"
            raise ConfigError(self._field, problem, "use a tokenizer with a template for a plain user message")
        (after,) = others
        if missing := self._missing_header(whole, after):
            problem = f"does not open the assistant's turn: it ignores add_generation_prompt, and writes {missing!r}"
            raise ConfigError(self._field, f"{self._where} {problem} before a reply", _FIX)
        return before, after

    def _missing_header(self, whole: str, after: str) -> str:
        """Return the text before a reply that a template omits because it ignores ``add_generation_prompt``.

        Empty for Mistral's templates, which ignore it but have no text between the user's message and the reply.
        """
        try:
            if self._render(add_generation_prompt=False) != whole:
                return ""
            both = self._render({"role": "assistant", "content": _REPLY}, add_generation_prompt=False)
        except ConfigError:  # the template requires a prompt or accepts no reply: nothing to compare
            return ""
        header, reply, _ = both.partition(_USER_TEXT)[2].partition(_REPLY)
        missing = header.removeprefix(after) if reply and header.startswith(after) else ""
        return missing if missing.strip() else ""

    def _render(self, *replies: Mapping[str, str], add_generation_prompt: bool) -> str:
        messages = [dict(message) for message in (_USER_TURN, *replies)]
        try:
            return str(
                self._template.render(messages=messages, add_generation_prompt=add_generation_prompt, **self._variables)
            )
        except Exception as error:
            fix = f"set its arguments in {ARGUMENTS} ({self._reads()}), or {_FIX}"
            raise self._failure("fails on one user message", error, fix) from error

    def _failure(self, problem: str, error: Exception, fix: str) -> ConfigError:
        line = f", line {error.lineno}" if isinstance(getattr(error, "lineno", None), int) else ""  # type: ignore[attr-defined]
        reason = " ".join(str(error).split()) or "no message"
        return ConfigError(self._field, f"{self._where} {problem} ({type(error).__name__}{line}: {reason})", fix)

    def _reads(self) -> str:
        return f"it reads {', '.join(sorted(self._readable))}" if self._readable else "it takes no arguments"
