"""Scores answers against gold answers: SQuAD normalisation, exact match, F1, and shaped rewards.

Computes ``records.Score``, the only place that decides whether an answer is correct, and the class of a group.
``hindsight/`` labels the teacher's context, ``batching/`` computes advantages.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from megatron_sdsearch.records import GroupClass, Question, RolloutGroup, Score, Trajectory

RewardType = Literal["f1", "em", "autorefine"]

REFINE_REWARD = 0.1
"""AutoRefine's reward for a wrong answer after a refinement that contains a gold answer."""

_DELETE_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLE = re.compile(r"\b(?:a|an|the)\b")
_REFINE = re.compile(r"<refine>(.*?)</refine>", re.DOTALL)
_CLOSED_ANSWERS = frozenset({"yes", "no", "noanswer"})


def normalize_answer(text: str) -> str:
    """Lower-case, delete ASCII punctuation and articles, collapse white space (SQuAD v1.1 evaluation)."""
    bare = text.lower().translate(_DELETE_PUNCTUATION)
    return " ".join(_ARTICLE.sub(" ", bare).split())


def exact_match(answer: str, gold_answers: Sequence[str]) -> float:
    """Return 1.0 if the normalised answer equals any normalised gold answer, else 0.0."""
    return max((_exact_match(answer, gold) for gold in gold_answers), default=0.0)


def f1_score(answer: str, gold_answers: Sequence[str]) -> float:
    """Return the best token F1 over the gold answers, in [0, 1].

    As in HotpotQA, if either side is ``yes``, ``no`` or ``noanswer``, only equality scores.
    """
    return max((_f1_score(answer, gold) for gold in gold_answers), default=0.0)


def contains_answer(text: str, gold_answers: Sequence[str]) -> bool:
    """Return whether the normalised text contains a normalised gold answer, as whole words.

    A gold answer that normalises to the empty string (``"The"``) is never found.
    """
    # One space on each side makes every word boundary a space.
    haystack = f" {normalize_answer(text)} "
    needles = (normalize_answer(gold) for gold in gold_answers)
    return any(needle and f" {needle} " in haystack for needle in needles)


def score_trajectory(trajectory: Trajectory, question: Question, reward: RewardType, rho: float) -> Score:
    """Score one trajectory's final answer.

    Args:
        trajectory: without an ``answer`` all scores are 0.
        question: has the gold answers.
        reward: ``f1``, ``em``, or ``autorefine``: F1, or if that is 0, ``REFINE_REWARD`` if a ``<refine>`` block
            written by the policy contains a gold answer.
        rho: the answer is correct if its F1 is above it; in [0, 1].
    """
    if trajectory.answer is None:
        return Score(f1=0.0, em=0.0, reward=0.0, is_correct=False)
    golds = question.gold_answers
    f1, em = f1_score(trajectory.answer, golds), exact_match(trajectory.answer, golds)
    value = em if reward == "em" else f1
    if reward == "autorefine" and f1 == 0:
        refined = (block for span in trajectory.sampled_spans for block in _REFINE.findall(span.text))
        value = REFINE_REWARD if any(contains_answer(block, golds) for block in refined) else 0.0
    return Score(f1=f1, em=em, reward=value, is_correct=f1 > rho)


def group_class(group: RolloutGroup) -> GroupClass:
    """Classify a group by ``Score.is_correct`` of its trainable trajectories; without any it is ``all_wrong``.

    Not by the reward: a shaped reward above 0 would make groups without a correct answer look mixed.
    """
    pairs = zip(group.trajectories, group.scores, strict=True)
    outcomes = {score.is_correct for trajectory, score in pairs if trajectory.is_trainable}
    if outcomes == {True}:
        return "all_correct"
    return "mixed" if len(outcomes) == 2 else "all_wrong"


def _exact_match(answer: str, gold: str) -> float:
    normal_answer, normal_gold = normalize_answer(answer), normalize_answer(gold)
    if not normal_gold:
        # Blood type "A" and the answer "the" both normalise to the empty string: compare the original texts.
        return float(answer.strip().lower() == gold.strip().lower())
    return float(normal_answer == normal_gold)


def _f1_score(answer: str, gold: str) -> float:
    normal_answer, normal_gold = normalize_answer(answer), normalize_answer(gold)
    if not normal_gold or {normal_answer, normal_gold} & _CLOSED_ANSWERS:
        return _exact_match(answer, gold)
    answer_tokens, gold_tokens = normal_answer.split(), normal_gold.split()
    num_common = (Counter(answer_tokens) & Counter(gold_tokens)).total()
    return 2 * num_common / (len(answer_tokens) + len(gold_tokens))
