"""Plans the groups of a step and the ranks that roll them out: pure functions of configuration, seed and step.

A slot is the position of a group in the step's batch. It holds one request, or with refills several that are tried in
order (``collector.py``). A slot's requests depend neither on the order in which groups complete nor on the number of
ranks.
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
        question: of all siblings.
        trajectory_ids: of its siblings. If a question occurs again in a step, numbering continues, so that every
            trajectory has its own id and random stream.
    """

    question: Question
    trajectory_ids: tuple[TrajectoryId, ...]


Slot = tuple[GroupRequest, ...]


def rollout_ranks(config: RunConfig, world_size: int) -> range:
    """Return the ranks that roll out, in the order of their shares.

    With servers, only the first rank of each data-parallel replica (tensor and pipeline rank 0) is a client of them and
    of the search engine. With the embedded engine, every rank has a whole copy of the weights and samples.
    """
    if not config.samples_from_sglang:
        return range(world_size)
    # Megatron numbers tensor-parallel ranks first, then data-parallel ones, then pipeline stages.
    parallel = config.parallel
    return range(0, world_size // parallel.pipeline_model_parallel_size, parallel.tensor_model_parallel_size)


def plan_step(sampler: QuestionSampler, rollout: RolloutConfig, *, step: int) -> list[Slot]:
    """Return the slots of a step: each has the batch's question, then ``rollout.max_refills`` others.

    Args:
        sampler: of the run.
        rollout: ``group_size`` and ``max_refills`` are read.
        step: 0-based.
    """
    slots: list[Slot] = []
    for index, question in enumerate(sampler.batch(step)):
        # Every refill has its own entry of the sampler's list, used or not, so that ranks need not exchange what they
        # have refilled.
        first = index * rollout.max_refills
        candidates = [(question, 0), *(sampler.fresh(step, first + refill) for refill in range(rollout.max_refills))]
        slots.append(tuple(_request(q, num_before, step, rollout.group_size) for q, num_before in candidates))
    return slots


def one_group_each(questions: Sequence[Question], *, step: int, group_size: int) -> list[Slot]:
    """Return one slot without refills for each listed question, including duplicates."""
    num_seen: Counter[str] = Counter()
    slots: list[Slot] = []
    for question in questions:
        slots.append((_request(question, num_seen[question.question_id], step, group_size),))
        num_seen[question.question_id] += 1
    return slots


def _request(question: Question, num_before: int, step: int, group_size: int) -> GroupRequest:
    """Return the request for a question that ``num_before`` earlier groups of the step have."""
    siblings = range(num_before * group_size, (num_before + 1) * group_size)
    ids = tuple(TrajectoryId(step=step, question_id=question.question_id, sibling=sibling) for sibling in siblings)
    return GroupRequest(question=question, trajectory_ids=ids)
