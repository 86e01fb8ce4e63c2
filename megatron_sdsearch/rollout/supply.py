"""What is asked where: the places of one process in one step, and the questions that stand at them in turn.

A place is the index of a group in the step's batch over all processes; those from ``questions_per_step`` on are begun
beside the batch, for over-sampling. Questions are a pure function of (seed, step, place, attempt): neither the order in
which groups complete nor the number of processes changes what a place asks. Running the groups is ``groups.py``'s.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_sdsearch.config import RolloutConfig
from megatron_sdsearch.data.questions import QuestionSampler
from megatron_sdsearch.records import Question, TrajectoryId


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """One group to be rolled out.

    Attributes:
        question: what is asked.
        trajectory_ids: of its siblings. A question that a step asks twice numbers its siblings on, so that every
            trajectory keeps an id and a random stream of its own.
    """

    question: Question
    trajectory_ids: tuple[TrajectoryId, ...]

    @classmethod
    def of(cls, question: Question, *, step: int, group_size: int, num_before: int) -> Draw:
        """The group of a question that ``num_before`` groups of the step have asked already."""
        first = num_before * group_size
        ids = (
            TrajectoryId(step=step, question_id=question.question_id, sibling=s)
            for s in range(first, first + group_size)
        )
        return cls(question=question, trajectory_ids=tuple(ids))


@dataclass(frozen=True, slots=True, kw_only=True)
class Supply:
    """The work of one process in one step.

    Attributes:
        num_groups: are wanted.
        places: are begun, ascending; at least ``num_groups``.
        max_refills: how often a group without contrast gives way, at each place.
        draw: (place, attempt from 0 to ``max_refills``) -> the group.
    """

    num_groups: int
    places: Sequence[int]
    max_refills: int
    draw: Callable[[int, int], Draw]


def exactly(questions: Sequence[Question], *, step: int, group_size: int) -> Supply:
    """These questions, each once as often as it stands there."""
    num_seen: Counter[str] = Counter()
    draws = []
    for question in questions:
        num_before = num_seen[question.question_id]
        draws.append(Draw.of(question, step=step, group_size=group_size, num_before=num_before))
        num_seen[question.question_id] += 1
    places = range(len(draws))
    return Supply(num_groups=len(draws), places=places, max_refills=0, draw=lambda place, attempt: draws[place])


def supply_of(
    sampler: QuestionSampler, rollout: RolloutConfig, *, step: int, rank: int = 0, world_size: int = 1
) -> Supply:
    """A process's share of a step's batch, with what over-sampling and refills may ask beside it.

    Args:
        sampler: of the run.
        rollout: ``group_size`` and ``max_refills`` are read.
        step: 0-based.
        rank: of this process among those that roll out.
        world_size: how many do; they share places out in turn.
    """
    batch = sampler.batch(step)
    num_groups = len(range(rank, len(batch), world_size))
    num_begun = num_groups

    def draw(place: int, attempt: int) -> Draw:
        question, num_before = _question_at(sampler, batch, step, rollout.max_refills, place, attempt)
        return Draw.of(question, step=step, group_size=rollout.group_size, num_before=num_before)

    places = range(rank, rank + num_begun * world_size, world_size)
    return Supply(num_groups=num_groups, places=places, max_refills=rollout.max_refills, draw=draw)


def _question_at(
    sampler: QuestionSampler, batch: Sequence[Question], step: int, max_refills: int, place: int, attempt: int
) -> tuple[Question, int]:
    """The question, and how many groups of the step have, or might have, asked it before.

    Every (place, attempt) has an entry of the sampler's list to itself, used or not: first the refills of the batch's
    places, then whatever is begun beside it, of which no process knows how many others begin.
    """
    beside = place - len(batch)
    if beside >= 0:
        return sampler.fresh(step, len(batch) * max_refills + beside * (max_refills + 1) + attempt)
    if attempt == 0:
        return batch[place], 0
    return sampler.fresh(step, place * max_refills + attempt - 1)
