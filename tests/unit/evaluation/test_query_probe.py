"""The query probe: what is sampled where, and what counts as a hit."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_sdsearch.config import parse_config
from megatron_sdsearch.errors import EngineError, RetrievalError
from megatron_sdsearch.evaluation.query_probe import (
    QueryHitComparison,
    TurnHits,
    compare_query_hits,
    summarize_hits,
)
from megatron_sdsearch.records import (
    Action,
    ContextSpan,
    HindsightBlock,
    Passage,
    Question,
    RolloutGroup,
    SampledSpan,
    Score,
    Trajectory,
    TrajectoryId,
    TrajectoryStatus,
)
from megatron_sdsearch.rollout.engine import Generation, GenerationRequest

TEACHER = tuple(b"TEACHER")
STUDENT = tuple(b"STUDENT")


class ByteTable:
    """One token per byte."""

    def lookup(self, ids: Sequence[int]) -> list[bytes]:
        return [bytes([token_id]) for token_id in ids]


CONFIG = parse_config(
    {
        "run_dir": "run",
        "model": {"hf_dir": "model"},
        "data": {"train": "train.jsonl"},
        "seed": 3,
        "rollout": {"temperature": 0.7, "max_response_tokens": 16},
        "retrieval": {"corpus": "corpus.jsonl", "top_k": 2},
    }
)
RENDERER: Any = SimpleNamespace(token_bytes=ByteTable())


class PromptedEngine:
    """Answers by role: a request whose prompt starts as the teacher's gets the teacher's text."""

    def __init__(self, student: str | Exception, teacher: str | Exception, finish_reason: Any = "stop") -> None:
        self._texts = {STUDENT: student, TEACHER: teacher}
        self._finish_reason = finish_reason
        self.requests: list[GenerationRequest] = []
        self.released: list[TrajectoryId] = []

    async def generate(self, request: GenerationRequest) -> Generation:
        self.requests.append(request)
        await asyncio.sleep(0)
        text = self._texts[request.prompt_ids[: len(TEACHER)]]
        if isinstance(text, Exception):
            raise text
        ids = tuple(text.encode())
        return Generation(
            token_ids=ids, logprobs=(-1.0,) * len(ids), finish_reason=self._finish_reason, policy_version=0
        )

    async def release(self, trajectory_id: TrajectoryId) -> None:
        self.released.append(trajectory_id)

    async def close(self) -> None:
        raise AssertionError("the probe does not own the engine")


class Library:
    """Passage ids by query; an exception is raised, an unknown query finds nothing."""

    fingerprint = "library"

    def __init__(self, **found: Sequence[str] | Exception) -> None:
        self._found: Mapping[str, Sequence[str] | Exception] = found
        self.searches: list[tuple[str, int]] = []

    async def search(self, query: str, *, top_k: int) -> Sequence[Passage]:
        self.searches.append((query, top_k))
        found = self._found.get(query, ())
        if isinstance(found, Exception):
            raise found
        return [Passage(passage_id=passage_id, contents="") for passage_id in found]

    async def close(self) -> None:
        raise AssertionError("the probe does not own the retriever")


def sampled(text: str, query: str = "") -> SampledSpan:
    start = text.index(query) if query else 0
    return SampledSpan(
        token_ids=tuple(text.encode()),
        logprobs=(-1.0,) * len(text),
        text=text,
        action=Action.SEARCH if query else Action.ANSWER,
        argument=query,
        query_positions=tuple(range(start, start + len(query))),
        policy_version=7,
        finish_reason="stop",
    )


def trajectory(sibling: int = 0, status: TrajectoryStatus = TrajectoryStatus.ANSWERED, searches: int = 2) -> Trajectory:
    spans: list[ContextSpan | SampledSpan] = [ContextSpan(kind="prompt", token_ids=STUDENT)]
    for turn in range(1, searches + 1):
        spans.append(sampled(f"hm{turn} <search>query{turn}</search>", f"query{turn}"))
        spans.append(ContextSpan(kind="observation", token_ids=tuple(b"{docs}"), passage_ids=(f"gold{turn}",)))
    spans.append(sampled("<answer>x</answer>"))
    trajectory_id = TrajectoryId(step=7, question_id="q", sibling=sibling)
    return Trajectory(trajectory_id=trajectory_id, spans=tuple(spans), status=status)


def group_of(
    *trajectories: Trajectory, f1: Sequence[float] = (), gold: Sequence[str] = ("gold1", "gold2")
) -> RolloutGroup:
    scores = f1 or (0.0,) * len(trajectories)
    return RolloutGroup(
        question=Question(question_id="q", text="q?", gold_answers=("x",), gold_passage_ids=tuple(gold)),
        trajectories=trajectories,
        scores=tuple(Score(f1=score, em=0.0, reward=0.1, is_correct=score > 0) for score in scores),
    )


def block(prompt: tuple[int, ...] = TEACHER) -> HindsightBlock:
    return HindsightBlock(text="x", teacher_prompt_ids=prompt, sources=(0,), dropped=(), leaks=())


def run(
    group: RolloutGroup, engine: PromptedEngine, library: Library, shown: HindsightBlock | None = None
) -> QueryHitComparison:
    groups = [(group, [shown or block()] * len(group.trajectories))]
    return summarize_hits(asyncio.run(compare_query_hits(groups, engine, library, RENDERER, CONFIG)))


def test_both_roles_write_a_query_after_the_student_s_own_tokens() -> None:
    engine = PromptedEngine(" ask me </search>", "other</search>")
    library = Library()
    run(group_of(trajectory()), engine, library)
    first = b"hm1 <search>"
    second = b"hm1 <search>query1</search>{docs}hm2 <search>"
    assert {request.prompt_ids for request in engine.requests} == {
        role + tuple(prefix) for role in (STUDENT, TEACHER) for prefix in (first, second)
    }
    assert sorted(library.searches) == [("ask me", 2)] * 2 + [("other", 2)] * 2
    for request in engine.requests:
        assert request.seed == 3
        assert request.params.temperature == 0.7
        assert request.params.stop == ("</search>",)
        assert request.params.max_new_tokens == 16


def test_streams_are_no_trajectory_s_and_all_different_and_released() -> None:
    engine = PromptedEngine("a</search>", "b</search>")
    run(group_of(trajectory(0), trajectory(1)), engine, Library())
    used = [request.trajectory_id for request in engine.requests]
    assert len(set(used)) == len(used) == 8
    assert all(trajectory_id.step == -8 and trajectory_id.question_id == "q" for trajectory_id in used)
    for request in engine.requests:
        is_teacher = request.prompt_ids[: len(TEACHER)] == TEACHER
        assert request.trajectory_id.sibling % 2 == is_teacher
    assert sorted(map(str, engine.released)) == sorted(map(str, used))


def test_a_hit_is_a_gold_passage_that_was_not_shown_before() -> None:
    # Turn 1 has seen nothing; turn 2 has been shown gold1, so that finding gold1 again is a miss there.
    engine = PromptedEngine("first</search>", "second</search>")
    result = run(group_of(trajectory()), engine, Library(first=["other", "gold1"], second=["gold2"]))
    assert result.num_turns == 2
    assert (result.student_hit, result.teacher_hit) == (0.5, 1.0)
    assert result.num_failed == 0


@pytest.mark.parametrize("text", ["good", "  </search>", "good </answer>"])
def test_a_generation_without_a_whole_query_is_a_miss(text: str) -> None:
    library = Library(good=["gold1"])
    result = run(group_of(trajectory(searches=1)), PromptedEngine(text, "good</search>"), library)
    assert (result.num_turns, result.student_hit, result.teacher_hit) == (1, 0.0, 1.0)
    assert library.searches == [("good", 2)]


def test_mixed_groups_are_counted_apart_by_f1() -> None:
    engine = PromptedEngine("bad</search>", "good</search>")
    library = Library(good=["gold1", "gold2"])
    mixed = run(group_of(trajectory(0), trajectory(1), f1=[0.0, 1.0]), engine, library)
    assert (mixed.num_turns, mixed.num_turns_mixed) == (4, 4)
    assert (mixed.student_hit_mixed, mixed.teacher_hit_mixed) == (0.0, 1.0)
    uniform = run(group_of(trajectory(0), trajectory(1), f1=[0.5, 1.0]), engine, library)
    assert (uniform.num_turns, uniform.teacher_hit, uniform.num_turns_mixed) == (4, 1.0, 0)
    assert uniform.teacher_hit_mixed is None


@pytest.mark.parametrize(
    "make_group",
    [
        lambda: group_of(trajectory(status=TrajectoryStatus.RETRIEVAL_FAILED)),
        lambda: group_of(trajectory(), gold=()),
        lambda: group_of(trajectory(searches=0)),
    ],
)
def test_what_cannot_be_probed_is_left_alone(make_group: Callable[[], RolloutGroup]) -> None:
    engine = PromptedEngine("a</search>", "b</search>")
    assert run(make_group(), engine, Library()) == QueryHitComparison()
    assert engine.requests == []


def test_without_a_teacher_prompt_there_is_nothing_to_compare() -> None:
    engine = PromptedEngine("a</search>", "b</search>")
    assert run(group_of(trajectory()), engine, Library(), shown=block(())) == QueryHitComparison()


def test_a_failed_search_counts_for_neither_role() -> None:
    engine = PromptedEngine("bad</search>", "good</search>")
    result = run(group_of(trajectory()), engine, Library(bad=RetrievalError("down"), good=["gold1", "gold2"]))
    assert result == QueryHitComparison(num_failed=2)


def test_an_engine_that_refuses_or_aborts_counts_for_neither_role() -> None:
    library = Library(good=["gold1", "gold2"])
    refusing = PromptedEngine("good</search>", EngineError("too long"))
    assert run(group_of(trajectory()), refusing, library) == QueryHitComparison(num_failed=2)
    assert len(refusing.released) == 4
    aborting = PromptedEngine("good</search>", "good</search>", finish_reason="abort")
    assert run(group_of(trajectory()), aborting, library) == QueryHitComparison(num_failed=2)


def test_turns_of_ranks_are_counted_together() -> None:
    hit, miss = (TurnHits(student=False, teacher=t, is_mixed=t) for t in (True, False))
    assert summarize_hits([hit, miss, None, miss, miss]) == QueryHitComparison(
        num_turns=4,
        student_hit=0.0,
        teacher_hit=0.25,
        num_turns_mixed=1,
        student_hit_mixed=0.0,
        teacher_hit_mixed=1.0,
        num_failed=1,
    )
    assert summarize_hits([]) == QueryHitComparison()
