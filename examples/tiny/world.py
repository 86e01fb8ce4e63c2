"""The demo world: a corpus with a house style and traps, and one-hop and two-hop questions about it.

Owns which facts become passages and questions, the house style and the split; ``facts.py`` owns the facts,
``wording.py`` the sentences. A pure function of the seed.

Why synonyms: the corpus words each relation in one of four ways (its house style). For each of the other three there is
a trap, a passage with the same title that holds no answer. BM25 with top_k=1 returns what the query's wording picks,
so a model that searches in the wrong words reads a trap: query quality decides the reward.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from examples.tiny.facts import FactBook
from examples.tiny.wording import RELATIONS, Kind, Relation, fact_contents, question_text, trap_contents
from megatron_sdsearch.errors import DataError
from megatron_sdsearch.records import Passage, Question

DATASET = "tiny"
# How likely a warm-started model is to pick its first, second, ... word for a relation.
WORD_PRIOR = (0.46, 0.24, 0.20, 0.10)
NUM_TRAIN_PER_HOP = 400
NUM_HELDOUT_PER_HOP = 155
HELDOUT_SHARE = 0.36
# Share of questions that a greedy searcher with WORD_PRIOR gets right, averaged over both hops.
START_RANGE = (0.24, 0.34)


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Everything that training, evaluation and the warm start are made from.

    Attributes:
        seed: what all of it is a function of.
        answers: relation -> subject -> answer.
        word_order: relation -> its synonyms, likeliest first in a warm-started model (see WORD_PRIOR).
        house_words: relation -> the one synonym that the corpus uses.
        train_subjects: kind -> subjects that training questions and demonstrations start from.
        heldout_subjects: kind -> subjects that only held-out questions start from.
        passages: the corpus.
        train: training questions.
        heldout: held-out questions.
    """

    seed: int
    answers: Mapping[str, Mapping[str, str]]
    word_order: Mapping[str, tuple[str, ...]]
    house_words: Mapping[str, str]
    train_subjects: Mapping[Kind, tuple[str, ...]]
    heldout_subjects: Mapping[Kind, tuple[str, ...]]
    passages: tuple[Passage, ...]
    train: tuple[Question, ...]
    heldout: tuple[Question, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """All subjects and answers, sorted."""
        tables = self.answers.values()
        return tuple(sorted({name for table in tables for name in (*table.keys(), *table.values())}))

    @property
    def num_entities(self) -> int:
        """How many names some question starts from or passes through."""
        return len({subject for table in self.answers.values() for subject in table})


def build_world(facts: FactBook, seed: int) -> World:
    """Draw wording and split, write passages and questions.

    Raises:
        DataError: too few facts for the promised number of questions.
    """
    rng = random.Random(f"tiny-world:{seed}")
    train_subjects, heldout_subjects = _split(facts.answers, rng)
    word_order = {relation.name: tuple(rng.sample(relation.synonyms, 4)) for relation in RELATIONS}
    house_words = _draw_house(word_order, rng)
    passages = _passages(facts.answers, house_words)
    rng.shuffle(passages)
    ask = _Asker(facts.answers, house_words, rng)
    return World(
        seed=seed,
        answers=facts.answers,
        word_order=word_order,
        house_words=house_words,
        train_subjects=train_subjects,
        heldout_subjects=heldout_subjects,
        passages=tuple(passages),
        train=ask.questions("train", train_subjects, NUM_TRAIN_PER_HOP),
        heldout=ask.questions("heldout", heldout_subjects, NUM_HELDOUT_PER_HOP),
    )


def _split(
    answers: Mapping[str, Mapping[str, str]], rng: random.Random
) -> tuple[dict[Kind, tuple[str, ...]], dict[Kind, tuple[str, ...]]]:
    """Divide the subjects of each kind into training and held-out ones."""
    train: dict[Kind, tuple[str, ...]] = {}
    heldout: dict[Kind, tuple[str, ...]] = {}
    for kind in sorted({relation.subject for relation in RELATIONS}):
        tables = (answers[relation.name] for relation in RELATIONS if relation.subject == kind)
        subjects = sorted({subject for table in tables for subject in table})
        rng.shuffle(subjects)
        cut = round(HELDOUT_SHARE * len(subjects))
        heldout[kind], train[kind] = tuple(subjects[:cut]), tuple(subjects[cut:])
    return train, heldout


def _draw_house(word_order: Mapping[str, tuple[str, ...]], rng: random.Random) -> dict[str, str]:
    """Put the house word at rank 1 for a few relations and at rank 2 or 3 for the others.

    Drawn until a greedy start lands in START_RANGE: low enough to leave room, high enough to have signal.
    """
    while True:
        ranks = {name: rng.choice((0, 0, 1, 1, 2, 2)) for name in word_order}
        if START_RANGE[0] <= _greedy_start(ranks) <= START_RANGE[1]:
            return {name: word_order[name][rank] for name, rank in ranks.items()}


def _greedy_start(ranks: Mapping[str, int]) -> float:
    """Share of paths whose every hop has its house word at rank 1, averaged over both hops."""
    shares = [statistics.fmean(all(ranks[r.name] == 0 for r in path) for path in hop_paths) for hop_paths in paths()]
    return statistics.fmean(shares)


def passage_id(relation: str, subject: str, word: str) -> str:
    """Stable id of one passage."""
    return f"{subject}.{relation}.{word}"


def _passages(answers: Mapping[str, Mapping[str, str]], house_words: Mapping[str, str]) -> list[Passage]:
    """One telling passage per fact, in the house word, and one trap per other synonym."""
    return [
        Passage(
            passage_id=passage_id(relation.name, subject, word),
            contents=fact_contents(subject, word, answer)
            if word == house_words[relation.name]
            else trap_contents(subject, word),
        )
        for relation in RELATIONS
        for subject, answer in answers[relation.name].items()
        for word in relation.synonyms
    ]


def follow(answers: Mapping[str, Mapping[str, str]], path: tuple[Relation, ...], subject: str) -> list[str] | None:
    """The names along a path: subject, answer of the first hop, ...; ``None`` where a fact is missing."""
    names = [subject]
    for relation in path:
        answer = answers[relation.name].get(names[-1])
        if answer is None:
            return None
        names.append(answer)
    return names


def paths() -> tuple[list[tuple[Relation, ...]], list[tuple[Relation, ...]]]:
    """All one-hop and all two-hop paths; no path takes the same relation twice."""
    two_hops = [(first, then) for first in RELATIONS for then in RELATIONS if first.answer == then.subject]
    return [(relation,) for relation in RELATIONS], [pair for pair in two_hops if pair[0] is not pair[1]]


@dataclass(frozen=True, slots=True)
class _Asker:
    """Writes questions."""

    answers: Mapping[str, Mapping[str, str]]
    house_words: Mapping[str, str]
    rng: random.Random

    def questions(self, split: str, subjects: Mapping[Kind, tuple[str, ...]], num_per_hop: int) -> tuple[Question, ...]:
        """``num_per_hop`` one-hop and as many two-hop questions, shuffled together."""
        asked: list[tuple[tuple[Relation, ...], list[str]]] = []
        for hop_paths in paths():
            found = [(path, self._names(path, s)) for path in hop_paths for s in subjects[path[0].subject]]
            usable = [(path, names) for path, names in found if names is not None]
            if len(usable) < num_per_hop:
                raise DataError(f"{split}: {len(usable)} questions of {len(hop_paths[0])} hop(s), need {num_per_hop}")
            asked += self.rng.sample(usable, num_per_hop)
        self.rng.shuffle(asked)
        return tuple(self._question(f"{DATASET}:{split}:{i}", *row) for i, row in enumerate(asked))

    def _names(self, path: tuple[Relation, ...], subject: str) -> list[str] | None:
        return follow(self.answers, path, subject)

    def _question(self, question_id: str, path: tuple[Relation, ...], names: list[str]) -> Question:
        hops = zip(path, names, strict=False)
        return Question(
            question_id=question_id,
            text=question_text(path, names[0]),
            gold_answers=(names[-1],),
            dataset=DATASET,
            gold_passage_ids=tuple(passage_id(r.name, name, self.house_words[r.name]) for r, name in hops),
        )
