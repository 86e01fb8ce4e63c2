"""The hindsight teacher: the policy's own current weights on the augmented context, without gradient (paper 3.2)."""

from __future__ import annotations

from torch import Tensor

from megatron_sdsearch.config import ObjectiveConfig
from megatron_sdsearch.loss.jsd import TopKDistribution, teacher_topk
from megatron_sdsearch.loss.objective import RowLogits, TeacherTarget
from megatron_sdsearch.parallel.schedule import DeviceMicrobatch
from megatron_sdsearch.records import Minibatch
from megatron_sdsearch.training.policy import Policy


class HindsightTeacher:
    """Reads the policy at the query positions of the teacher sequences. Holds no weights of its own."""

    def __init__(self, policy: Policy, objective: ObjectiveConfig) -> None:
        self._policy = policy
        self._objective = objective

    def distributions(self, minibatch: Minibatch) -> list[TeacherTarget]:
        """One target per microbatch, row r for its r-th query token; empty off the last stage or with no teacher."""
        return self._policy.collect(minibatch.teacher, self._read)

    def _read(self, logits: RowLogits, batch: DeviceMicrobatch) -> TeacherTarget:
        topk = self._objective.topk
        if topk is None:
            return logits.map(batch.query_rows, lambda part, *_: (part,))[0]

        def read(part: Tensor, *_: int) -> tuple[Tensor, ...]:
            top = teacher_topk(part, logits.shard, topk, temperature=logits.temperature)
            return top.ids, top.logprobs, top.log_tail

        ids, logprobs, log_tail = logits.map(batch.query_rows, read)
        return TopKDistribution(ids=ids, logprobs=logprobs, log_tail=log_tail)
