"""The demo world: a corpus with a house style and traps, and one-hop and two-hop questions about it.

Defines the relations and all sentences about them; ``facts.py`` reads the facts. A pure function of the seed.

The corpus words each relation in one of four synonyms, its house style. For each of the other three there is a trap: a
passage with the same title and no answer. BM25 with top_k=1 returns the passage that matches the query's wording, so a
model that searches with the wrong word gets a trap, and the quality of queries decides the reward.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Literal, NamedTuple

from examples.tiny.facts import FactBook
from megatron_sdsearch.errors import DataError
from megatron_sdsearch.records import Passage, Question

DATASET = "tiny"
# Probability that a warm-started model picks its first, second, ... word for a relation.
WORD_PRIOR = (0.46, 0.24, 0.20, 0.10)
NUM_TRAIN_PER_HOP = 400
NUM_HELDOUT_PER_HOP = 155
HELDOUT_SHARE = 0.36
# Share of questions that a greedy searcher with WORD_PRIOR gets right, averaged over both hops.
START_RANGE = (0.24, 0.34)

NameType = Literal["country", "province", "element"]
Answers = Mapping[str, Mapping[str, str]]
Subjects = Mapping[NameType, tuple[str, ...]]


class Relation(NamedTuple):
    """A relation between a subject and an answer, stated by passages.

    Attributes:
        name: the key of its facts.
        cue: its name in questions; not one of the synonyms, so that a question does not reveal the house word.
        synonyms: four words, of which the corpus uses one. No word belongs to two relations.
        subject: type of its subjects.
        answer: type of its answers; ``None`` if no second hop starts from them.
    """

    name: str
    cue: str
    synonyms: tuple[str, str, str, str]
    subject: NameType
    answer: NameType | None = None


Path = tuple[Relation, ...]
RELATIONS: Path = (
    Relation("capital", "chief city", ("capital", "seat", "metropolis", "headtown"), "country"),
    Relation("demonym", "people", ("demonym", "inhabitant", "native", "citizen"), "country"),
    Relation("currency", "money", ("currency", "tender", "coinage", "cash"), "country"),
    Relation("state", "country", ("nation", "state", "realm", "land"), "province", "country"),
    Relation("symbol", "sign", ("symbol", "notation", "letters", "sigil"), "element"),
    Relation("discoverer", "finder", ("discoverer", "pioneer", "isolator", "detector"), "element"),
    Relation("origin", "birthplace", ("origin", "cradle", "provenance", "source"), "element", "country"),
    Relation("successor", "neighbour", ("successor", "follower", "next", "heir"), "element", "element"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoWorld:
    """The corpus, the questions and the facts behind them.

    Attributes:
        seed: determines the whole world.
        answers: relation -> subject -> answer.
        word_order: relation -> its synonyms, most likely in a warm-started model first (see WORD_PRIOR).
        house_words: relation -> the synonym that the corpus uses.
        train_subjects: type -> subjects that training questions and demonstrations start from.
        heldout_subjects: type -> subjects that only held-out questions start from.
        passages: the corpus.
        train: training questions.
        heldout: held-out questions.
    """

    seed: int
    answers: Answers
    word_order: Mapping[str, tuple[str, ...]]
    house_words: Mapping[str, str]
    train_subjects: Subjects
    heldout_subjects: Subjects
    passages: tuple[Passage, ...]
    train: tuple[Question, ...]
    heldout: tuple[Question, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """All subjects and answers, sorted."""
        tables = self.answers.values()
        return tuple(sorted({name for table in tables for name in (*table.keys(), *table.values())}))


def build_world(facts: FactBook, seed: int) -> DemoWorld:
    """Draw the wording and the split, and write passages and questions.

    Raises:
        DataError: there are too few facts for the number of questions.
    """
    rng = random.Random(f"tiny-world:{seed}")
    train_subjects, heldout_subjects = _split_subjects(facts.answers, rng)
    word_order = {relation.name: tuple(rng.sample(relation.synonyms, 4)) for relation in RELATIONS}
    house_words = _draw_house_words(word_order, rng)
    passages = [
        Passage(
            passage_id=passage_id(relation.name, subject, word),
            contents=passage_text(subject, word, answer if word == house_words[relation.name] else None),
        )
        for relation in RELATIONS
        for subject, answer in facts.answers[relation.name].items()
        for word in relation.synonyms
    ]
    rng.shuffle(passages)
    return DemoWorld(
        seed=seed,
        answers=facts.answers,
        word_order=word_order,
        house_words=house_words,
        train_subjects=train_subjects,
        heldout_subjects=heldout_subjects,
        passages=tuple(passages),
        train=_ask("train", facts.answers, house_words, train_subjects, NUM_TRAIN_PER_HOP, rng),
        heldout=_ask("heldout", facts.answers, house_words, heldout_subjects, NUM_HELDOUT_PER_HOP, rng),
    )


def _split_subjects(answers: Answers, rng: random.Random) -> tuple[Subjects, Subjects]:
    """Divide the subjects of each type into training and held-out ones."""
    train: dict[NameType, tuple[str, ...]] = {}
    heldout: dict[NameType, tuple[str, ...]] = {}
    for name_type in sorted({relation.subject for relation in RELATIONS}):
        tables = (answers[relation.name] for relation in RELATIONS if relation.subject == name_type)
        subjects = sorted({subject for table in tables for subject in table})
        rng.shuffle(subjects)
        cut = round(HELDOUT_SHARE * len(subjects))
        heldout[name_type], train[name_type] = tuple(subjects[:cut]), tuple(subjects[cut:])
    return train, heldout


def _draw_house_words(word_order: Mapping[str, tuple[str, ...]], rng: random.Random) -> dict[str, str]:
    """Choose the house words: the word at rank 1 for a few relations, at rank 2 or 3 for the others.

    Redraws until the share of paths with the house word at rank 1 at every hop, averaged over one-hop and two-hop
    paths, is in START_RANGE: low enough to leave room for learning, high enough for a reward signal.
    """
    while True:
        ranks = {name: rng.choice((0, 0, 1, 1, 2, 2)) for name in word_order}
        shares = (fmean(all(ranks[relation.name] == 0 for relation in path) for path in group) for group in paths())
        if START_RANGE[0] <= fmean(shares) <= START_RANGE[1]:
            return {name: word_order[name][rank] for name, rank in ranks.items()}


def paths() -> tuple[list[Path], list[Path]]:
    """List all one-hop and all two-hop paths, in hop order; no path takes the same relation twice."""
    pairs = [(first, then) for first in RELATIONS for then in RELATIONS if first.answer == then.subject]
    return [(relation,) for relation in RELATIONS], [(first, then) for first, then in pairs if first != then]


def passage_id(relation: str, subject: str, word: str) -> str:
    """Return the id of one passage."""
    return f"{subject}.{relation}.{word}"


def passage_text(subject: str, word: str, answer: str | None) -> str:
    """Write a passage that states a fact or, without an answer, a trap of the same length that states nothing.

    The subject is in the title and in the text. Otherwise, if subjects and answers have one type (the successor of an
    element), BM25 could not distinguish the passage about a name from one that only mentions it.
    """
    return f'"{subject}"\nThe {word} of {subject} is {answer or "unrecorded"}.'


def question_text(path: Path, subject: str) -> str:
    """Write a question, which asks for the last relation of ``path``."""
    return f"What is {''.join(f'the {relation.cue} of ' for relation in reversed(path))}{subject}?"


def _ask(
    split: str,
    answers: Answers,
    house_words: Mapping[str, str],
    subjects: Subjects,
    num_per_hop: int,
    rng: random.Random,
) -> tuple[Question, ...]:
    """Write ``num_per_hop`` one-hop and as many two-hop questions, shuffled together."""
    asked: list[tuple[Path, list[str]]] = []
    for hop_paths in paths():
        usable = []
        for path in hop_paths:
            for subject in subjects[path[0].subject]:
                names: list[str] = [subject]
                for relation in path:
                    if answer := answers[relation.name].get(names[-1]):
                        names.append(answer)
                if len(names) == len(path) + 1:
                    usable.append((path, names))
        if len(usable) < num_per_hop:
            raise DataError(f"{split}: {len(usable)} questions of {len(hop_paths[0])} hop(s), need {num_per_hop}")
        asked += rng.sample(usable, num_per_hop)
    rng.shuffle(asked)
    return tuple(
        Question(
            question_id=f"{DATASET}:{split}:{number}",
            text=question_text(path, names[0]),
            gold_answers=(names[-1],),
            dataset=DATASET,
            gold_passage_ids=tuple(
                passage_id(relation.name, name, house_words[relation.name])
                for relation, name in zip(path, names, strict=False)
            ),
        )
        for number, (path, names) in enumerate(asked)
    )
