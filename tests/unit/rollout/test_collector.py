"""Groups of trajectories: order, ids, scores, failures and the end of the event loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_sdsearch.config import RunConfig, parse_config
from megatron_sdsearch.data.questions import QuestionSampler
from megatron_sdsearch.errors import ConfigError, EngineError, RetrievalDownError, RetrievalError
from megatron_sdsearch.records import Passage, Question, RolloutGroup, TrajectoryStatus
from megatron_sdsearch.rollout.collector import RolloutCollector
from megatron_sdsearch.rollout.embedded import EmbeddedEngine
from megatron_sdsearch.rollout.engine import Engine, Generation, GenerationRequest
from megatron_sdsearch.rollout.plain import PlainEngine
from megatron_sdsearch.rollout.requests import one_group_each, plan_step
from megatron_sdsearch.tokenization.renderer import Renderer
from tests.unit.conftest import ModelFactory
from tests.unit.fakes import ABORT, DictRetriever, ScriptedEngine

SEARCH, ANSWER, WRONG = "<search>book</search>", "<answer>Lisbon</answer>", "<answer>Porto</answer>"
PASSAGE = Passage(passage_id="p1", contents='"Lisbon"\nLisbon is the capital of Portugal.')
QUESTIONS = [
    Question(question_id=f"toy:test:{i}", text=f"where is book {i}", gold_answers=("Lisbon",)) for i in range(3)
]


def _config(**rollout: Any) -> RunConfig:
    settings = {"group_size": 2, "max_turns": 2, "max_prompt_tokens": 300, "max_total_tokens": 500}
    return parse_config(
        {
            "run_dir": "run",
            "model": {"hf_dir": "model"},
            "data": {"train": "train.jsonl", "prompt_profile": "plain"},
            "retrieval": {"corpus": "corpus.jsonl"},
            "rollout": settings | {"max_response_tokens": 40, "max_observation_tokens": 60} | rollout,
        }
    )


MANY = [Question(question_id=f"toy:more:{i}", text=f"where is book {i}", gold_answers=("Lisbon",)) for i in range(20)]
Build = Callable[..., RolloutCollector]


def collect(
    collector: RolloutCollector,
    questions: Sequence[Question] = QUESTIONS,
    *,
    step: int = 0,
    policy_version: int = 0,
    group_size: int = 2,
) -> tuple[RolloutGroup, ...]:
    slots = one_group_each(questions, step=step, group_size=group_size)
    return collector.collect(slots, policy_version=policy_version).groups


def evaluate(collector: RolloutCollector) -> tuple[RolloutGroup, ...]:
    slots = one_group_each(QUESTIONS, step=0, group_size=1)
    return collector.collect(slots, policy_version=0, is_greedy=True).groups


@pytest.fixture
def build(renderer: Renderer, request: pytest.FixtureRequest) -> Build:
    def build(engine: Engine, retriever: DictRetriever | None = None, **rollout: Any) -> RolloutCollector:
        retriever = retriever or DictRetriever({"book": (PASSAGE,)})
        collector = RolloutCollector(engine, retriever, renderer, _config(**rollout))
        request.addfinalizer(collector.close)
        return collector

    return build


def test_groups_are_complete_in_question_order_and_scored(build: Build, renderer: Renderer) -> None:
    engine = ScriptedEngine(renderer, [SEARCH, ANSWER], by_sibling={1: [WRONG]}, policy_version=7)
    groups = collect(build(engine), step=7, policy_version=7)
    assert [group.question for group in groups] == QUESTIONS
    for group in groups:
        assert [str(t.trajectory_id) for t in group.trajectories] == [
            f"8/{group.question.question_id}/{s}" for s in (0, 1)
        ]
        assert [score.em for score in group.scores] == [1.0, 0.0]
        assert [t.retrieved_passage_ids for t in group.trajectories] == [("p1",), ()]
    assert len(engine.released) == 6


def test_evaluation_is_greedy_and_one_trajectory_each(build: Build, renderer: Renderer) -> None:
    engine = ScriptedEngine(renderer, [ANSWER])
    groups = evaluate(build(engine, temperature=1.3, top_p=0.5))
    assert [len(group.trajectories) for group in groups] == [1, 1, 1]
    assert {(r.params.temperature, r.params.top_p) for r in engine.requests} == {(0.0, 1.0)}


def test_training_samples_as_configured(build: Build, renderer: Renderer) -> None:
    engine = ScriptedEngine(renderer, [ANSWER])
    collect(build(engine, temperature=1.3, top_p=0.5), QUESTIONS[:1])
    assert {(r.params.temperature, r.params.top_p, r.seed) for r in engine.requests} == {(1.3, 0.5, 1)}


def test_a_question_asked_twice_makes_two_groups_of_distinct_trajectories(build: Build, renderer: Renderer) -> None:
    groups = collect(build(ScriptedEngine(renderer, [ANSWER])), [QUESTIONS[0]] * 2)
    assert [t.trajectory_id.sibling for group in groups for t in group.trajectories] == [0, 1, 2, 3]


def test_no_questions_give_no_groups(build: Build, renderer: Renderer) -> None:
    assert collect(build(ScriptedEngine(renderer, [])), []) == ()


def test_failed_searches_up_to_the_limit_are_part_of_the_groups(build: Build, renderer: Renderer) -> None:
    engine = ScriptedEngine(renderer, [ANSWER], by_sibling={1: [SEARCH]})
    retriever = DictRetriever({"book": None})
    groups = collect(build(engine, retriever, max_failed_search_share=0.5))
    assert [group.trajectories[1].status for group in groups] == [TrajectoryStatus.RETRIEVAL_FAILED] * 3


def test_lost_trajectories_are_counted_with_their_first_error(build: Build, renderer: Renderer) -> None:
    engine = ScriptedEngine(renderer, [ABORT], by_sibling={1: [SEARCH], 2: [ANSWER]})
    collector = build(engine, DictRetriever({"book": None}))
    lost = collector.collect(one_group_each(QUESTIONS, step=0, group_size=3), policy_version=0).lost
    assert (lost.num_ended, lost.num_aborted, lost.failed_searches.total()) == (9, 3, 3)
    message = r"6 of 9 trajectories \(67%\).*max_failed_search_share = 60%; first cause: no route .* 'book'"
    with pytest.raises(RetrievalError, match=message):
        lost.check(0.6)


class _Failing(DictRetriever):
    """Fails with a cause for each query, the query in its message."""

    async def search(self, query: str, *, top_k: int) -> Sequence[Passage]:
        self.num = getattr(self, "num", 0) + 1
        cause = "HTTP 500: " + "x" * 300 if self.num == 3 else "no answer within 30 s"
        raise RetrievalError(
            f"http://h: search for {query!r} failed: {cause}", query=query, num_attempts=1, cause=cause
        )


def test_the_first_failed_search_is_logged_and_the_others_are_counted(
    build: Build, renderer: Renderer, caplog: pytest.LogCaptureFixture
) -> None:
    collector = build(ScriptedEngine(renderer, [SEARCH]), _Failing(), max_failed_search_share=1.0)
    with caplog.at_level(logging.INFO):
        for step in range(2):  # each anew
            caplog.clear()
            collect(collector, MANY, step=step, group_size=2)
            first, last = (record.getMessage() for record in caplog.records)
            assert first.startswith(
                "a search failed: http://h: search for 'book' failed: no answer within 30 s; further"
            )
            assert last.startswith("40 searches failed: ")
            assert "no answer within 30 s" in last
            assert len(last) < 250
        assert last == "40 searches failed: 40 x no answer within 30 s"


def test_failed_searches_of_replaced_groups_count_as_well(build: Build, renderer: Renderer) -> None:
    """The sibling that is left has no contrast alone, so that every group gives way: no outage hides behind refills."""
    engine = ScriptedEngine(renderer, [ANSWER], by_sibling={1: [SEARCH]})
    collector = build(engine, DictRetriever({"book": None}), max_refills=1)
    slots = plan_step(QuestionSampler(MANY, 1, 3), _config(max_refills=1).rollout, step=0)
    collected = collector.collect(slots, policy_version=0)
    assert (collected.lost.failed_searches.total(), collected.lost.num_ended, collected.num_refilled) == (6, 12, 3)


class _Down(DictRetriever):
    async def search(self, query: str, *, top_k: int) -> Sequence[Passage]:
        raise RetrievalDownError("nothing was answered for 120 s")


def test_an_engine_that_is_down_ends_the_step_whatever_the_limit(build: Build, renderer: Renderer) -> None:
    engine = ScriptedEngine(renderer, [ANSWER], by_sibling={1: [SEARCH]})
    with pytest.raises(RetrievalDownError, match="120 s"):
        collect(build(engine, _Down(), max_failed_search_share=1.0))
    assert len(engine.released) == len(set(engine.released))


def test_engine_and_retriever_live_on_the_loop_that_is_given(renderer: Renderer) -> None:
    runner = asyncio.Runner()
    loop = runner.get_loop()
    collector = RolloutCollector(ScriptedEngine(renderer, []), DictRetriever(), renderer, _config(), runner)

    async def current() -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    assert collector.run(current()) is loop
    collector.close()
    assert loop.is_closed()


def test_aborted_trajectories_stay_in_their_group(build: Build, renderer: Renderer) -> None:
    groups = collect(build(ScriptedEngine(renderer, [ANSWER], by_sibling={0: [ABORT]})))
    assert [group.trajectories[0].status for group in groups] == [TrajectoryStatus.ABORTED] * 3


def test_another_policy_version_is_an_error(build: Build, renderer: Renderer) -> None:
    collector = build(ScriptedEngine(renderer, [ANSWER], policy_version=3))
    with pytest.raises(EngineError, match=r"versions \[3\] instead of 4"):
        collect(collector, step=4, policy_version=4)


class _OneFails:
    """Never answers, except that the first trajectory's call fails."""

    def __init__(self, error: Exception) -> None:
        self._error = error
        self.num_cancelled = 0

    async def generate(self, request: GenerationRequest) -> Generation:
        if request.trajectory_id.sibling == 0:
            await asyncio.sleep(0)
            raise self._error
        try:
            return await asyncio.get_running_loop().create_future()  # type: ignore[no-any-return]
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise

    async def release(self, trajectory_id: object) -> None:
        pass

    async def close(self) -> None:
        pass


def test_an_exception_cancels_the_rest_and_comes_out_as_it_is(build: Build) -> None:
    error = ZeroDivisionError("a bug")
    engine = _OneFails(error)
    collector = build(engine)
    with pytest.raises(ZeroDivisionError) as caught:
        collect(collector, QUESTIONS[:1], group_size=4)
    assert caught.value is error
    assert engine.num_cancelled == 3


def test_close_closes_engine_and_retriever_once(build: Build, renderer: Renderer) -> None:
    engine, retriever = ScriptedEngine(renderer, [ANSWER]), DictRetriever()
    collector = build(engine, retriever)
    collector.close()
    collector.close()
    assert (engine.num_closed, retriever.num_closed) == (1, 1)


def test_settings_that_cannot_work_are_refused_before_any_rollout(renderer: Renderer) -> None:
    engine, retriever = ScriptedEngine(renderer, []), DictRetriever()
    with pytest.raises(ConfigError, match="max_observation_tokens"):
        RolloutCollector(engine, retriever, renderer, _config(max_observation_tokens=3))
    warm_start = {"mode": "warm_start", "demonstrations": Path("d.jsonl")}
    config = parse_config({"run_dir": "run", "model": {"hf_dir": "model"}, "train": warm_start})
    with pytest.raises(ConfigError, match="retrieval"):
        RolloutCollector(engine, retriever, renderer, config)


def test_both_engines_roll_out_the_same_evaluation(build: Build, make_model: ModelFactory, renderer: Renderer) -> None:
    """A random policy never searches on purpose; its invalid turns still pass through prompt, notice and cache."""
    engines = [
        kind(make_model(), renderer.token_bytes, renderer.eos_ids, 500) for kind in (EmbeddedEngine, PlainEngine)
    ]
    ours, plain = (evaluate(build(engine)) for engine in engines)
    assert [[t.token_ids.tolist() for t in g.trajectories] for g in ours] == [
        [t.token_ids.tolist() for t in g.trajectories] for g in plain
    ]
    assert all(len(t.sampled_spans) > 1 for group in ours for t in group.trajectories)


@pytest.mark.parametrize(("rule", "num_turns"), [("stop", 1), ("notice", 3)])
def test_both_engines_keep_the_rule_of_eos(
    build: Build, make_model: ModelFactory, renderer: Renderer, rule: str, num_turns: int
) -> None:
    """Every id ends a sequence: each generation is one token, and no action."""
    ids = range(make_model().config.vocab_size)
    engines = [kind(make_model(), renderer.token_bytes, ids, 500) for kind in (EmbeddedEngine, PlainEngine)]
    for engine in engines:
        for group in evaluate(build(engine, eos_without_action=rule)):
            (trajectory,) = group.trajectories
            assert trajectory.status is TrajectoryStatus.NO_ANSWER
            assert [len(span.token_ids) for span in trajectory.sampled_spans] == [1] * num_turns
            assert trajectory.num_eos_without_action == num_turns


def test_the_same_step_rolls_out_the_same_ids(build: Build, make_model: ModelFactory, renderer: Renderer) -> None:
    engine = EmbeddedEngine(make_model(), renderer.token_bytes, renderer.eos_ids, 500)
    collector = build(engine)
    first = collect(collector)
    again = collect(collector, QUESTIONS[::-1])[::-1]
    other = collect(collector, step=1)
    ids = [[t.token_ids.tolist() for g in groups for t in g.trajectories] for groups in (first, again, other)]
    assert ids[0] == ids[1]
    assert all(one != another for one, another in zip(ids[0], ids[2], strict=True))


@pytest.mark.parametrize("world_size", [2, 3])
def test_refilled_groups_are_the_same_on_any_number_of_processes(
    build: Build, make_model: ModelFactory, renderer: Renderer, world_size: int
) -> None:
    slots = plan_step(QuestionSampler(MANY, 1, 4), _config(max_refills=1).rollout, step=5)

    def roll_out(rank: int, world_size: int) -> list[list[Any]]:
        collector = build(EmbeddedEngine(make_model(), renderer.token_bytes, renderer.eos_ids, 500), max_refills=1)
        collected = collector.collect(slots[rank::world_size], policy_version=0)
        assert collected.num_refilled == len(collected.groups), "a random policy is always wrong"
        return [[(str(t.trajectory_id), t.token_ids.tolist()) for t in g.trajectories] for g in collected.groups]

    alone = roll_out(0, 1)
    shares = [roll_out(rank, world_size) for rank in range(world_size)]
    assert [shares[i % world_size][i // world_size] for i in range(4)] == alone
