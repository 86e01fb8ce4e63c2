"""Finds the question of a Search-R1 or verl row: that of its own field, compared with its prompt.

The prompt is instructions and question in one text, in as many wordings as there are projects; Search-R1's rows also
have the question as ``question``, verl's as ``extra_info.question``. Without both, the marker in the prompt counts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from megatron_sdsearch.errors import DataError

_MARKER = "Question:"
_FIX = "write the question into a column question"


def find_question(fields: Mapping[str, str | None], prompt: Sequence[tuple[str, str]]) -> str:
    """The row's question, stripped.

    Args:
        fields: by name, those that may hold it; empty ones are not there.
        prompt: (role, content) of each message. The user's last one asks; an assistant's after it is a prefill.

    Raises:
        DataError: fields and prompt disagree, or the question is in no field and cannot be found in the prompt.
    """
    asked = next((content for role, content in reversed(prompt) if role == "user"), "")
    if not asked.strip():
        raise DataError("prompt: has no user message; write the question into one")
    given = {name: text.strip() for name, text in fields.items() if text and text.strip()}
    if not given:
        return _after_marker(asked)
    name, question = next(iter(given.items()))
    key = _key(question)
    for other, text in given.items():
        if _key(text) != key:
            raise DataError(f"{other}: is {text!r:.80}, but {name} is {question!r:.80}; remove the wrong one")
    # Not as a part of longer words: a question of one letter is in every prompt. Other scripts have no such words.
    if not key or not re.search(rf"(?<![A-Za-z0-9]){re.escape(key)}(?![A-Za-z0-9])", _key(asked)):
        raise DataError(f"{name}: {question!r:.80} does not occur in the prompt {asked!r:.200}; remove the wrong one")
    return question


def _after_marker(asked: str) -> str:
    _, marker, question = asked.partition(_MARKER)
    question = question.strip()
    if not marker:
        raise DataError(f"prompt: has no {_MARKER!r}, so where its question begins is unclear; {_FIX}")
    if (number := asked.count(_MARKER)) > 1:
        raise DataError(f"prompt: has {_MARKER!r} {number} times, so where its question begins is unclear; {_FIX}")
    if not question:
        raise DataError(f"prompt: nothing follows {_MARKER!r}; {_FIX}")
    if "\n" in question:
        raise DataError(f"prompt: several lines follow {_MARKER!r}, and not all need be the question; {_FIX}")
    return question


def _key(text: str) -> str:
    # Search-R1 adds the question mark to both, verl's ports to one of them.
    return " ".join(text.split()).rstrip("? ").casefold()
