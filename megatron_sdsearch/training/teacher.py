"""The hindsight teacher: the policy's own current weights on the augmented context, without gradient (paper 3.2)."""

from __future__ import annotations

from torch import Tensor

from megatron_sdsearch.config import ObjectiveConfig
from megatron_sdsearch.loss.logprobs import vocab_parallel_entropy
from megatron_sdsearch.loss.objective import RowLogits, TeacherTarget
from megatron_sdsearch.loss.topk import TopKDistribution, teacher_topk
from megatron_sdsearch.parallel.schedule import DeviceMicrobatch
from megatron_sdsearch.records import Minibatch
from megatron_sdsearch.training.policy import Policy


class HindsightTeacher:
    """Reads the policy at the query positions of the teacher sequences. Holds no weights of its own."""

    def __init__(self, policy: Policy, objective: ObjectiveConfig) -> None:
        self._policy = policy
        self._topk = objective.topk if objective.topk_of == "teacher" else None

    def distributions(self, minibatch: Minibatch) -> list[TeacherTarget]:
        """One target per microbatch, row r for its r-th query token; empty off the last stage or with no teacher."""
        return self._policy.collect(minibatch.teacher, self._read)

    def _read(self, logits: RowLogits, batch: DeviceMicrobatch) -> TeacherTarget:
        def read(part: Tensor, *_: int) -> tuple[Tensor, ...]:
            entropy = vocab_parallel_entropy(part, logits.shard, temperature=logits.temperature)
            if self._topk is None:
                return entropy, part
            top = teacher_topk(part, logits.shard, self._topk, temperature=logits.temperature)
            return entropy, top.ids, top.logprobs, top.log_tail

        entropy, *parts = logits.map(batch.query_rows, read)
        if self._topk is None:
            return TeacherTarget(distribution=parts[0], entropy=entropy)
        ids, logprobs, log_tail = parts
        topk = TopKDistribution(ids=ids, logprobs=logprobs, log_tail=log_tail)
        return TeacherTarget(distribution=topk, entropy=entropy)
