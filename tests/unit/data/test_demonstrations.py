"""Demonstration files, and the order in which demonstrations are learned from."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sdsearch.data.demonstrations import (
    Demonstration,
    DemonstrationSampler,
    check_profile,
    read_demonstrations,
)
from megatron_sdsearch.data.prompts import get_profile
from megatron_sdsearch.errors import ConfigError, DataError

ROW: dict[str, Any] = {
    "demonstration_id": "d0",
    "prompt": "Question: é?",
    "spans": [
        {"kind": "sampled", "text": "<search> é </search>"},
        {"kind": "observation", "text": "\nfound\n"},
        {"kind": "sampled", "text": "<answer> ok </answer>"},
    ],
}


def write(path: Path, lines: list[str]) -> Path:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def demonstrations(count: int) -> tuple[Demonstration, ...]:
    return tuple(Demonstration.model_validate(ROW | {"demonstration_id": str(index)}) for index in range(count))


def test_rows_come_in_file_order_with_their_spans_untouched(tmp_path: Path) -> None:
    rows = [ROW, ROW | {"demonstration_id": "d1"}]
    read = read_demonstrations(write(tmp_path / "d.jsonl", [json.dumps(row, ensure_ascii=False) for row in rows]))
    assert [row.model_dump() for row in read] == [row | {"spans": tuple(ROW["spans"])} for row in rows]


@pytest.mark.parametrize(
    ("line", "field"),
    [
        ("{", "the row"),
        ("[]", "the row"),
        ("", "the row"),
        (json.dumps({name: value for name, value in ROW.items() if name != "prompt"}), "prompt"),
        (json.dumps(ROW | {"prompt": ""}), "prompt"),
        (json.dumps(ROW | {"spans": []}), "spans"),
        (json.dumps(ROW | {"spans": [ROW["spans"][0], {"kind": "thought", "text": "x"}]}), "spans.1.kind"),
        (json.dumps(ROW | {"spans": [{"kind": "sampled", "text": ""}]}), "spans.0.text"),
        (json.dumps(ROW | {"extra": 1}), "extra"),
        (json.dumps(ROW | {"spans": [ROW["spans"][1]]}), "spans"),
        (json.dumps(ROW | {"spans": [{"kind": "sampled", "text": " \n"}, ROW["spans"][1]]}), "spans"),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_field(tmp_path: Path, line: str, field: str) -> None:
    path = write(tmp_path / "d.jsonl", [json.dumps(ROW), line])
    with pytest.raises(DataError) as caught:
        read_demonstrations(path)
    assert str(caught.value).startswith(f"{path}:2: {field}: ")
    assert str(caught.value).endswith("fix or remove the row")


def test_a_row_without_sampled_text_says_so(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", [json.dumps(ROW | {"spans": [ROW["spans"][1]]})])
    with pytest.raises(
        DataError, match=r"d\.jsonl:1: spans: No span is sampled text, so there is nothing to learn; fix"
    ):
        read_demonstrations(path)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (gzip.compress(json.dumps(ROW).encode()), "is compressed with gzip, .*; unpack it: gunzip"),
        (json.dumps([ROW]).encode(), "is a JSON array, .*; write one object per line"),
        (json.dumps(ROW).encode("utf-16"), "is text in UTF-16, .*; convert it: iconv -f UTF-16 -t UTF-8"),
    ],
    ids=["gzip", "array", "utf-16"],
)
def test_a_file_of_another_kind_is_called_what_it_is(tmp_path: Path, content: bytes, complaint: str) -> None:
    (tmp_path / "d.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=rf"d\.jsonl: {complaint}"):
        read_demonstrations(tmp_path / "d.jsonl")


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(ROW), encoding="utf-8-sig")
    assert [row.demonstration_id for row in read_demonstrations(path)] == ["d0"]


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", [])
    with pytest.raises(DataError, match=r"d\.jsonl holds no demonstrations; write at least one row"):
        read_demonstrations(path)


@given(count=st.integers(1, 12), per_step=st.integers(1, 30), seed=st.integers(0, 5))
def test_each_epoch_shows_every_demonstration_once(count: int, per_step: int, seed: int) -> None:
    sampler = DemonstrationSampler(demonstrations(count), seed, per_step)
    num_steps = -(-3 * count // per_step)
    shown = [row.demonstration_id for step in range(num_steps) for row in sampler.batch(step)]
    assert len(shown) == num_steps * per_step
    for start in range(0, len(shown) - count + 1, count):
        assert Counter(shown[start : start + count]) == Counter(str(index) for index in range(count))


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    rows = demonstrations(50)
    straight = DemonstrationSampler(rows, 3, 8)
    batches = [straight.batch(step) for step in range(10)]
    for step in (9, 0, 5, 5):
        assert DemonstrationSampler(rows, 3, 8).batch(step) == batches[step], "no state is carried from step to step"
    assert DemonstrationSampler(rows, 4, 8).batch(0) != batches[0]
    assert batches[0] != rows[:8], "the file's order is not the order of learning"


def test_epochs_differ_in_order() -> None:
    sampler = DemonstrationSampler(demonstrations(50), 1, 50)
    assert sampler.batch(0) != sampler.batch(1)


def test_a_row_is_not_cut_at_unicode_line_separators(tmp_path: Path) -> None:
    path = tmp_path / "demonstrations.jsonl"
    row = '{"demonstration_id": "a", "prompt": "one\u2028two", "spans": [{"kind": "sampled", "text": "b"}]}'
    path.write_text(row + "\n", encoding="utf-8")
    assert [demonstration.prompt for demonstration in read_demonstrations(path)] == ["one\u2028two"]


def test_a_file_that_is_not_there_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_demonstrations(tmp_path / "nowhere.jsonl")


def test_search_results_are_demonstrated_between_the_profiles_tags() -> None:
    """Otherwise the policy would silently learn tags that no rollout shows."""
    observation = {"kind": "observation", "text": "\n\n<information>Doc 1(Title: a) b\n</information>\n\n"}
    notice = {"kind": "observation", "text": "\nThat was no valid action.\n"}
    sampled = {"kind": "sampled", "text": "<search> a </search>"}
    rows = [
        Demonstration.model_validate({"demonstration_id": "d", "prompt": "p", "spans": spans})
        for spans in ([sampled, notice, sampled], [sampled, observation, sampled])
    ]
    check_profile(rows, get_profile("plain"))
    check_profile(rows, get_profile("search_r1"))
    check_profile([], get_profile("autorefine"))
    with pytest.raises(ConfigError, match=r"^data\.prompt_profile: autorefine shows search results in <documents>"):
        check_profile(rows, get_profile("autorefine"))


def test_demonstrations_that_never_act_are_refused() -> None:
    spans = [{"kind": "sampled", "text": "<query> a </query>"}]
    rows = [Demonstration.model_validate({"demonstration_id": "d", "prompt": "p", "spans": spans})]
    with pytest.raises(
        ConfigError, match=r"^train\.demonstrations: none contains </search> or </answer>, for example '<query>"
    ):
        check_profile(rows, get_profile("plain"))
