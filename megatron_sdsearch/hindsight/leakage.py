"""Which siblings give the answer away in their queries.

Future masking hides reasoning, documents and answers from the teacher, yet a policy that already knows (or guessed) the
answer may put it into a query, and the query is shown. This module finds such siblings; whether they are left out is
``hindsight.drop_leaks`` (``block.py``). What counts as "holds an answer" belongs to ``data/scoring.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_sdsearch.data.scoring import contains_answer
from megatron_sdsearch.records import Trajectory


def leaking_siblings(trajectories: Sequence[Trajectory], gold_answers: Sequence[str]) -> tuple[int, ...]:
    """Sibling indices with at least one query that holds a gold answer.

    Each query is looked at alone: an answer spread over two queries was not given away by either. A question that
    names its own answer ("Which is older, A or B?") flags every query about that answer; the teacher learns nothing new
    there, so read the count next to the share of such questions.

    Args:
        trajectories: of one question.
        gold_answers: of that question.

    Returns:
        ``trajectory_id.sibling`` of the leaking ones, in the order given.
    """
    return tuple(
        trajectory.trajectory_id.sibling
        for trajectory in trajectories
        if any(contains_answer(query, gold_answers) for query in trajectory.queries)
    )
