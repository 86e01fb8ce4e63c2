"""What each search found, shown to the teacher at that search alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from megatron_sdsearch.batching.samples import build_samples, teacher_sequences
from megatron_sdsearch.config import HindsightConfig, ObjectiveConfig, parse_config
from megatron_sdsearch.data.prompts import get_profile
from megatron_sdsearch.errors import AlignmentError, ConfigError
from megatron_sdsearch.hindsight.block import build_hindsight
from megatron_sdsearch.records import (
    Action,
    ContextSpan,
    HindsightBlock,
    Question,
    RolloutGroup,
    Score,
    Trajectory,
    TrajectoryId,
    TrajectoryStatus,
)
from tests.unit.hindsight.test_block import CharRenderer, sampled

PLAIN = get_profile("plain")
HEADER = "Documents that the next search finds:"


def found(*lines: str) -> ContextSpan:
    text = PLAIN.observation("".join(f"{line}\n" for line in lines))
    return ContextSpan(kind="observation", token_ids=tuple(map(ord, text)), passage_ids=lines)


NOTICE = ContextSpan(kind="observation", token_ids=tuple(map(ord, "no action")))
FIRST, SECOND = sampled(Action.SEARCH, "first"), sampled(Action.SEARCH, "second")
INVALID, ANSWER = sampled(Action.INVALID, "what"), sampled(Action.ANSWER, "Ada")


def group_of(*spans: Any) -> RolloutGroup:
    prompt = ContextSpan(kind="prompt", token_ids=(91, 63, 93))
    trajectory = Trajectory(
        trajectory_id=TrajectoryId(step=3, question_id="q", sibling=0),
        spans=(prompt, *spans),
        status=TrajectoryStatus.ANSWERED,
    )
    return RolloutGroup(
        question=Question(question_id="q", text="who", gold_answers=("Ada",)),
        trajectories=(trajectory,),
        scores=(Score(f1=1.0, em=1.0, reward=1.0, is_correct=True),),
    )


def block_of(group: RolloutGroup, **settings: Any) -> HindsightBlock:
    renderer: Any = CharRenderer()
    config = HindsightConfig(content="documents", **settings)
    return build_hindsight([group], renderer, PLAIN, config, seed=1)[0][0]


def prompts_of(block: HindsightBlock) -> list[str]:
    return [CharRenderer().decode(ids) for ids in block.search_prompt_ids]


TWO = group_of(FIRST, found("Doc 1 one", "Doc 2 two"), INVALID, NOTICE, SECOND, found("Doc 1 three"), ANSWER)


def test_each_search_is_shown_what_it_found_and_nothing_of_the_others() -> None:
    block = block_of(TWO)
    assert prompts_of(block) == [
        f"[{HEADER}\nDoc 1 one\nDoc 2 two\nQuestion: who?]",
        f"[{HEADER}\nDoc 1 three\nQuestion: who?]",
    ]
    assert block.text == f"{HEADER}\nDoc 1 one\nDoc 2 two\n\n{HEADER}\nDoc 1 three"
    assert (block.teacher_prompt_ids, block.sources, block.dropped) == ((), (), ())


def test_a_search_without_hits_is_shown_so() -> None:
    none = ContextSpan(kind="observation", token_ids=tuple(map(ord, PLAIN.observation(PLAIN.format_passages(())))))
    assert prompts_of(block_of(group_of(FIRST, none, ANSWER))) == [f"[{HEADER}\n{PLAIN.no_hits_body}Question: who?]"]


def test_a_search_whose_documents_never_came_has_no_prompt() -> None:
    block = block_of(group_of(FIRST, found("Doc 1 one"), SECOND))
    assert [bool(ids) for ids in block.search_prompt_ids] == [True, False]
    assert block.prompt_of_search(1) == ()
    assert not block.is_emptied, "not for want of a budget"
    assert block_of(group_of(ANSWER)).search_prompt_ids == ()


@pytest.mark.parametrize(("num_kept", "is_shown"), [(3, True), (2, True), (1, True), (0, False)])
def test_the_budget_drops_the_worst_passages_first(num_kept: int, is_shown: bool) -> None:
    lines = [f"Doc {i} text" for i in (1, 2, 3)]
    budget = len("\n".join([HEADER, *lines[:num_kept]]))
    block = block_of(group_of(FIRST, found(*lines), ANSWER), max_block_tokens=budget)
    assert block.text == ("\n".join([HEADER, *lines[:num_kept]]) if is_shown else "")
    assert bool(block.search_prompt_ids[0]) == is_shown
    assert block.is_emptied != is_shown


def teacher_texts(group: RolloutGroup, **objective: Any) -> list[tuple[str, str]]:
    """What each teacher sequence reads, and the tokens that it is the teacher of."""
    (sample,) = build_samples(group, [0.5], [block_of(group)], ObjectiveConfig(**objective))
    pairs = teacher_sequences(sample)
    labels = sample.labels[sample.distill_mask].tolist()
    ends = np.cumsum([int(teacher.distill_mask.sum()) for teacher in pairs]).tolist()
    decode = CharRenderer().decode
    parts = [decode(labels[start:end]) for start, end in zip([0, *ends], ends, strict=False)]
    return [(decode(teacher.token_ids.tolist()), part) for teacher, part in zip(pairs, parts, strict=True)]


def test_a_teacher_sequence_never_holds_documents_of_a_later_search_before_its_query() -> None:
    (first, first_labels), (second, second_labels) = teacher_texts(TWO)
    assert (first_labels, second_labels) == ("first", "second")
    assert first == f"[{HEADER}\nDoc 1 one\nDoc 2 two\nQuestion: who?]hm <search>firs"
    assert "three" not in first
    before = CharRenderer().decode(TWO.trajectories[0].response_ids.tolist()).split("second")[0]
    assert second == f"[{HEADER}\nDoc 1 three\nQuestion: who?]{before}secon"


def test_teacher_rows_speak_of_the_student_s_tokens_in_the_student_s_order() -> None:
    (sample,) = build_samples(TWO, [0.5], [block_of(TWO)], ObjectiveConfig())
    following = [
        sample.token_ids[position + 1]
        for teacher in teacher_sequences(sample)
        for position in np.flatnonzero(teacher.distill_mask)
        + sample.prompt_length
        - prompt_length(sample, teacher.token_ids)
    ]
    assert following == sample.labels[sample.distill_mask].tolist()


def prompt_length(sample: Any, ids: Any) -> int:
    return next(len(p.token_ids) for p in sample.teacher_prompts if tuple(ids[: len(p.token_ids)]) == p.token_ids)


def test_a_query_without_documents_is_not_distilled() -> None:
    assert [labels for _, labels in teacher_texts(group_of(FIRST, found("Doc 1 one"), SECOND))] == ["first"]


def test_all_positions_are_those_of_spans_that_search() -> None:
    assert [labels for _, labels in teacher_texts(TWO, distill_positions="all")] == [FIRST.text, SECOND.text]


def test_prompts_whose_ranges_overlap_or_leave_a_token_out_are_refused() -> None:
    (sample,) = build_samples(TWO, [0.5], [block_of(TWO)], ObjectiveConfig())
    first, second = sample.teacher_prompts
    for prompts in ((first,), (dataclasses.replace(first, end=second.end), second)):
        with pytest.raises(
            AlignmentError, match=r"sample 4/q/0, position \d+: not the query token of one teacher prompt"
        ):
            teacher_sequences(dataclasses.replace(sample, teacher_prompts=prompts))


@pytest.mark.parametrize("setting", [{"siblings": "own"}, {"labels": "none"}, {"drop_leaks": True}])
def test_settings_of_siblings_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"hindsight\.\w+: .*, but content=documents shows no siblings; leave it at"):
        parse_config(
            {
                "run_dir": "run",
                "model": {"hf_dir": "model"},
                "data": {"train": "train.jsonl"},
                "retrieval": {"corpus": "corpus.jsonl"},
                "hindsight": {"content": "documents", **setting},
            }
        )
