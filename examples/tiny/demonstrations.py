"""Warm-start lessons: how to search, how to read a passage, how to read a hindsight block. Never an answer.

Owns what the demonstrations teach, and what they leave for reinforcement learning:

- Words are picked by ``WORD_PRIOR``, in which the house word is rarely first: a greedy start is right now and then.
- Every demonstration draws fresh facts and a fresh house style and renders its passages with them. Nothing about the
  real corpus leaks: not which word it uses, not what any passage says. What can be learned is READING.
- About BLOCK_SHARE of them carry a hindsight block, each with a fraction ~U(0, 1)^2 of its siblings forced correct. The
  demonstration follows the words that worked; where none worked it avoids those that failed. Without this lesson a tiny
  model cannot be its own hindsight teacher (a pretrained LLM reads such a block as it is). The square matters: with a
  plain U(0, 1) the commonest word is nearly always right, and a model that counts never learns to read the labels.
- A search that hits a trap is answered with ``unknown``: that is always wrong, so only better words help.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

from examples.tiny.wording import (
    RELATIONS,
    UNKNOWN,
    Relation,
    answer_span,
    block_text,
    fact_contents,
    observation_span,
    query_text,
    question_text,
    search_span,
    trap_contents,
    user_message,
)
from examples.tiny.world import WORD_PRIOR, World, paths

BLOCK_SHARE = 0.65
# Group sizes to draw from. The demo's is 8; small groups are quicker lessons in what a label means.
NUM_SIBLINGS = (2, 3, 3, 4, 5, 6, 8, 8, 8, 8)
# Share of hops at which a demonstration without a block happens to use the (fresh) house word.
HIT_SHARE = 0.75
# Share of siblings that did not search at all.
IDLE_SHARE = 0.02
# Share of fresh answers drawn from all names, whatever they stand for. Provinces are never an answer: without this the
# names of held-out ones would not occur at all, and an embedding that was never trained is never copied.
ANY_NAME_SHARE = 0.35


class Span(TypedDict):
    """``sampled`` text carries the loss, ``observation`` text does not."""

    kind: str
    text: str


class Demonstration(TypedDict):
    """One row of the warm-start file."""

    demonstration_id: str
    prompt: str
    spans: list[Span]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Episode:
    """One question in a world of its own: fresh facts, fresh house words.

    Attributes:
        path: relations in hop order.
        names: subject, answer of the first hop, ...: one more than relations.
        house: the word that works, per hop.
    """

    path: tuple[Relation, ...]
    names: tuple[str, ...]
    house: tuple[str, ...]


def build_demonstrations(world: World, count: int) -> list[Demonstration]:
    """Write ``count`` demonstrations, half of one hop and half of two; a pure function of world and count."""
    rng = random.Random(f"tiny-demonstrations:{world.seed}")
    writer = _Writer(world, rng)
    return [writer.demonstration(f"tiny:demo:{i}", num_hops=1 + i % 2) for i in range(count)]


class _Writer:
    """Draws episodes and acts them out."""

    def __init__(self, world: World, rng: random.Random) -> None:
        self._world = world
        self._rng = rng
        self._answers = {name: sorted(set(table.values())) for name, table in world.answers.items()}
        self._subjects = {
            relation.subject: sorted(world.train_subjects[relation.subject] + world.heldout_subjects[relation.subject])
            for relation in RELATIONS
        }
        self._paths = paths()

    def demonstration(self, demonstration_id: str, *, num_hops: int) -> Demonstration:
        """One row."""
        path = self._rng.choice(self._paths[num_hops - 1])
        if self._rng.random() < BLOCK_SHARE:
            episode = self._episode(path, house=[self._rng.choice(relation.synonyms) for relation in path])
            siblings = self._siblings(episode)
            words = [self._advised_word(episode, hop, siblings) for hop in range(num_hops)]
            block = block_text([(_is_correct(episode, used), _queries(episode, used)) for used in siblings])
        else:
            words = [self._prior_word(relation) for relation in path]
            episode = self._episode(path, house=[self._house_near(*pair) for pair in zip(path, words, strict=True)])
            block = ""
        question = question_text(path, episode.names[0])
        return {
            "demonstration_id": demonstration_id,
            "prompt": user_message(question, block),
            "spans": _act(episode, words),
        }

    def _episode(self, path: tuple[Relation, ...], house: Sequence[str]) -> _Episode:
        """Fresh facts: the subject is a training one; answers are any of their kind, or any names at all."""
        names = [self._rng.choice(self._world.train_subjects[path[0].subject])]
        for hop, relation in enumerate(path):
            # "England" may be an answer, but is no country that a second hop could start from.
            is_last = hop + 1 == len(path)
            pool = self._answers[relation.name] if is_last else self._subjects[path[hop + 1].subject]
            names.append(self._rng.choice(self._world.names if self._rng.random() < ANY_NAME_SHARE else pool))
        return _Episode(path=path, names=tuple(names), house=tuple(house))

    def _prior_word(self, relation: Relation, avoid: frozenset[str] = frozenset()) -> str:
        """A word by the fixed prior, among those not to avoid."""
        weights = dict(zip(self._world.word_order[relation.name], WORD_PRIOR, strict=True))
        words = [word for word in weights if word not in avoid] or list(weights)
        return self._rng.choices(words, weights=[weights[word] for word in words])[0]

    def _house_near(self, relation: Relation, word: str) -> str:
        """A fresh house word that is ``word`` in HIT_SHARE of the cases."""
        others = [synonym for synonym in relation.synonyms if synonym != word]
        return word if self._rng.random() < HIT_SHARE else self._rng.choice(others)

    def _siblings(self, episode: _Episode) -> list[list[str]]:
        """The words that each sibling searched with, up to and including its first trap."""
        forced = self._rng.random() ** 2
        return [self._sibling(episode, forced) for _ in range(self._rng.choice(NUM_SIBLINGS))]

    def _sibling(self, episode: _Episode, forced: float) -> list[str]:
        if self._rng.random() < forced:
            return list(episode.house)
        if self._rng.random() < IDLE_SHARE:
            return []
        used: list[str] = []
        for relation, house in zip(episode.path, episode.house, strict=True):
            used.append(self._prior_word(relation))
            if used[-1] != house:
                break
        return used

    def _advised_word(self, episode: _Episode, hop: int, siblings: list[list[str]]) -> str:
        """What a reader of the block searches with at this hop."""
        used = {words[hop] for words in siblings if len(words) > hop}
        house = episode.house[hop]
        # A sibling that used the house word went on, or was CORRECT: the block shows it.
        return house if house in used else self._prior_word(episode.path[hop], avoid=frozenset(used))


def _is_correct(episode: _Episode, used: list[str]) -> bool:
    """Whether these words lead to the answer."""
    return tuple(used) == episode.house


def _queries(episode: _Episode, used: list[str]) -> list[str]:
    """The queries that these words make."""
    return [query_text(word, name) for word, name in zip(used, episode.names, strict=False)]


def _act(episode: _Episode, words: Sequence[str]) -> list[Span]:
    """Search hop by hop until the answer or a trap is found, then answer."""
    spans: list[Span] = []
    for word, house, subject, answer in zip(words, episode.house, episode.names, episode.names[1:], strict=False):
        is_hit = word == house
        contents = fact_contents(subject, word, answer) if is_hit else trap_contents(subject, word)
        spans.append({"kind": "sampled", "text": search_span(query_text(word, subject))})
        spans.append({"kind": "observation", "text": observation_span(contents)})
        if not is_hit:
            return [*spans, {"kind": "sampled", "text": answer_span(UNKNOWN)}]
    return [*spans, {"kind": "sampled", "text": answer_span(episode.names[-1])}]


def sample_texts(world: World) -> list[str]:
    """Text in which every word of prompts, passages and responses occurs, for the tokenizer."""
    lines = [(True, ["a", "b"]), (False, [])]
    texts = [user_message(f"What is the {relation.cue} of", block_text(lines)) for relation in RELATIONS]
    texts += [f" {word}" for relation in RELATIONS for word in relation.synonyms]
    texts += [f"user\n{user_message('')}", "assistant\n", answer_span(UNKNOWN), " | "]
    return texts + [observation_span(passage.contents) for passage in world.passages]
