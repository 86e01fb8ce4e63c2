"""Work of a step: layout of the ranks, lengths of the trajectories, and the largest microbatch."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from megatron_sdsearch.allocation import Roles, Servers
from megatron_sdsearch.config import RunConfig
from megatron_sdsearch.errors import ConfigError

# Share of each configured budget that a mean trajectory uses. An assumption: no recipe was measured.
DEFAULT_FILL = 0.5
_QUERY_TOKENS = 16.0  # between the search tags: a dozen words


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Settings that can change without changing what is learned.

    Attributes:
        tp, pp, dp: tensor, pipeline and data parallel sizes; their product is the number of ranks.
        sequence: sequence parallel.
        recompute: keep only layer inputs (``model.recompute=full``).
        max_tokens: limit of a microbatch.
        chunk_rows: rows of logits that exist at one time.
        distributed_optimizer: optimizer state is sharded over data-parallel ranks.
        servers: None with the embedded engine, and without rollouts.
    """

    tp: int
    pp: int
    dp: int
    sequence: bool
    recompute: bool
    max_tokens: int
    chunk_rows: int
    distributed_optimizer: bool
    servers: Servers | None

    @property
    def num_ranks(self) -> int:
        """Ranks of torchrun."""
        return self.tp * self.pp * self.dp

    @classmethod
    def from_config(cls, config: RunConfig, roles: Roles) -> Layout:
        """Read the configured layout; its sizes must divide the ranks."""
        parallel = config.parallel
        tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
        return cls(
            tp=tp,
            pp=pp,
            dp=roles.world_size // (tp * pp),
            sequence=parallel.sequence_parallel,
            recompute=config.model.recompute == "full",
            max_tokens=config.train.max_tokens_per_microbatch,
            chunk_rows=config.model.logits_chunk_tokens,
            distributed_optimizer=parallel.distributed_optimizer,
            servers=roles.servers,
        )

    def overrides(self) -> list[str]:
        """Return the settings as ``key=value`` for the command line."""
        return [
            f"parallel.tensor_model_parallel_size={self.tp}",
            f"parallel.pipeline_model_parallel_size={self.pp}",
            f"parallel.sequence_parallel={str(self.sequence).lower()}",
            f"parallel.distributed_optimizer={str(self.distributed_optimizer).lower()}",
            f"model.recompute={'full' if self.recompute else 'none'}",
            f"train.max_tokens_per_microbatch={self.max_tokens}",
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumptions:
    """Mean lengths, shares of a GPU's peaks, and times. No run on GPUs was measured; `--assume` changes any of them.

    Attributes:
        prompt_tokens: the question with its instructions.
        searches: per trajectory.
        response_tokens: per generation; there is one more generation than searches.
        observation_tokens: per search.
        query_tokens: distilled tokens per search.
        block_tokens: the hindsight block; with ``hindsight.content=documents``, that of one search.
        search_s: seconds that a trajectory waits for one search.
        training: share of peak FLOPS in matrix products. Megatron-LM reports 41 % to 48 % end to end on H100 for 2B to
            462B parameters; short packed sequences and a model of 3B stay at its lower end.
        memory: share of peak bandwidth while decoding.
        links: share of NVLink and network.
        decode_step_s: seconds of one decoding step beside reading memory: launches, scheduling, sampling.
        tail: length of the longest trajectory, with which the step ends, over the mean length.
    """

    prompt_tokens: float
    searches: float
    response_tokens: float
    observation_tokens: float
    query_tokens: float
    block_tokens: float
    search_s: float = 0.5
    training: float = 0.40
    memory: float = 0.60
    links: float = 0.70
    decode_step_s: float = 3e-3
    tail: float = 1.5


_SHARES_AND_RATES = ("training", "memory", "links", "decode_step_s", "tail")  # never 0


def assume(config: RunConfig, texts: Sequence[str] = ()) -> Assumptions:
    """Fill every budget of ``rollout`` and ``hindsight`` to the same share, except where ``name=value`` texts differ.

    ``fill=value`` replaces ``DEFAULT_FILL``. Searches are reduced where a trajectory would exceed
    ``rollout.max_total_tokens``.

    Raises:
        ConfigError: a name is unknown, or a value is not a number, or out of range.
    """
    field, names, given = "--assume", {each.name for each in fields(Assumptions)} | {"fill"}, dict[str, float]()
    for text in texts:
        name, _, value = text.partition("=")
        if name not in names:
            raise ConfigError(field, f"{name!r} is not known", f"use one of {', '.join(sorted(names))}")
        try:
            given[name] = float(value)
        except ValueError as error:
            raise ConfigError(field, f"{text!r} is not name=number", "write e.g. response_tokens=200") from error
        limit = 1.0 if name == "fill" else sys.float_info.max
        if not 0 <= given[name] <= limit or (given[name] == 0 and name in _SHARES_AND_RATES):
            raise ConfigError(field, f"{text!r} is out of range", "give a positive number, for fill at most 1")
    fill, rollout, max_block = given.pop("fill", DEFAULT_FILL), config.rollout, config.hindsight.max_block_tokens
    block = fill * max_block
    if config.hindsight.content == "documents":  # one observation, unless it is cut
        block = min(fill * rollout.max_observation_tokens, max_block)
    default = Assumptions(
        prompt_tokens=fill * rollout.max_prompt_tokens,
        searches=fill * rollout.max_turns,
        response_tokens=fill * rollout.max_response_tokens,
        observation_tokens=fill * rollout.max_observation_tokens,
        query_tokens=min(_QUERY_TOKENS, fill * rollout.max_response_tokens),
        block_tokens=block * config.is_distilling,
    )
    assumed = replace(default, **given)
    per_search = assumed.response_tokens + assumed.observation_tokens
    room = rollout.max_total_tokens - assumed.prompt_tokens - assumed.response_tokens
    if assumed.searches * per_search > room:
        return replace(assumed, searches=max(0.0, room / per_search))
    return assumed


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLoad:
    """Work of one step over all ranks: an RL step that distils, or an update of a warm start.

    Attributes:
        num_trajectories: trajectories of the step, or its demonstrations.
        num_minibatches: optimizer updates.
        has_reference: a reference model reads the trajectories.
        student_tokens: mean length of a trajectory.
        generated_tokens: sampled tokens of these.
        distilled_tokens: query tokens of these.
        teacher_tokens: mean tokens that the teacher reads per trajectory; 0 when nothing is distilled.
        longest_documents: most tokens that the teacher reads per trajectory with ``hindsight.content=documents``, else
            0.
    """

    num_trajectories: int
    num_minibatches: int
    has_reference: bool
    student_tokens: float
    generated_tokens: float
    distilled_tokens: float
    teacher_tokens: float = 0.0
    longest_documents: int = 0


def step_load(config: RunConfig, lengths: Assumptions) -> StepLoad:
    """Count trajectories and tokens of a step.

    The teacher reads the block and the trajectory up to its last query. With ``hindsight.content=documents`` it reads
    one sequence per search, up to that search's query (docs/adr/0007-current-step-documents.md).
    """
    rollout = config.rollout
    per_search = lengths.response_tokens + lengths.observation_tokens
    generated = (lengths.searches + 1) * lengths.response_tokens
    student = lengths.prompt_tokens + generated + lengths.searches * lengths.observation_tokens
    load = StepLoad(
        num_trajectories=config.trajectories_per_step,
        num_minibatches=config.updates_per_step,
        has_reference=config.is_rl and config.objective.kl_coef > 0,
        student_tokens=student,
        generated_tokens=generated,
        distilled_tokens=lengths.searches * lengths.query_tokens,
    )
    if not config.is_distilling or not lengths.block_tokens or not lengths.searches:
        return load
    if config.hindsight.content != "documents":
        return replace(load, teacher_tokens=student - per_search + lengths.block_tokens)
    first = lengths.prompt_tokens + lengths.block_tokens + lengths.response_tokens
    # With all budgets full, there are i responses and i - 1 observations before the end of the i-th query. A block's
    # header is as long as an observation's tags.
    most, turn = rollout.max_total_tokens, rollout.max_response_tokens + rollout.max_observation_tokens
    block = min(rollout.max_observation_tokens, config.hindsight.max_block_tokens)
    to_first_query = rollout.max_prompt_tokens + rollout.max_response_tokens
    return replace(
        load,
        teacher_tokens=lengths.searches * (first + max(0.0, lengths.searches - 1) / 2 * per_search),
        longest_documents=sum(min(to_first_query + i * turn, most) + block for i in range(rollout.max_turns)),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MicrobatchLoad:
    """The largest microbatch of a rank.

    Attributes:
        num_tokens: T of the student's row, padding included.
        policy_rows: N, tokens of the policy's loss.
        query_rows: Q, distilled ones of these.
        teacher_tokens: T of the teacher's row; 0 when nothing is distilled.
        num_microbatches: of a rank's minibatch; the teacher targets of all exist at one time.
    """

    num_tokens: int
    policy_rows: int
    query_rows: int
    teacher_tokens: int
    num_microbatches: int


def largest_microbatch(config: RunConfig, layout: Layout, step: StepLoad) -> MicrobatchLoad:
    """Fill a row to its limit with the policy's tokens, since no batch can need more logits.

    The longer of a trajectory's student and teacher sequences fills the row. The teacher's row exceeds the limit if the
    sequences of one trajectory do: they stay in one row (``packing.py``).
    """
    is_distilled = step.teacher_tokens > 0
    share = step.distilled_tokens / max(1.0, step.generated_tokens)
    if config.objective.distill_positions == "all":
        share = 1.0
    alignment = layout.tp if layout.sequence else 1
    num_tokens = layout.max_tokens // alignment * alignment
    teacher_tokens = max(num_tokens, math.ceil(step.longest_documents / alignment) * alignment)
    per_row = max(1, layout.max_tokens // max(1.0, step.student_tokens, step.teacher_tokens))
    per_rank = math.ceil(step.num_trajectories / step.num_minibatches / layout.dp)
    return MicrobatchLoad(
        num_tokens=num_tokens,
        policy_rows=num_tokens,
        query_rows=math.ceil(share * num_tokens) if is_distilled else 0,
        teacher_tokens=teacher_tokens if is_distilled else 0,
        num_microbatches=max(1, math.ceil(per_rank / per_row)),
    )
