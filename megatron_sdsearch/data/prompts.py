"""How a question is asked and how passages are shown: three profiles whose tags match Search-R1 and AutoRefine.

Owns every fixed string that the policy reads, and the tags that it acts with; ``tokenization/`` owns chat templates and
token ids.
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
#: Tags of the actions, the same in all profiles.
ACTION_TAGS: Final = ("<search>", SEARCH_END, "<answer>", ANSWER_END)
#: First line of a hindsight block; a line per sibling follows, which begins with a label.
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
    """The fixed strings of one way of asking.

    Attributes:
        name: as in ``data.prompt_profile``.
        instructions: what stands before the question; empty for ``plain``.
        observation_open: tag before the search results.
        observation_close: tag after them.
        invalid_action_notice: shown, untrained and without tags around it, after a turn without an action.
        no_hits_body: stands between the tags when nothing matched.
    """

    name: str
    instructions: str
    observation_open: str
    observation_close: str
    invalid_action_notice: str = _INVALID_ACTION_NOTICE
    no_hits_body: str = _NO_HITS_BODY

    def user_text(self, question_text: str, hindsight: str = "") -> str:
        """The user message: instructions, then the hindsight block if any, then ``Question: ...`` as the last line.

        Args:
            question_text: stripped here; a ``?`` is added where it lacks one.
            hindsight: put verbatim on its own lines directly before the question.
        """
        text = question_text.strip()
        question = f"Question: {text if text.endswith('?') else text + '?'}"
        return "\n".join(part for part in (self.instructions, hindsight, question) if part)

    @property
    def tags(self) -> frozenset[str]:
        """Every tag that the policy reads or writes.

        A profile without instructions is for models that were taught the tags elsewhere: what they may write counts.
        """
        fixed = (self.instructions or _TAUGHT_TAGS, self.observation("").strip(), self.invalid_action_notice)
        return frozenset(tag for text in fixed for tag in _TAG.findall(text))

    def own_spans(self, text: str) -> list[tuple[int, int]]:
        """(start, end) in characters of the profile's own wording in a text that it made.

        That is the notice, the tags around a whole observation, or in a user message the instructions at its start and
        the labels of a hindsight block's lines. All go by position: no text of a question, a passage or a query can
        occur there.
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
        """What comes before an observation's body, opening tag included."""
        return f"\n\n{self.observation_open}"

    @property
    def observation_suffix(self) -> str:
        """What comes after an observation's body, cut or not, closing tag included."""
        return f"{self.observation_close}\n\n"

    def observation(self, body: str) -> str:
        """One whole, uncut observation. The body is kept verbatim, tags inside it too."""
        return f"{self.observation_prefix}{body}{self.observation_suffix}"

    def format_passages(self, passages: Sequence[Passage]) -> str:
        """One ``Doc i(Title: ...) ...`` line per passage, best first, counted from 1; ``no_hits_body`` for none."""
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
    """The profile of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in _PROFILES:
        raise ConfigError("data.prompt_profile", f"{name!r} is unknown", f"choose one of {', '.join(_PROFILES)}")
    return _PROFILES[name]
