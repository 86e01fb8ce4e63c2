"""How long trajectories are: the assumptions that everything per step rests on, and the counts that follow."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from megatron_sdsearch.config import RunConfig
from megatron_sdsearch.plan.layout import Layout, MicrobatchLoad

DEFAULT_FILL = 0.5
"""Share of each configured budget that a mean trajectory uses; nobody has measured it for a recipe of ours."""
DEFAULT_QUERY_TOKENS = 16.0
"""Between the search tags: a dozen words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Means over trajectories; all are assumptions until a run's metrics replace them.

    Attributes:
        prompt_tokens: of the question with its instructions.
        searches: per trajectory.
        response_tokens: per generation; there is one more generation than searches.
        observation_tokens: per search.
        query_tokens: per search, the distilled ones.
        block_tokens: of the hindsight block; with ``hindsight.content=documents``, of one search's.
        search_s: seconds that a trajectory waits for one search.
    """

    prompt_tokens: float
    searches: float
    response_tokens: float
    observation_tokens: float
    query_tokens: float = DEFAULT_QUERY_TOKENS
    block_tokens: float = 0.0
    search_s: float = 0.5

    @classmethod
    def of(cls, config: RunConfig, *, fill: float = DEFAULT_FILL) -> Workload:
        """Every budget of ``rollout`` and ``hindsight`` filled to the same share."""
        rollout, is_distilled = config.rollout, config.is_distilling
        block = fill * config.hindsight.max_block_tokens
        if config.hindsight.content == "documents":  # one observation, unless it is cut
            block = min(fill * rollout.max_observation_tokens, config.hindsight.max_block_tokens)
        return cls(
            prompt_tokens=fill * rollout.max_prompt_tokens,
            searches=fill * rollout.max_turns,
            response_tokens=fill * rollout.max_response_tokens,
            observation_tokens=fill * rollout.max_observation_tokens,
            query_tokens=min(DEFAULT_QUERY_TOKENS, fill * rollout.max_response_tokens),
            block_tokens=block * is_distilled,
        ).within(rollout.max_total_tokens)

    def within(self, max_total_tokens: int) -> Workload:
        """The same with fewer searches where a trajectory would outgrow its limit."""
        per_search = self.response_tokens + self.observation_tokens
        room = max_total_tokens - self.prompt_tokens - self.response_tokens
        if self.searches * per_search <= room or per_search == 0:
            return self
        return replace(self, searches=max(0.0, room / per_search))

    @property
    def generated_tokens(self) -> float:
        """Sampled in one trajectory."""
        return (self.searches + 1) * self.response_tokens

    @property
    def observed_tokens(self) -> float:
        """Put into one trajectory by the search engine."""
        return self.searches * self.observation_tokens

    @property
    def student_tokens(self) -> float:
        """One trajectory."""
        return self.prompt_tokens + self.generated_tokens + self.observed_tokens

    @property
    def distilled_tokens(self) -> float:
        """Query tokens of one trajectory."""
        return self.searches * self.query_tokens

    @property
    def teacher_tokens(self) -> float:
        """One trajectory as the teacher reads it: longer by the block, cut after the last query."""
        if self.block_tokens == 0 or self.searches == 0:
            return 0.0
        after = self.observation_tokens + self.response_tokens
        return self.student_tokens - after + self.block_tokens

    @property
    def document_teacher_tokens(self) -> float:
        """One trajectory as the teacher reads it search by search, each time up to the search's query, all together.

        ``hindsight.content=documents``: docs/adr/0007-current-step-documents.md.
        """
        if self.block_tokens == 0:
            return 0.0
        first = self.prompt_tokens + self.block_tokens + self.response_tokens
        per_search = self.response_tokens + self.observation_tokens
        return self.searches * (first + max(0.0, self.searches - 1) / 2 * per_search)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLoad:
    """What one step does, over all ranks.

    Attributes:
        workload: the trajectories' lengths.
        num_trajectories: of the step.
        num_minibatches: optimizer updates of it.
        is_distilled: a teacher reads them.
        has_reference: a reference model reads them.
        longest_documents: most tokens that the teacher reads of one trajectory, a sequence for each search; 0 where it
            reads one sequence.
    """

    workload: Workload
    num_trajectories: int
    num_minibatches: int
    is_distilled: bool
    has_reference: bool
    longest_documents: int = 0

    @classmethod
    def of(cls, config: RunConfig, workload: Workload) -> StepLoad:
        """Of an RL step once the distillation has begun, or of one update of a warm start."""
        if config.train.mode == "warm_start":
            return cls(
                workload=workload,
                num_trajectories=config.train.demonstrations_per_step,
                num_minibatches=1,
                is_distilled=False,
                has_reference=False,
            )
        num = config.data.questions_per_step * config.rollout.group_size
        return cls(
            workload=workload,
            num_trajectories=num,
            num_minibatches=config.updates_per_step,
            is_distilled=config.is_distilling and workload.teacher_tokens > 0,
            has_reference=config.objective.kl_coef > 0,
            longest_documents=_longest_documents(config) if config.hindsight.content == "documents" else 0,
        )

    @property
    def teacher_tokens(self) -> float:
        """Of one trajectory, in all sequences that the teacher reads of it."""
        if not self.is_distilled:
            return 0.0
        return self.workload.document_teacher_tokens if self.longest_documents else self.workload.teacher_tokens

    @property
    def teacher_sequences(self) -> float:
        """That the teacher reads of one trajectory."""
        return max(1.0, self.workload.searches) if self.longest_documents else 1.0

    def num_microbatches(self, layout: Layout) -> int:
        """Of one rank's minibatch: rows are filled by the longer of the two readings."""
        per_trajectory = max(self.workload.student_tokens, self.teacher_tokens)
        per_rank = math.ceil(self.num_trajectories / self.num_minibatches / layout.dp)
        return max(1, math.ceil(per_rank / max(1, layout.max_tokens // max(1.0, per_trajectory))))

    def largest_microbatch(self, layout: Layout, *, distills_all: bool) -> MicrobatchLoad:
        """A full row of which every token is the policy's: no batch can ask for more logits.

        The teacher's row is longer where the sequences of one trajectory are: they stay together (``packing.py``).
        """
        workload = self.workload
        share = 1.0 if distills_all else workload.distilled_tokens / max(1.0, workload.generated_tokens)
        alignment = layout.tp if layout.sequence else 1
        num_tokens = layout.max_tokens // alignment * alignment
        return MicrobatchLoad(
            num_tokens=num_tokens,
            policy_rows=num_tokens,
            query_rows=math.ceil(share * num_tokens) if self.is_distilled else 0,
            teacher_tokens=max(num_tokens, _aligned(self.longest_documents, alignment)) if self.is_distilled else 0,
            num_microbatches=self.num_microbatches(layout),
        )


def _aligned(num_tokens: int, alignment: int) -> int:
    return -(-num_tokens // alignment) * alignment


def _longest_documents(config: RunConfig) -> int:
    """All budgets full: up to its i-th query a trajectory has i responses and i - 1 observations."""
    rollout = config.rollout
    per_search = rollout.max_response_tokens + rollout.max_observation_tokens
    first = rollout.max_prompt_tokens + rollout.max_response_tokens
    students = (min(first + i * per_search, rollout.max_total_tokens) for i in range(rollout.max_turns))
    block = min(
        rollout.max_observation_tokens, config.hindsight.max_block_tokens
    )  # its header is an observation's tags
    return sum(student + block for student in students)
