"""Compare the hits of student's and teacher's queries, sampled at the same positions and searched.

A diagnostic, once per run at the first distilling step: nothing is learned from what is sampled here. For every search
of every trajectory, the student and the teacher each write one query after the student's own tokens up to where its
query began; a query hits when its results hold a gold passage that the trajectory had not been shown before. If the
teacher does not hit more often, the block carries nothing that distillation could hand on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_sdsearch.config import RunConfig
from megatron_sdsearch.data.prompts import SEARCH_END
from megatron_sdsearch.data.scoring import group_class
from megatron_sdsearch.errors import EngineError, RetrievalDownError, RetrievalError
from megatron_sdsearch.records import Action, ContextSpan, HindsightBlock, RolloutGroup, TrajectoryId
from megatron_sdsearch.retrieval.base import Retriever
from megatron_sdsearch.rollout.engine import Engine, GenerationRequest, SamplingParams
from megatron_sdsearch.tokenization.spans import parse_action

if TYPE_CHECKING:  # the renderer loads a tokenizer library, which this module does not need
    from megatron_sdsearch.tokenization.renderer import Renderer


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnHits:
    """Whether the two queries of one search turn hit, and whether its group holds right and wrong answers."""

    student: bool
    teacher: bool
    is_mixed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryHitComparison:
    """Shares of queries that hit, at the same turns; None without a turn.

    Attributes:
        num_turns: search turns compared.
        student_hit: share of the student's queries that hit.
        teacher_hit: share of the teacher's queries that hit.
        num_turns_mixed: turns in groups with right and wrong answers.
        student_hit_mixed: the student's share there.
        teacher_hit_mixed: the teacher's share there.
        num_failed: turns left out because an engine or a search failed.
    """

    num_turns: int = 0
    student_hit: float | None = None
    teacher_hit: float | None = None
    num_turns_mixed: int = 0
    student_hit_mixed: float | None = None
    teacher_hit_mixed: float | None = None
    num_failed: int = 0


def summarize_hits(turns: Sequence[TurnHits | None]) -> QueryHitComparison:
    """Count the turns of all ranks; None is a turn that failed."""
    known = [turn for turn in turns if turn is not None]
    mixed = [turn for turn in known if turn.is_mixed]
    return QueryHitComparison(
        num_turns=len(known),
        student_hit=_mean([turn.student for turn in known]),
        teacher_hit=_mean([turn.teacher for turn in known]),
        num_turns_mixed=len(mixed),
        student_hit_mixed=_mean([turn.student for turn in mixed]),
        teacher_hit_mixed=_mean([turn.teacher for turn in mixed]),
        num_failed=len(turns) - len(known),
    )


async def compare_query_hits(
    groups: Sequence[tuple[RolloutGroup, Sequence[HindsightBlock]]],
    engine: Engine,
    retriever: Retriever,
    renderer: Renderer,
    config: RunConfig,
) -> list[TurnHits | None]:
    """Sample and search both queries of every search turn of this rank's groups.

    Turns of untrainable trajectories, of trajectories without teacher prompt, without query tokens, and of questions
    whose gold passages are unknown are left out. A turn whose gold passages have all been shown before is not, and
    neither query can hit. A generation without ``</search>``, or with nothing before it, is a miss. A turn with a
    failed search, or one that the engine refused (the teacher's prompt is the longer one) or aborted, is None: a
    diagnostic does not end a run.

    The random streams are those of trajectories that do not exist in training: step ``-1 - step``, and a sibling number
    that counts the group's turns, even for the student, odd for the teacher.

    Args:
        groups: of one step, each with the block of every trajectory.
        engine: holds the policy that sampled the groups.
        retriever: the rollouts' own.
        renderer: decodes queries.
        config: samples and searches as the rollouts do.

    Raises:
        RetrievalDownError: the search engine is down.
    """
    comparer = _Comparer(engine, retriever, renderer, config)
    turns = [turn for group, blocks in groups for turn in _search_turns(group, blocks)]
    return await asyncio.gather(*map(comparer.compare, turns))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Turn:
    """One position where a query begins.

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


def _search_turns(group: RolloutGroup, blocks: Sequence[HindsightBlock]) -> Iterator[_Turn]:
    gold = frozenset(group.question.gold_passage_ids)
    is_mixed = group_class(group) == "mixed"
    number = 0
    for trajectory, block in zip(group.trajectories, blocks, strict=True):
        if not (gold and trajectory.is_trainable):
            continue
        before: tuple[int, ...] = ()
        shown: set[str] = set()
        prompts = iter(map(block.prompt_of_search, range(len(trajectory.queries))))
        for span in trajectory.spans[1:]:
            if isinstance(span, ContextSpan):
                shown |= set(span.passage_ids)
            elif span.action is Action.SEARCH and (teacher_prompt := next(prompts)) and span.query_positions:
                opening = span.token_ids[: min(span.query_positions)]
                yield _Turn(
                    trajectory_id=trajectory.trajectory_id,
                    number=number,
                    student_prompt=trajectory.prompt_ids,
                    teacher_prompt=teacher_prompt,
                    response_ids=before + opening,
                    opening_ids=opening,
                    wanted=gold - shown,
                    is_mixed=is_mixed,
                )
                number += 1
            before += span.token_ids


class _Comparer:
    """Samples and searches the queries of a turn."""

    def __init__(self, engine: Engine, retriever: Retriever, renderer: Renderer, config: RunConfig) -> None:
        assert config.retrieval is not None  # RunConfig has checked it
        self._engine = engine
        self._retriever = retriever
        self._renderer = renderer
        self._seed = config.seed
        self._top_k = config.retrieval.top_k
        self._params = SamplingParams(
            temperature=config.rollout.temperature,
            top_p=config.rollout.top_p,
            max_new_tokens=config.rollout.max_response_tokens,
            stop=(SEARCH_END,),
        )

    async def compare(self, turn: _Turn) -> TurnHits | None:
        """Both queries of one turn; None when a server failed."""
        student, teacher = await asyncio.gather(
            self._hits(turn, turn.student_prompt, 2 * turn.number),
            self._hits(turn, turn.teacher_prompt, 2 * turn.number + 1),
        )
        if student is None or teacher is None:
            return None
        return TurnHits(student=student, teacher=teacher, is_mixed=turn.is_mixed)

    async def _hits(self, turn: _Turn, prompt: tuple[int, ...], sibling: int) -> bool | None:
        """Whether the query sampled behind ``prompt`` hits; None when a server failed."""
        question_id, step = turn.trajectory_id.question_id, -1 - turn.trajectory_id.step
        trajectory_id = TrajectoryId(step=step, question_id=question_id, sibling=sibling)
        prompt_ids = prompt + turn.response_ids
        request = GenerationRequest(
            trajectory_id=trajectory_id, seed=self._seed, prompt_ids=prompt_ids, params=self._params
        )
        try:
            generation = await self._engine.generate(request)
        except EngineError:
            return None
        finally:
            await self._engine.release(trajectory_id)
        if generation.finish_reason == "abort":
            return None
        # Read with its opening and by the rollout's own parser, so that a query means here what it means in training.
        parsed = parse_action(self._renderer.token_bytes.lookup(turn.opening_ids + generation.token_ids))
        if parsed.action is not Action.SEARCH or not parsed.argument:
            return False
        try:
            passages = await self._retriever.search(parsed.argument, top_k=self._top_k)
        except RetrievalDownError:
            raise
        except RetrievalError:
            return None
        return any(passage.passage_id in turn.wanted for passage in passages)


def _mean(hits: Sequence[bool]) -> float | None:
    return sum(hits) / len(hits) if hits else None
