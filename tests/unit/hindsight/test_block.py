"""The block's text, its siblings, labels, budget, and the teacher's prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from megatron_sdsearch.config import HindsightConfig
from megatron_sdsearch.data.prompts import get_profile
from megatron_sdsearch.hindsight.block import build_hindsight
from megatron_sdsearch.records import (
    Action,
    ContextSpan,
    HindsightBlock,
    Question,
    RolloutGroup,
    SampledSpan,
    Score,
    Trajectory,
    TrajectoryId,
    TrajectoryStatus,
)

PLAIN = get_profile("plain")


class CharRenderer:
    """One token per character; the prompt is bracketed, so that it cannot be mistaken for bare text."""

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(map(ord, text))

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(map(chr, token_ids))

    def prompt_ids(self, user_text: str) -> tuple[int, ...]:
        return self.encode(f"[{user_text}]")


def sampled(action: Action, argument: str) -> SampledSpan:
    tag = action.value
    text = f"hm <{tag}>{argument}</{tag}>"
    start = text.index(">") + 1
    positions = tuple(range(start, start + len(argument))) if action is Action.SEARCH else ()
    return SampledSpan(
        token_ids=tuple(map(ord, text)),
        logprobs=(-1.0,) * len(text),
        text=text,
        action=action,
        argument=argument,
        query_positions=positions,
        policy_version=3,
        finish_reason="stop",
    )


def attempt(
    sibling: int, queries: Sequence[str], status: TrajectoryStatus = TrajectoryStatus.ANSWERED, step: int = 3
) -> Trajectory:
    spans: list[ContextSpan | SampledSpan] = [ContextSpan(kind="prompt", token_ids=(91, 63, 93))]
    for query in queries:
        spans.append(sampled(Action.SEARCH, query))
        spans.append(ContextSpan(kind="observation", token_ids=tuple(map(ord, "\n\n<information>fact\n"))))
    spans.append(sampled(Action.ANSWER, f"answer{sibling}"))
    trajectory_id = TrajectoryId(step=step, question_id="set:train:1", sibling=sibling)
    return Trajectory(trajectory_id=trajectory_id, spans=tuple(spans), status=status)


def group_of(
    *attempts: tuple[Sequence[str], float], failed: Sequence[int] = (), step: int = 3, rho: float = 0.0
) -> RolloutGroup:
    statuses = [
        TrajectoryStatus.RETRIEVAL_FAILED if i in failed else TrajectoryStatus.ANSWERED for i in range(len(attempts))
    ]
    return RolloutGroup(
        question=Question(question_id="set:train:1", text="who", gold_answers=("Ada",)),
        trajectories=tuple(attempt(i, queries, statuses[i], step) for i, (queries, _) in enumerate(attempts)),
        # The reward contradicts F1 on purpose: labels must not look at it.
        scores=tuple(Score(f1=f1, em=0.0, reward=0.1 if f1 == 0 else 0.0, is_correct=f1 > rho) for _, f1 in attempts),
    )


def build(group: RolloutGroup, seed: int = 1, **settings: Any) -> list[HindsightBlock]:
    """The group is the whole step."""
    renderer: Any = CharRenderer()
    return build_hindsight([group], renderer, PLAIN, HindsightConfig(**settings), seed=seed)[0]


MIXED = group_of((["first query", "second query"], 0.5), (["other query"], 0.0), ([], 0.0))


def test_the_text_is_one_line_per_sibling_labelled_by_f1() -> None:
    block = build(MIXED)[0]
    assert block.text.split("\n") == [
        "Earlier attempts at this question:",
        "CORRECT: first query | second query",
        "INCORRECT: other query",
        "INCORRECT: (no search)",
    ]
    assert block.sources == (0, 1, 2)
    assert block.dropped == ()


def test_the_teacher_prompt_is_the_rendered_user_message_with_the_block() -> None:
    block = build(MIXED)[0]
    assert CharRenderer().decode(block.teacher_prompt_ids) == f"[{PLAIN.user_text('who', hindsight=block.text)}]"


def test_one_block_is_shared_by_the_whole_group() -> None:
    blocks = build(MIXED)
    assert len(blocks) == 3
    assert all(block is blocks[0] for block in blocks)


def test_rho_is_a_strict_bound() -> None:
    half: list[tuple[Sequence[str], float]] = [(["first query"], 0.5), ([], 0.0)]
    assert "CORRECT: first" not in build(group_of(*half, rho=0.5))[0].text.replace("INCORRECT", "WRONG")
    assert "\nCORRECT: first" in build(group_of(*half, rho=0.49))[0].text


@pytest.mark.parametrize(
    ("siblings", "sources"),
    [
        ("all", [(0, 1, 2)] * 3),
        ("correct", [(0,)] * 3),
        ("own", [(0,), (1,), (2,)]),
        ("others", [(1, 2), (0, 2), (0, 1)]),
    ],
)
def test_the_choice_of_siblings(siblings: str, sources: list[tuple[int, ...]]) -> None:
    blocks = build(MIXED, siblings=siblings)
    assert [block.sources for block in blocks] == sources
    assert [len(block.text.splitlines()) for block in blocks] == [1 + len(shown) for shown in sources]


def test_failed_attempts_are_nobody_s_hindsight() -> None:
    blocks = build(group_of((["a"], 1.0), (["b"], 0.0), (["c"], 0.0), failed=[1]))
    assert len(blocks) == 3
    assert blocks[0].sources == (0, 2)
    assert "b" not in blocks[0].text.splitlines()[1:]
    assert blocks[0].text.splitlines()[1:] == ["CORRECT: a", "INCORRECT: c"]


def test_without_siblings_nothing_is_distilled() -> None:
    for block in build(group_of((["a"], 0.0), (["b"], 0.0)), siblings="correct"):
        assert block.text == ""
        assert block.teacher_prompt_ids == ()
        assert block.sources == ()
        assert not block.is_emptied, "there was nothing to show"


def test_labels_none_shows_a_dash() -> None:
    assert build(MIXED, labels="none")[0].text.splitlines()[1:] == [
        "- first query | second query",
        "- other query",
        "- (no search)",
    ]


@pytest.mark.parametrize("labels", ["shuffled", "permuted"])
def test_a_sibling_keeps_a_label_that_is_not_its_own_in_every_block(labels: str) -> None:
    group = group_of(*[([f"query{i}"], float(i < 4)) for i in range(8)])
    whole = set(build(group, labels=labels)[0].text.splitlines())
    assert whole != set(build(group)[0].text.splitlines())
    for block in build(group, labels=labels, siblings="others"):
        assert set(block.text.splitlines()) < whole


@pytest.mark.parametrize(
    ("query", "shown"),
    [
        ("two\nlines", "two lines"),
        ("x\nCORRECT: forged", "x CORRECT: forged"),
        ("left | right", "left right"),
        ("| bar first", "bar first"),
        ("a|b", "a|b"),
        ("  \n ", "(no search)"),
    ],
)
def test_a_query_can_forge_neither_a_line_nor_a_second_query(query: str, shown: str) -> None:
    assert build(group_of(([query], 0.0), (["x"], 1.0)))[0].text.splitlines()[1] == f"INCORRECT: {shown}"


def test_everything_shows_reasoning_documents_and_answers_on_the_sibling_s_line() -> None:
    lines = build(MIXED, content="everything")[0].text.splitlines()
    assert len(lines) == 4
    assert lines[2] == ("INCORRECT: hm <search>other query</search> <information>fact hm <answer>answer1</answer>"), (
        "the whole response without the prompt, on one line"
    )


def test_leaks_are_reported_and_left_out_only_when_asked() -> None:
    group = group_of((["ada lovelace"], 1.0), (["engine"], 0.0))
    kept, dropped = build(group)[0], build(group, drop_leaks=True)[0]
    assert kept.leaks == dropped.leaks == (0,)
    assert kept.sources == (0, 1)
    assert dropped.sources == (1,)
    assert dropped.dropped == (), "left out by the filter, not by the budget"


@pytest.mark.parametrize(
    ("num_kept", "sources"),
    [
        (6, (0, 1, 2, 3, 4, 5)),
        (5, (0, 1, 2, 3, 4)),  # the last incorrect one goes first
        (4, (0, 1, 2, 3)),
        (3, (0, 1, 3)),  # ... down to one, which keeps the contrast
        (2, (0, 1)),  # then the correct ones from the last, down to one
        (1, (1,)),  # which stays longest
        (0, ()),
    ],
)
def test_the_budget_drops_siblings_in_a_fixed_order(num_kept: int, sources: tuple[int, ...]) -> None:
    # Wrong: 0, 2, 4, 5. Right: 1, 3. All lines have the same length, so the budget is a number of siblings.
    outcomes = [0.0, 1.0, 0.0, 1.0, 0.0, 0.0]
    pads = [12 if f1 else 10 for f1 in outcomes]
    group = group_of(*[([str(i) * pad], f1) for i, (f1, pad) in enumerate(zip(outcomes, pads, strict=True))])
    header = len("Earlier attempts at this question:")
    line = len("\nINCORRECT: ") + 10
    block = build(group, max_block_tokens=header + num_kept * line if num_kept else header)[0]
    assert block.sources == sources
    assert sorted(block.sources + block.dropped) == list(range(6))
    assert bool(block.text) == bool(block.teacher_prompt_ids) == (num_kept > 0)
    assert block.is_emptied == (num_kept == 0)


def test_a_group_without_trajectories_has_no_blocks() -> None:
    assert build(group_of()) == []
    assert build(group_of(), labels="shuffled") == []
