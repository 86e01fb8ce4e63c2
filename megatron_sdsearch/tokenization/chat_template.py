"""Renders a tokenizer's chat template around a user message, with the run's arguments and the run's date.

The only file that touches a chat template. A template is a program that came with the model, so it may fail in any
way: every failure is one error that names the folder and quotes the template's own message.
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
# What the renderer itself gives a template, next to the tokenizer's special tokens.
_RESERVED: Final = frozenset(
    ("messages", "tools", "documents", "add_generation_prompt", "strftime_now", "raise_exception")
)
_FIX: Final = "repair chat_template.jinja there (or chat_template in tokenizer_config.json)"


class ChatTemplate:
    """The chat template of one tokenizer.

    Args:
        tokenizer: has a chat template.
        arguments: for variables that the template reads, such as Qwen3's ``enable_thinking``.
        run_date: what ``strftime_now`` formats; the time of day is always midnight.
        field: the setting that names the tokenizer's folder, for error messages.

    Raises:
        ConfigError: the template is no Jinja; there are several and none is the default; an argument is one that it
            never reads, or one that the program sets.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, arguments: Mapping[str, Any], run_date: date, *, field: str
    ) -> None:
        # The environment that apply_chat_template itself renders in. Called directly, because apply_chat_template
        # passes no function on to a template, and strftime_now is one.
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
        own = _RESERVED.union(tokenizer.SPECIAL_TOKENS_ATTRIBUTES, tokenizer.special_tokens_map)
        self._readable = meta.find_undeclared_variables(self._template.environment.parse(source)) - own
        for name in arguments:
            if name in own:
                raise ConfigError(f"{ARGUMENTS}.{name}", "is the program's to set, or the tokenizer's", "leave it out")
            if name not in self._readable:
                near = difflib.get_close_matches(name, self._readable, n=1)
                fix = f"did you mean {near[0]}?" if near else f"leave it out: {self._reads()}"
                raise ConfigError(f"{ARGUMENTS}.{name}", f"{self._where} never reads it", fix)

    def around_user_text(self) -> tuple[str, str]:
        """The text before and after that of one user message, up to where the assistant starts to write.

        Raises:
            ConfigError: the template fails, drops or repeats the user's text, or leaves the assistant's turn closed.
        """
        whole = self._render(add_generation_prompt=True)
        before, *others = whole.split(_USER_TEXT)
        if len(others) != 1:
            raise ConfigError(
                self._field,
                f"{self._where} shows the user's text {len(others)} times instead of once",
                "use a tokenizer whose template takes one plain user message",
            )
        (after,) = others
        if missing := self._missing_header(whole, after):
            raise ConfigError(
                self._field,
                f"{self._where} does not open the assistant's turn: it takes no notice of add_generation_prompt, and "
                f"writes {missing!r} before what the assistant has said",
                _FIX,
            )
        return before, after

    def _missing_header(self, whole: str, after: str) -> str:
        """The text that a template which ignores ``add_generation_prompt`` still writes before a reply; "" if none.

        Mistral's is right to ignore it: it writes nothing more between the user's text and the reply.
        """
        try:
            if self._render(add_generation_prompt=False) != whole:
                return ""
            both = self._render({"role": "assistant", "content": _REPLY}, add_generation_prompt=False)
        except ConfigError:  # it wants a prompt, or takes no reply: nothing can be compared
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
            fix = f"set what it asks for in {ARGUMENTS} ({self._reads()}), or {_FIX}"
            raise self._failure("fails on one user message", error, fix) from error

    def _failure(self, what: str, error: Exception, fix: str) -> ConfigError:
        line = f", line {error.lineno}" if isinstance(getattr(error, "lineno", None), int) else ""  # type: ignore[attr-defined]
        reason = " ".join(str(error).split()) or "no message"
        return ConfigError(self._field, f"{self._where} {what} ({type(error).__name__}{line}: {reason})", fix)

    def _reads(self) -> str:
        return f"it reads {', '.join(sorted(self._readable))}" if self._readable else "it takes no arguments"
