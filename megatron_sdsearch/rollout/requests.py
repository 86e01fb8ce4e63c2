"""Which groups a step rolls out, and which ranks do it: pure functions of configuration, seed and step.

A slot is the position of a group in the step's batch. It holds one request, or with refills several that are tried in
turn (``collector.py``). Neither the order in which groups complete nor the number of ranks changes a slot's requests.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_sdsearch.config import RolloutConfig, RunConfig
from megatron_sdsearch.data.questions import QuestionSampler
from megatron_sdsearch.records import Question, TrajectoryId


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRequest:
    """One group to roll out.

    Attributes:
        question: to ask.
        trajectory_ids: of its siblings. Where a step asks a question again the numbering goes on, so that every
            trajectory has an id and a random stream of its own.
    """

    question: Question
    trajectory_ids: tuple[TrajectoryId, ...]


Slot = tuple[GroupRequest, ...]


def rollout_ranks(config: RunConfig, world_size: int) -> range:
    """The ranks that roll out, in the order of their shares.

    With servers the first rank of each data-parallel replica (tensor and pipeline rank 0) is the only client of them
    and of the search engine. With the embedded engine every rank holds a whole copy of the weights and samples.
    """
    if not config.samples_from_sglang:
        return range(world_size)
    # Megatron numbers tensor-parallel ranks first, then data-parallel ones, then pipeline stages.
    parallel = config.parallel
    return range(0, world_size // parallel.pipeline_model_parallel_size, parallel.tensor_model_parallel_size)


def plan_step(sampler: QuestionSampler, rollout: RolloutConfig, *, step: int) -> list[Slot]:
    """The slots of a step, each with the question of the batch and ``rollout.max_refills`` others behind it.

    Args:
        sampler: of the run.
        rollout: ``group_size`` and ``max_refills`` are read.
        step: 0-based.
    """
    slots: list[Slot] = []
    for index, question in enumerate(sampler.batch(step)):
        # Every refill has an entry of the sampler's list to itself, used or not: no rank needs to know what the others
        # have refilled.
        first = index * rollout.max_refills
        asked = [(question, 0), *(sampler.fresh(step, first + refill) for refill in range(rollout.max_refills))]
        slots.append(tuple(_request(q, num_before, step, rollout.group_size) for q, num_before in asked))
    return slots


def one_group_each(questions: Sequence[Question], *, step: int, group_size: int) -> list[Slot]:
    """One slot without refills for each question listed, duplicates included."""
    num_seen: Counter[str] = Counter()
    slots: list[Slot] = []
    for question in questions:
        slots.append((_request(question, num_seen[question.question_id], step, group_size),))
        num_seen[question.question_id] += 1
    return slots


def _request(question: Question, num_before: int, step: int, group_size: int) -> GroupRequest:
    """The group of a question that ``num_before`` groups of the step have asked already."""
    siblings = range(num_before * group_size, (num_before + 1) * group_size)
    ids = tuple(TrajectoryId(step=step, question_id=question.question_id, sibling=sibling) for sibling in siblings)
    return GroupRequest(question=question, trajectory_ids=ids)
