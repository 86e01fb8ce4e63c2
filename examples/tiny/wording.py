"""The demo world's language: relations, their four synonyms, and how passages, questions and searches are worded.

Owns every sentence, so that the corpus, the questions and the demonstrations cannot drift apart. Which synonym the
corpus uses (its house style) is drawn in ``world.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_sdsearch.records import bare_title

Kind = Literal["country", "province", "element"]

UNKNOWN = "unknown"  # what a demonstration answers when its search ran into a trap


@dataclass(frozen=True, slots=True, kw_only=True)
class Relation:
    """Something that passages tell of a subject.

    Attributes:
        name: the key of its facts.
        cue: how questions call it; never one of the synonyms, so a question does not tell the house word.
        synonyms: four words, any of which the corpus may use. No word belongs to two relations.
        subject: the kind of thing it is told of.
        answer: the kind of thing its answers are; ``None`` when no second hop starts from them.
    """

    name: str
    cue: str
    synonyms: tuple[str, str, str, str]
    subject: Kind
    answer: Kind | None = None


RELATIONS: tuple[Relation, ...] = (
    Relation(
        name="capital", cue="chief city", synonyms=("capital", "seat", "metropolis", "headtown"), subject="country"
    ),
    Relation(name="demonym", cue="people", synonyms=("demonym", "inhabitant", "native", "citizen"), subject="country"),
    Relation(name="currency", cue="money", synonyms=("currency", "tender", "coinage", "cash"), subject="country"),
    Relation(
        name="state",
        cue="country",
        synonyms=("nation", "state", "realm", "land"),
        subject="province",
        answer="country",
    ),
    Relation(name="symbol", cue="sign", synonyms=("symbol", "notation", "letters", "sigil"), subject="element"),
    Relation(
        name="discoverer", cue="finder", synonyms=("discoverer", "pioneer", "isolator", "detector"), subject="element"
    ),
    Relation(
        name="origin",
        cue="birthplace",
        synonyms=("origin", "cradle", "provenance", "source"),
        subject="element",
        answer="country",
    ),
    Relation(
        name="successor",
        cue="neighbour",
        synonyms=("successor", "follower", "next", "heir"),
        subject="element",
        answer="element",
    ),
)
BLOCK_HEADER = "Earlier attempts at this question:"


def question_text(path: tuple[Relation, ...], subject: str) -> str:
    """Word a question; ``path`` in hop order, so the last relation is what is asked for."""
    of = "".join(f"the {relation.cue} of " for relation in reversed(path))
    return f"What is {of}{subject}?"


def fact_contents(subject: str, word: str, answer: str) -> str:
    """A passage that tells something.

    The subject stands in title and text: where subjects and answers are of one kind (the successor of an element), BM25
    could not tell the passage about a name from one that only mentions it.
    """
    return f'"{subject}"\nThe {word} of {subject} is {answer}.'


def trap_contents(subject: str, word: str) -> str:
    """A passage of the same length that tells nothing, in words that the house style avoids."""
    return f'"{subject}"\nThe {word} of {subject} is unrecorded.'


def query_text(word: str, subject: str) -> str:
    """A search query."""
    return f"{word} {subject}"


def search_span(query: str) -> str:
    """What the model writes to search. No space before the closing tag: it would be a token of its own."""
    return f"<search> {query}</search>"


def answer_span(answer: str) -> str:
    """What the model writes to answer."""
    return f"<answer> {answer}</answer>"


def observation_span(contents: str) -> str:
    """What comes back for one passage: Search-R1's layout."""
    title, _, text = contents.partition("\n")
    return f"\n\n<information>Doc 1(Title: {bare_title(title)}) {text}\n</information>\n\n"


def block_text(lines: list[tuple[bool, list[str]]]) -> str:
    """Render a hindsight block: per sibling whether it was CORRECT, and its queries."""
    rows = (
        f"{'CORRECT' if is_correct else 'INCORRECT'}: {' | '.join(queries) or '(no search)'}"
        for is_correct, queries in lines
    )
    return "\n".join((BLOCK_HEADER, *rows))


def user_message(question: str, block: str = "") -> str:
    """The user turn of the ``plain`` prompt profile, with or without a hindsight block."""
    return f"{block}\nQuestion: {question}" if block else f"Question: {question}"
