"""How an answer compares with the gold answers: SQuAD normalisation, exact match, F1, and the shaped rewards.

Owns ``records.Score``, which says once whether an answer is correct, and the class of a group. Leaves the labels in the
teacher's context to ``hindsight/``, and advantages to ``batching/``.
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
"""AutoRefine's reward for a wrong answer whose refinement held a right one."""

_DELETE_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLE = re.compile(r"\b(?:a|an|the)\b")
_REFINE = re.compile(r"<refine>(.*?)</refine>", re.DOTALL)
_CLOSED_ANSWERS = frozenset({"yes", "no", "noanswer"})


def normalize_answer(text: str) -> str:
    """Lower case, ASCII punctuation deleted, articles dropped, single spaces (SQuAD v1.1 evaluation)."""
    bare = text.lower().translate(_DELETE_PUNCTUATION)
    return " ".join(_ARTICLE.sub(" ", bare).split())


def exact_match(answer: str, gold_answers: Sequence[str]) -> float:
    """1.0 when the normalised answer equals any normalised gold answer, else 0.0."""
    return max((_em_of_one(answer, gold) for gold in gold_answers), default=0.0)


def f1_score(answer: str, gold_answers: Sequence[str]) -> float:
    """Best token F1 over the gold answers, in [0, 1].

    With HotpotQA's guard: when either side is ``yes``, ``no`` or ``noanswer``, only equality scores.
    """
    return max((_f1_of_one(answer, gold) for gold in gold_answers), default=0.0)


def contains_answer(text: str, gold_answers: Sequence[str]) -> bool:
    """Whether a normalised gold answer stands in the normalised text as a run of whole words.

    A gold answer that normalises to nothing (``"The"``) is never found.
    """
    # One space on each side makes every word boundary a space.
    haystack = f" {normalize_answer(text)} "
    needles = (normalize_answer(gold) for gold in gold_answers)
    return any(needle and f" {needle} " in haystack for needle in needles)


def score_trajectory(trajectory: Trajectory, question: Question, reward: RewardType, rho: float) -> Score:
    """Score one trajectory's final answer.

    Args:
        trajectory: its ``answer`` is scored; without one every number is 0.
        question: brings the gold answers.
        reward: ``f1`` or ``em`` reward that number. ``autorefine`` rewards F1, or where that is 0, ``REFINE_REWARD`` if
            a gold answer stands in a ``<refine>`` block that the policy itself wrote.
        rho: the answer is correct when its F1 is above it; in [0, 1].
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
    """Whether a group holds a contrast to learn from: by ``Score.is_correct`` over its trainable trajectories.

    By F1 and not by the reward: a shaped reward above 0 would make groups without any right answer look mixed. A group
    with no trainable trajectory is ``all_wrong``.
    """
    pairs = zip(group.trajectories, group.scores, strict=True)
    outcomes = {score.is_correct for trajectory, score in pairs if trajectory.is_trainable}
    if outcomes == {True}:
        return "all_correct"
    return "mixed" if len(outcomes) == 2 else "all_wrong"


def _em_of_one(answer: str, gold: str) -> float:
    normal_answer, normal_gold = normalize_answer(answer), normalize_answer(gold)
    if not normal_gold:
        # Blood type "A" and the answer "the" both normalise to nothing: compare what was written.
        return float(answer.strip().lower() == gold.strip().lower())
    return float(normal_answer == normal_gold)


def _f1_of_one(answer: str, gold: str) -> float:
    normal_answer, normal_gold = normalize_answer(answer), normalize_answer(gold)
    if not normal_gold or {normal_answer, normal_gold} & _CLOSED_ANSWERS:
        return _em_of_one(answer, gold)
    answer_tokens, gold_tokens = normal_answer.split(), normal_gold.split()
    num_common = (Counter(answer_tokens) & Counter(gold_tokens)).total()
    return 2 * num_common / (len(answer_tokens) + len(gold_tokens))
