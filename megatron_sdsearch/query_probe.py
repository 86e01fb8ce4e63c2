"""Does hindsight make better queries? Sampled from student and teacher at the same places, and searched.

A diagnostic, once per run at the first distilling step: nothing is learned from what is sampled here. For every search
of every trajectory, the student and the teacher each write one query after the student's own tokens up to where its
query began; a query hits when its results hold a gold passage that the trajectory had not been shown before. If the
teacher does not hit more often, the block carries nothing that distillation could hand on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_sdsearch.data.prompts import SEARCH_END
from megatron_sdsearch.errors import EngineError, RetrievalDownError, RetrievalError
from megatron_sdsearch.records import (
    Action,
    ContextSpan,
    HindsightBlock,
    Question,
    RolloutGroup,
    Trajectory,
    TrajectoryId,
)
from megatron_sdsearch.retrieval.base import Retriever
from megatron_sdsearch.rollout.engine import Engine, GenerationRequest, SamplingParams
from megatron_sdsearch.tokenization.spans import parse_action

if TYPE_CHECKING:  # the renderer loads a tokenizer library; probing does not need it
    from megatron_sdsearch.tokenization.renderer import Renderer


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeResult:
    """Hits at the same places; sums, so results of several ranks can be added.

    Attributes:
        num_turns: search turns probed.
        student_hits: of the student's queries.
        teacher_hits: of the teacher's queries.
        num_turns_mixed: of them in groups with right and wrong answers.
        student_hits_mixed: there.
        teacher_hits_mixed: there.
        num_failed: turns left out of all counts because an engine or a search failed.
    """

    num_turns: int = 0
    student_hits: int = 0
    teacher_hits: int = 0
    num_turns_mixed: int = 0
    student_hits_mixed: int = 0
    teacher_hits_mixed: int = 0
    num_failed: int = 0

    @property
    def student_hit(self) -> float | None:
        """Share of the student's queries that hit; ``None`` without a turn."""
        return _share(self.student_hits, self.num_turns)

    @property
    def teacher_hit(self) -> float | None:
        """Share of the teacher's queries that hit; ``None`` without a turn."""
        return _share(self.teacher_hits, self.num_turns)

    @property
    def student_hit_mixed(self) -> float | None:
        """The student's share in mixed groups; ``None`` without a turn there."""
        return _share(self.student_hits_mixed, self.num_turns_mixed)

    @property
    def teacher_hit_mixed(self) -> float | None:
        """The teacher's share in mixed groups; ``None`` without a turn there."""
        return _share(self.teacher_hits_mixed, self.num_turns_mixed)


def merge(results: Sequence[ProbeResult]) -> ProbeResult:
    """The result over all ranks: every count is a sum."""
    return ProbeResult(
        num_turns=sum(result.num_turns for result in results),
        student_hits=sum(result.student_hits for result in results),
        teacher_hits=sum(result.teacher_hits for result in results),
        num_turns_mixed=sum(result.num_turns_mixed for result in results),
        student_hits_mixed=sum(result.student_hits_mixed for result in results),
        teacher_hits_mixed=sum(result.teacher_hits_mixed for result in results),
        num_failed=sum(result.num_failed for result in results),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeParams:
    """How to probe.

    Attributes:
        seed: of the run.
        temperature: of both samples; the rollouts' own.
        top_p: of both samples; the rollouts' own.
        max_query_tokens: budget of one query, closing tag included.
        top_k: passages per query; the rollouts' own.
        rho: an answer is right when its F1 is above it.
    """

    seed: int
    temperature: float
    top_p: float = 1.0
    max_query_tokens: int = 64
    top_k: int
    rho: float = 0.0


async def probe_queries(
    groups: Sequence[RolloutGroup],
    blocks: Sequence[Sequence[HindsightBlock]],
    engine: Engine,
    retriever: Retriever,
    renderer: Renderer,
    params: ProbeParams,
) -> ProbeResult:
    """Probe every search turn of this rank's groups; what fails is counted, never raised.

    Turns of untrainable trajectories, of trajectories without teacher prompt, without query tokens, and of questions
    whose gold passages are unknown are not probed. A turn whose gold passages have all been shown before is, and
    neither role can hit. A generation without ``</search>``, or with nothing before it, is a miss. A turn with a failed
    search, or one that the engine refused (the teacher's prompt is the longer one) or aborted, counts for neither role:
    a diagnostic does not end a run.

    The random streams are those of trajectories that do not exist in training: step ``-1 - step``, and a sibling number
    that counts the group's turns, even for the student, odd for the teacher.

    Args:
        groups: of one step.
        blocks: per group, per trajectory.
        engine: holds the policy that sampled the groups.
        retriever: the rollouts' own.
        renderer: decodes queries.
        params: sampling and searching.
    """
    prober = _Prober(engine, retriever, renderer, params)
    turns = [turn for group, shown in zip(groups, blocks, strict=True) for turn in _turns(group, shown, params.rho)]
    return merge(await asyncio.gather(*map(prober.probe, turns)))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Turn:
    """One place where a query begins.

    Attributes:
        number: counts the group's turns.
        response_ids: everything after the prompt, up to the query's first token.
        opening_ids: the part of it that belongs to the span that holds the query.
        wanted: gold passages not shown yet.
    """

    trajectory_id: TrajectoryId
    number: int
    student_prompt: tuple[int, ...]
    teacher_prompt: tuple[int, ...]
    response_ids: tuple[int, ...]
    opening_ids: tuple[int, ...]
    wanted: frozenset[str]
    is_mixed: bool


def _turns(group: RolloutGroup, blocks: Sequence[HindsightBlock], rho: float) -> list[_Turn]:
    if not group.question.gold_passage_ids:
        return []
    members = [m for m in zip(group.trajectories, group.scores, blocks, strict=True) if m[0].is_trainable]
    is_mixed = len({score.f1 > rho for _, score, _ in members}) == 2
    turns: list[_Turn] = []
    for trajectory, _, block in members:
        turns += _turns_of(trajectory, block, group.question, is_mixed, first_number=len(turns))
    return turns


def _turns_of(
    trajectory: Trajectory, block: HindsightBlock, question: Question, is_mixed: bool, first_number: int
) -> list[_Turn]:
    turns: list[_Turn] = []
    before: tuple[int, ...] = ()
    shown: set[str] = set()
    prompts = iter(map(block.prompt_of_search, range(len(trajectory.queries))))
    for span in trajectory.spans[1:]:
        if isinstance(span, ContextSpan):
            shown |= set(span.passage_ids)
        elif span.action is Action.SEARCH and (teacher_prompt := next(prompts)) and span.query_positions:
            opening = span.token_ids[: min(span.query_positions)]
            turns.append(
                _Turn(
                    trajectory_id=trajectory.trajectory_id,
                    number=first_number + len(turns),
                    student_prompt=trajectory.prompt_ids,
                    teacher_prompt=teacher_prompt,
                    response_ids=before + opening,
                    opening_ids=opening,
                    wanted=frozenset(question.gold_passage_ids) - shown,
                    is_mixed=is_mixed,
                )
            )
        before += span.token_ids
    return turns


class _Prober:
    """The servers behind a probe."""

    def __init__(self, engine: Engine, retriever: Retriever, renderer: Renderer, params: ProbeParams) -> None:
        self._engine = engine
        self._retriever = retriever
        self._renderer = renderer
        self._params = params

    async def probe(self, turn: _Turn) -> ProbeResult:
        """Both roles at one turn."""
        student, teacher = await asyncio.gather(
            self._hits(turn, turn.student_prompt, is_teacher=False),
            self._hits(turn, turn.teacher_prompt, is_teacher=True),
        )
        if student is None or teacher is None:
            return ProbeResult(num_failed=1)
        return ProbeResult(
            num_turns=1,
            student_hits=student,
            teacher_hits=teacher,
            num_turns_mixed=int(turn.is_mixed),
            student_hits_mixed=student * turn.is_mixed,
            teacher_hits_mixed=teacher * turn.is_mixed,
        )

    async def _hits(self, turn: _Turn, prompt: tuple[int, ...], *, is_teacher: bool) -> int | None:
        """1 for a hit, 0 for a miss, ``None`` when a server failed."""
        sampled = await self._sample(turn, prompt, is_teacher=is_teacher)
        if sampled is None:
            return None
        query = self._query(turn, sampled)
        if not query:
            return 0
        try:
            passages = await self._retriever.search(query, top_k=self._params.top_k)
        except RetrievalDownError:
            raise
        except RetrievalError:
            return None
        return int(any(passage.passage_id in turn.wanted for passage in passages))

    async def _sample(self, turn: _Turn, prompt: tuple[int, ...], *, is_teacher: bool) -> tuple[int, ...] | None:
        trajectory_id = TrajectoryId(
            step=-1 - turn.trajectory_id.step,
            question_id=turn.trajectory_id.question_id,
            sibling=2 * turn.number + is_teacher,
        )
        request = GenerationRequest(
            trajectory_id=trajectory_id,
            seed=self._params.seed,
            prompt_ids=prompt + turn.response_ids,
            params=SamplingParams(
                temperature=self._params.temperature,
                top_p=self._params.top_p,
                max_new_tokens=self._params.max_query_tokens,
                stop=(SEARCH_END,),
            ),
        )
        try:
            generation = await self._engine.generate(request)
        except EngineError:
            return None
        finally:
            await self._engine.release(trajectory_id)
        return None if generation.finish_reason == "abort" else generation.token_ids

    def _query(self, turn: _Turn, sampled: tuple[int, ...]) -> str:
        # Read with its opening and by the rollout's own parser, so that a query means here what it means in training.
        parsed = parse_action(self._renderer.token_bytes.lookup(turn.opening_ids + sampled))
        return parsed.argument if parsed.action is Action.SEARCH else ""


def _share(hits: int, turns: int) -> float | None:
    return hits / turns if turns else None
