"""Warm-start demonstrations, which teach to search, to read passages and to read hindsight blocks, but no answers.

What the demonstrations teach, and what they leave to reinforcement learning:

- Words are drawn from ``WORD_PRIOR``, which rarely ranks the house word first: greedy searches then succeed sometimes.
- Every demonstration draws new facts and a new house style and renders its passages with them. Nothing leaks from the
  real corpus, neither its words nor the content of a passage, so only READING can be learned.
- A BLOCK_SHARE of them have a hindsight block, each with a fraction ~U(0, 1)^2 of its siblings forced correct. The
  demonstration uses the words that worked; if none worked, it avoids those that failed. Without these a tiny model
  cannot be its own hindsight teacher (a pretrained LLM understands such a block at once). The square matters: with
  U(0, 1) the most common word is nearly always right, and a model that counts words never learns to read the labels.
- A search that hits a trap is answered with ``unknown``, which is always wrong: only better words help.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from examples.tiny.world import RELATIONS, WORD_PRIOR, DemoWorld, Path, Relation, passage_text, paths, question_text
from megatron_sdsearch.data.prompts import CORRECT, HINDSIGHT_HEADER, INCORRECT, get_profile
from megatron_sdsearch.hindsight.block import search_line
from megatron_sdsearch.records import Passage

BLOCK_SHARE = 0.65
# Group sizes to draw from. The demo uses 8; the meaning of a label is learned faster from small groups.
NUM_SIBLINGS = (2, 3, 3, 4, 5, 6, 8, 8, 8, 8)
# Share of hops at which a demonstration without a block uses the (new) house word by chance.
HIT_SHARE = 0.75
# Share of siblings without any search.
IDLE_SHARE = 0.02
# Share of new answers drawn from all names, of any type. Provinces are never an answer: without this the names of
# held-out ones would not occur at all, and a model does not copy a token with an untrained embedding.
ANY_NAME_SHARE = 0.35
UNKNOWN = "<answer> unknown</answer>"
_PROFILE = get_profile("plain")
# A row of the warm-start file: demonstration_id, prompt, spans; see megatron_sdsearch.data.demonstrations.
Demonstration = dict[str, Any]


def build_demonstrations(world: DemoWorld, count: int) -> list[Demonstration]:
    """Write ``count`` demonstrations, half of one hop and half of two; a pure function of world and count."""
    writer = _Writer(world)
    return [writer.demonstration(f"tiny:demo:{i}", num_hops=1 + i % 2) for i in range(count)]


class _Writer:
    """Draws a question about a world of its own for each demonstration, and plays the searches."""

    def __init__(self, world: DemoWorld) -> None:
        self._world = world
        self._rng = random.Random(f"tiny-demonstrations:{world.seed}")
        self._answers = {name: sorted(set(table.values())) for name, table in world.answers.items()}
        self._subjects = {
            name_type: sorted(world.train_subjects[name_type] + world.heldout_subjects[name_type])
            for name_type in world.train_subjects
        }
        self._paths = paths()

    def demonstration(self, demonstration_id: str, *, num_hops: int) -> Demonstration:
        """Write one demonstration."""
        rng = self._rng
        path = rng.choice(self._paths[num_hops - 1])
        if rng.random() < BLOCK_SHARE:
            house = [rng.choice(relation.synonyms) for relation in path]
            names = self._draw_names(path)
            forced = rng.random() ** 2
            siblings = [self._sibling_words(path, house, forced) for _ in range(rng.choice(NUM_SIBLINGS))]
            words = []
            for hop, relation in enumerate(path):
                used = frozenset(sibling[hop] for sibling in siblings if len(sibling) > hop)
                # The block reveals the house word: a sibling that used it went on to the next hop or was CORRECT.
                words.append(house[hop] if house[hop] in used else self._draw_word(relation, avoid=used))
            block = _block([(used == house, _queries(used, names)) for used in siblings])
        else:
            words = [self._draw_word(relation) for relation in path]
            house = []
            for relation, word in zip(path, words, strict=True):
                others = [synonym for synonym in relation.synonyms if synonym != word]
                house.append(word if rng.random() < HIT_SHARE else rng.choice(others))
            names = self._draw_names(path)
            block = ""
        prompt = _PROFILE.user_text(question_text(path, names[0]), block)
        return {"demonstration_id": demonstration_id, "prompt": prompt, "spans": _act(names, house, words)}

    def _draw_names(self, path: Path) -> list[str]:
        """Draw new facts: a training subject, then for each hop an answer of its type, or any name."""
        names = [self._rng.choice(self._world.train_subjects[path[0].subject])]
        for hop, relation in enumerate(path):
            # "England" may be an answer, but no second hop starts from it.
            is_last = hop + 1 == len(path)
            pool = self._answers[relation.name] if is_last else self._subjects[path[hop + 1].subject]
            names.append(self._rng.choice(self._world.names if self._rng.random() < ANY_NAME_SHARE else pool))
        return names

    def _draw_word(self, relation: Relation, avoid: frozenset[str] = frozenset()) -> str:
        """Draw a word from the fixed prior, except those to avoid."""
        weights = dict(zip(self._world.word_order[relation.name], WORD_PRIOR, strict=True))
        words = [word for word in weights if word not in avoid] or list(weights)
        return self._rng.choices(words, weights=[weights[word] for word in words])[0]

    def _sibling_words(self, path: Path, house: list[str], forced: float) -> list[str]:
        """Draw the words that a sibling searched with, up to and including its first trap."""
        if self._rng.random() < forced:
            return house
        if self._rng.random() < IDLE_SHARE:
            return []
        used: list[str] = []
        for relation, house_word in zip(path, house, strict=True):
            used.append(self._draw_word(relation))
            if used[-1] != house_word:
                break
        return used


def _queries(words: Sequence[str], names: Sequence[str]) -> list[str]:
    return [f"{word} {name}" for word, name in zip(words, names, strict=False)]


def _block(attempts: Sequence[tuple[bool, list[str]]]) -> str:
    lines = [(CORRECT if is_correct else INCORRECT) + search_line(queries) for is_correct, queries in attempts]
    return "\n".join((HINDSIGHT_HEADER, *lines))


def _observation(contents: str) -> str:
    return _PROFILE.observation(_PROFILE.format_passages([Passage(passage_id="", contents=contents)]))


def _act(names: Sequence[str], house: Sequence[str], words: Sequence[str]) -> list[dict[str, str]]:
    """Write the spans of a search hop by hop until the answer or a trap, and of the final answer."""
    spans: list[dict[str, str]] = []
    for hop, query in enumerate(_queries(words, names)):
        is_hit = words[hop] == house[hop]
        contents = passage_text(names[hop], words[hop], names[hop + 1] if is_hit else None)
        # No space before the closing tag: it would be a token of its own.
        spans.append({"kind": "sampled", "text": f"<search> {query}</search>"})
        spans.append({"kind": "observation", "text": _observation(contents)})
        if not is_hit:
            return [*spans, {"kind": "sampled", "text": UNKNOWN}]
    return [*spans, {"kind": "sampled", "text": f"<answer> {names[-1]}</answer>"}]


def sample_texts(world: DemoWorld) -> list[str]:
    """Return texts with every word of prompts, passages and responses, to train the tokenizer on."""
    block = _block([(True, ["a", "b"]), (False, [])])
    texts = [_PROFILE.user_text(f"What is the {relation.cue} of", block) for relation in RELATIONS]
    texts += [f" {word}" for relation in RELATIONS for word in relation.synonyms]
    texts += ["user\nQuestion: ", "assistant\n", UNKNOWN]
    return texts + [_observation(passage.contents) for passage in world.passages]
