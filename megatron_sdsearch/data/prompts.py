"""Prompt profiles: instructions, tags and passage format, with the tags of Search-R1 and AutoRefine.

Owns every fixed string that the policy reads, and the action tags; ``tokenization/`` owns chat templates and token ids.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from megatron_sdsearch.errors import ConfigError
from megatron_sdsearch.records import Passage, bare_title

_SEARCH_R1_INSTRUCTIONS: Final = """\
Answer the question at the end. Each time you learn something new, first think it over between <think> and </think>. \
Whenever you lack a fact, ask the search engine by writing <search> your query </search>; its best results come back \
between <information> and </information>. You may search as often as you need. Once you know the answer, write it \
between <answer> and </answer>, short and without an explanation, for example <answer> Lisbon </answer>."""

_AUTOREFINE_INSTRUCTIONS: Final = """\
You answer questions with the help of a search engine. Think between <think> and </think> before every step. Whenever \
you lack a fact, write <search> your query </search>, and three documents come back between <documents> and \
</documents>. After each search, write down what they tell you about the question between <refine> and </refine>. You \
may search as often as you need. Once you know the answer, write it between <answer> and </answer>, short and without \
an explanation, for example <answer> Lisbon </answer>."""

_INVALID_ACTION_NOTICE: Final = """
That was no valid action. To search, put a query between <search> and </search>; to finish, put the answer between \
<answer> and </answer>.
"""

SEARCH_END: Final = "</search>"
ANSWER_END: Final = "</answer>"
#: The same in all profiles.
ACTION_TAGS: Final = ("<search>", SEARCH_END, "<answer>", ANSWER_END)
#: First line of a hindsight block, followed by one labelled line per sibling.
HINDSIGHT_HEADER: Final = "Earlier attempts at this question:"
CORRECT: Final = "CORRECT: "
INCORRECT: Final = "INCORRECT: "

_LABEL: Final = f"{CORRECT}|{INCORRECT}"
_BLOCK: Final = re.compile(rf"{HINDSIGHT_HEADER}(?:\n(?:{_LABEL}|- )[^\n]*)*")
_LINE_LABEL: Final = re.compile(rf"^(?:{_LABEL})", re.MULTILINE)
_TAG: Final = re.compile(r"</?\w+>")
_TAUGHT_TAGS: Final = "<think></think><refine></refine>"

_NO_HITS_BODY: Final = "No passage matches this query.\n"


@dataclass(frozen=True, slots=True)
class PromptProfile:
    """The fixed strings of a prompt format.

    Attributes:
        name: as in ``data.prompt_profile``.
        instructions: text before the question; empty for ``plain``.
        observation_open: tag before search results.
        observation_close: tag after search results.
        invalid_action_notice: shown after a turn without an action, without tags; not trained on.
        no_hits_body: shown between the tags if nothing matches.
    """

    name: str
    instructions: str
    observation_open: str
    observation_close: str
    invalid_action_notice: str = _INVALID_ACTION_NOTICE
    no_hits_body: str = _NO_HITS_BODY

    def user_text(self, question_text: str, hindsight: str = "") -> str:
        """Return the user message: instructions, the hindsight block if any, and ``Question: ...`` as the last line.

        Args:
            question_text: is stripped; a missing ``?`` is added.
            hindsight: inserted verbatim on lines of its own before the question.
        """
        text = question_text.strip()
        question = f"Question: {text if text.endswith('?') else text + '?'}"
        return "\n".join(part for part in (self.instructions, hindsight, question) if part)

    @property
    def tags(self) -> frozenset[str]:
        """All tags that the policy reads or writes.

        A profile without instructions is for models already trained on the tags: it includes all of them.
        """
        fixed = (self.instructions or _TAUGHT_TAGS, self.observation("").strip(), self.invalid_action_notice)
        return frozenset(tag for text in fixed for tag in _TAG.findall(text))

    def own_spans(self, text: str) -> list[tuple[int, int]]:
        """Return (start, end) in characters of the profile's own strings in a text that it formatted.

        These are the notice, the tags around a whole observation, or in a user message the leading instructions and the
        labels of a hindsight block. They are found by position, where no question, passage or query text can be.
        """
        opening, closing = self.observation_prefix, self.observation_suffix
        if text == self.invalid_action_notice:
            return [(0, len(text))]
        if text.startswith(opening) and text.endswith(closing) and len(text) >= len(opening) + len(closing):
            return [(0, len(opening)), (len(text) - len(closing), len(text))]
        head = len(self.instructions) if text.startswith(self.instructions) else 0
        block = _BLOCK.match(text, head + 1 if head else 0)
        labels = _LINE_LABEL.finditer(text, *block.span()) if block else ()
        return [(0, head), *(label.span() for label in labels)]

    @property
    def observation_prefix(self) -> str:
        """The text before an observation's body, including the opening tag."""
        return f"\n\n{self.observation_open}"

    @property
    def observation_suffix(self) -> str:
        """The text after an observation's body, including the closing tag."""
        return f"{self.observation_close}\n\n"

    def observation(self, body: str) -> str:
        """Return a whole observation; the body is kept verbatim, including tags in it."""
        return f"{self.observation_prefix}{body}{self.observation_suffix}"

    def format_passages(self, passages: Sequence[Passage]) -> str:
        """Return a line ``Doc i(Title: ...) ...`` per passage, with i from 1; ``no_hits_body`` without passages."""
        if not passages:
            return self.no_hits_body
        lines = ""
        for number, passage in enumerate(passages, start=1):
            title, _, text = passage.contents.partition("\n")
            lines += f"Doc {number}(Title: {bare_title(title)}) {text}\n"
        return lines


_PROFILES: Final = {
    profile.name: profile
    for profile in (
        PromptProfile("search_r1", _SEARCH_R1_INSTRUCTIONS, "<information>", "</information>"),
        PromptProfile("autorefine", _AUTOREFINE_INSTRUCTIONS, "<documents>", "</documents>"),
        PromptProfile("plain", "", "<information>", "</information>"),
    )
}


def get_profile(name: str) -> PromptProfile:
    """Return a profile by name.

    Raises:
        ConfigError: the name is unknown.
    """
    if name not in _PROFILES:
        raise ConfigError("data.prompt_profile", f"{name!r} is unknown", f"choose one of {', '.join(_PROFILES)}")
    return _PROFILES[name]
