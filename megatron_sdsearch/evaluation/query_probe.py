"""Compares how often the student's and the teacher's queries hit, sampled at the same positions.

A diagnostic at the first distilling step; its samples are not trained on. For every search of every trajectory, student
and teacher each sample one query after the student's own tokens up to where its query began. A query hits if its
results include a gold passage that the trajectory has not been shown before. If the teacher does not hit more often,
its hindsight block holds nothing to distil.
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
    """Hits of both queries of one search turn; ``is_mixed`` if its group has right and wrong answers."""

    student: bool
    teacher: bool
    is_mixed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryHitComparison:
    """Shares of queries that hit, at the same turns; None without a turn.

    Attributes:
        student_hit: share of the student's queries that hit.
        teacher_hit: share of the teacher's queries that hit.
        student_hit_mixed: the student's share in groups with right and wrong answers.
        teacher_hit_mixed: the teacher's share in such groups.
        num_turns: search turns compared.
        num_turns_mixed: turns in groups with right and wrong answers.
        num_failed: turns left out because an engine or a search failed.
    """

    student_hit: float | None = None
    teacher_hit: float | None = None
    student_hit_mixed: float | None = None
    teacher_hit_mixed: float | None = None
    num_turns: int = 0
    num_turns_mixed: int = 0
    num_failed: int = 0


def summarize_hits(turns: Sequence[TurnHits | None]) -> QueryHitComparison:
    """Summarize the turns of all ranks; None is a turn that failed."""
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

    Skips turns of untrainable trajectories, turns without a teacher prompt or query tokens, and questions without gold
    passages. A turn is kept if all its gold passages have been shown before, although neither query can hit then. A
    generation without ``</search>``, or without text before it, is a miss. A turn is None if a search failed, or if the
    engine aborted or refused the request (the teacher's prompt is longer): a diagnostic does not end a run.

    The random streams are those of trajectories that do not occur in training: their step is ``-1 - step``, and their
    sibling number counts the group's turns, even for the student, odd for the teacher.

    Args:
        groups: of one step, each with the block of every trajectory.
        engine: with the policy that sampled the groups.
        retriever: of the rollouts.
        renderer: decodes queries.
        config: of the run; sampling and search are those of the rollouts.

    Raises:
        RetrievalDownError: the search engine is down.
    """
    assert config.retrieval is not None  # RunConfig has checked it
    seed, top_k, rollout = config.seed, config.retrieval.top_k, config.rollout
    params = SamplingParams(
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        max_new_tokens=rollout.max_response_tokens,
        stop=(SEARCH_END,),
    )

    async def hits(turn: _Turn, prompt: tuple[int, ...], sibling: int) -> bool | None:
        trajectory_id = TrajectoryId(
            step=-1 - turn.trajectory_id.step, question_id=turn.trajectory_id.question_id, sibling=sibling
        )
        prompt_ids = prompt + turn.response_ids
        request = GenerationRequest(trajectory_id=trajectory_id, seed=seed, prompt_ids=prompt_ids, params=params)
        try:
            generation = await engine.generate(request)
        except EngineError:
            return None
        finally:
            await engine.release(trajectory_id)
        if generation.finish_reason == "abort":
            return None
        # Parsed as in rollouts, together with the opening of its span.
        parsed = parse_action(renderer.token_bytes.lookup(turn.opening_ids + generation.token_ids))
        if parsed.action is not Action.SEARCH or not parsed.argument:
            return False
        try:
            passages = await retriever.search(parsed.argument, top_k=top_k)
        except RetrievalDownError:
            raise
        except RetrievalError:
            return None
        return any(passage.passage_id in turn.wanted for passage in passages)

    async def compare(turn: _Turn) -> TurnHits | None:
        student, teacher = await asyncio.gather(
            hits(turn, turn.student_prompt, 2 * turn.number), hits(turn, turn.teacher_prompt, 2 * turn.number + 1)
        )
        if student is None or teacher is None:
            return None
        return TurnHits(student=student, teacher=teacher, is_mixed=turn.is_mixed)

    turns = [turn for group, blocks in groups for turn in _search_turns(group, blocks)]
    return await asyncio.gather(*map(compare, turns))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Turn:
    """A position where a query begins.

    Attributes:
        number: index among the group's turns.
        response_ids: ids after the prompt, up to the query's first token.
        opening_ids: the last of them, from the start of the span with the query.
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


def _mean(hits: Sequence[bool]) -> float | None:
    return sum(hits) / len(hits) if hits else None
