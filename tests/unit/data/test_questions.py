"""Question files in three schemas, and the order in which questions are asked."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sdsearch.data.questions import QuestionSampler, read_questions
from megatron_sdsearch.data.scoring import exact_match
from megatron_sdsearch.errors import ConfigError, DataError
from megatron_sdsearch.records import Question

OWN = {
    "question_id": "tiny:train:0",
    "text": " Who built it? ",
    "gold_answers": ["The king", "King"],
    "dataset": "tiny",
    "gold_passage_ids": ["p1", 2],
}
SEARCH_R1 = {
    "data_source": "nq",
    "prompt": [{"role": "user", "content": "Search, then answer. Question: who built it?\n"}],
    "ability": "fact-reasoning",
    "reward_model": {"style": "rule", "ground_truth": {"target": ["the king"]}},
    "extra_info": {"split": "train", "index": 7},
}
FLASHRAG = {"id": "test_3", "question": "who built it", "golden_answers": ["king"], "metadata": {"level": "easy"}}


def write(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("\n\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_own_schema(tmp_path: Path, suffix: str) -> None:
    row = OWN | {"gold_passage_ids": ["p1", "2"]} if suffix == ".parquet" else OWN
    bare = {"question_id": "b", "text": "Why?", "gold_answers": ["x"]}
    assert read_questions(write(tmp_path / f"q{suffix}", [row, bare])) == (
        Question(
            question_id="tiny:train:0",
            text="Who built it?",
            gold_answers=("The king", "King"),
            dataset="tiny",
            gold_passage_ids=("p1", "2"),
        ),
        Question(question_id="b", text="Why?", gold_answers=("x",)),
    )


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_search_r1_schema(tmp_path: Path, suffix: str) -> None:
    (question,) = read_questions(write(tmp_path / f"q{suffix}", [SEARCH_R1]))
    assert question == Question(
        question_id="nq:train:7", text="who built it?", gold_answers=("the king",), dataset="nq"
    )


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_flashrag_schema_takes_dataset_and_split_from_the_path(tmp_path: Path, suffix: str) -> None:
    (question,) = read_questions(write(tmp_path / "hotpotqa" / f"dev{suffix}", [FLASHRAG]))
    assert question == Question(
        question_id="hotpotqa:dev:test_3", text="who built it", gold_answers=("king",), dataset="hotpotqa"
    )


@pytest.mark.parametrize(
    ("row_id", "index"), [("dev_7", "7"), ("dev_x7", "dev_x7"), ("7", "7"), ("train_7", "train_7")]
)
def test_flashrag_ids_are_search_r1s_where_they_number_the_splits_rows(tmp_path: Path, row_id: str, index: str) -> None:
    path = write(tmp_path / "nq" / "dev.jsonl", [FLASHRAG | {"id": row_id}])
    assert [question.question_id for question in read_questions(path)] == [f"nq:dev:{index}"]


def test_flashrag_file_behind_a_link_keeps_its_data_set(tmp_path: Path) -> None:
    blob = write(tmp_path / "blobs" / "0a1b.jsonl", [FLASHRAG])
    (tmp_path / "nq").mkdir()
    (tmp_path / "nq" / "dev.jsonl").symlink_to(blob)
    assert read_questions(tmp_path / "nq" / "dev.jsonl")[0].question_id == "nq:dev:test_3"


def test_equal_indices_of_two_data_sets_stay_apart(tmp_path: Path) -> None:
    rows = [
        SEARCH_R1,
        SEARCH_R1 | {"data_source": "hotpotqa"},
        SEARCH_R1 | {"extra_info": {"split": "dev", "index": 7}},
    ]
    ids = [question.question_id for question in read_questions(write(tmp_path / "q.jsonl", rows))]
    assert ids == ["nq:train:7", "hotpotqa:train:7", "nq:dev:7"]


@pytest.mark.parametrize("row", [OWN, SEARCH_R1, FLASHRAG], ids=["own", "search_r1", "flashrag"])
def test_duplicate_id_is_a_data_error(tmp_path: Path, row: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"q\.jsonl:3: id '.*' is a duplicate; give each question"):
        read_questions(write(tmp_path / "q.jsonl", [row, row]))


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        (OWN | {"text": "  "}, "text: String should have at least 1 character"),
        (OWN | {"gold_answers": []}, "gold_answers: "),
        (OWN | {"gold_answers": ["x", ""]}, "gold_answers.1: String should have at least 1 character"),
        (OWN | {"question_id": 1.5}, "question_id: Input should be a valid string"),
        ({}, "question_id: Field required"),
        (["x"], "is not an object"),
        (SEARCH_R1 | {"prompt": []}, "prompt: "),
        (SEARCH_R1 | {"prompt": [{"role": "user", "content": "Question: "}]}, "prompt: nothing follows"),
        (SEARCH_R1 | {"extra_info": {"split": "dev"}}, "extra_info.index: Field required"),
        (SEARCH_R1 | {"reward_model": {"ground_truth": {}}}, "reward_model.ground_truth.target: Field required"),
        (FLASHRAG | {"golden_answers": [3]}, "golden_answers.0: Input should be a valid string"),
        (FLASHRAG | {"golden_answers": 3.5}, "golden_answers: Should be a text or a list of texts, got 3.5"),
        (FLASHRAG | {"golden_answers": {"x": 1}}, "golden_answers: Should be a text or a list of texts, got {'x': 1}"),
        (FLASHRAG | {"golden_answers": [True]}, "golden_answers.0: Input should be a valid string"),
        (FLASHRAG | {"golden_answers": ["x", None]}, "golden_answers.1: Input should be a valid string"),
        (FLASHRAG | {"golden_answers": [["x"], ["y"]]}, "golden_answers: One of several gold answers is itself a list"),
        (FLASHRAG | {"golden_answers": "['x', '']"}, "golden_answers.1: String should have at least 1 character"),
        (
            SEARCH_R1 | {"reward_model": {"ground_truth": "{'target': ['x']}"}},
            "reward_model.ground_truth.target: Text of an object",
        ),
    ],
)
def test_bad_row_names_file_line_field_and_fix(tmp_path: Path, row: Any, complaint: str) -> None:
    path = write(tmp_path / "q.jsonl", [OWN | {"question_id": "fine"}, row])
    with pytest.raises(DataError) as caught:
        read_questions(path)
    assert str(caught.value).startswith(f"{path}:3: {complaint}")
    assert "; write " in str(caught.value)


IN_ROWS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "own": lambda answers: OWN | {"gold_answers": answers, "gold_passage_ids": ["p1"]},
    "flashrag": lambda answers: FLASHRAG | {"golden_answers": answers},
    "search_r1": lambda answers: SEARCH_R1 | {"reward_model": {"ground_truth": {"target": answers}}},
    "verl": lambda answers: SEARCH_R1 | {"reward_model": {"ground_truth": answers}},
}


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("answers", ["['Al', 'Bo']", ["['Al', 'Bo']"], ["Al", "Bo"], [["Al", "Bo"]], [["['Al' 'Bo']"]]])
@pytest.mark.parametrize("kind", list(IN_ROWS))
def test_the_text_of_a_list_is_the_list_in_every_schema(tmp_path: Path, kind: str, answers: Any, suffix: str) -> None:
    (question,) = read_questions(write(tmp_path / f"q{suffix}", [IN_ROWS[kind](answers)]))
    assert question.gold_answers == ("Al", "Bo")
    assert exact_match("the Bo", question.gold_answers) == 1.0


@pytest.mark.parametrize("kind", list(IN_ROWS))
def test_one_text_is_one_answer_in_every_schema(tmp_path: Path, kind: str) -> None:
    (question,) = read_questions(write(tmp_path / "q.jsonl", [IN_ROWS[kind]("[REC]")]))
    assert question.gold_answers == ("[REC]",)


def prompt(*contents: str) -> dict[str, Any]:
    """A system message, the user's, and what follows it."""
    roles = ("system", "user", "assistant")
    return {"prompt": [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]}


ASKED_ELSEWHERE = SEARCH_R1 | {"extra_info": {"split": "train", "index": 7, "question": "who built it?"}}


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("row", "text"),
    [
        (SEARCH_R1 | prompt("Help.", "Search. Question: who built it?", "<think>"), "who built it?"),
        (ASKED_ELSEWHERE | prompt("Help.", "Question: who built it?", "<think>"), "who built it?"),
        (SEARCH_R1 | prompt("Be.", "Who made Question: Time?") | {"question": "Who made Question: Time?"}, None),
        (ASKED_ELSEWHERE | prompt("Be brief.", "Answer this: Who built  it\nUse <search>."), "who built it?"),
        (ASKED_ELSEWHERE | {"question": "who built it"}, "who built it"),
        (SEARCH_R1 | prompt("Be.", "\u8bf7\u56de\u7b54\u8c01\u5efa\u7684") | {"question": "\u8c01\u5efa\u7684"}, None),
    ],
)
def test_search_r1s_question_is_its_field_or_what_its_user_asks(
    tmp_path: Path, row: dict[str, Any], text: str | None, suffix: str
) -> None:
    (question,) = read_questions(write(tmp_path / f"q{suffix}", [row]))
    assert question.text == (text or row["question"])


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        (
            ASKED_ELSEWHERE | {"question": "who sold it?"},
            "extra_info.question: is 'who built it?', but question is 'who s",
        ),
        (SEARCH_R1 | {"question": "who sold it?"}, "question: 'who sold it?' does not occur in the prompt 'Search, th"),
        (SEARCH_R1 | {"question": "o bui"}, "question: 'o bui' does not occur in the prompt"),
        (SEARCH_R1 | {"question": "??"}, "question: '??' does not occur in the prompt"),
        (ASKED_ELSEWHERE | {"prompt": [{"role": "system", "content": "who built it?"}]}, "prompt: has no user message"),
        (
            SEARCH_R1 | prompt("Be.", "Answer with <answer>. who built it?"),
            "prompt: has 'Question:' 0 times instead of once, so the start",
        ),
        (SEARCH_R1 | prompt("Be.", "Question: Who made Question: Time?"), "prompt: has 'Question:' 2 times"),
        (SEARCH_R1 | prompt("Be.", "Question: who?\nUse <search>."), "prompt: several lines follow 'Question:'"),
        (
            SEARCH_R1 | {"golden_answers": ["queen"]},
            "golden_answers: is ('queen',), but reward_model.ground_truth.target is ('the king',)",
        ),
    ],
)
def test_a_search_r1_row_that_contradicts_itself_or_hides_its_question_is_refused(
    tmp_path: Path, row: dict[str, Any], complaint: str
) -> None:
    path = write(tmp_path / "q.jsonl", [row])
    with pytest.raises(DataError) as caught:
        read_questions(path)
    assert str(caught.value).startswith(f"{path}:1: {complaint}")
    assert "; " in str(caught.value)


@pytest.mark.parametrize("name", ["q.jsonl", "q.parquet"])
@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "is a git LFS pointer, .*; fetch the file with",
        ),
        (b"<!DOCTYPE html>\n<html>", "is an HTML or XML page, .*; fetch the file itself"),
        (json.dumps(OWN).encode("utf-16"), "is text in UTF-16, .*; convert it: iconv"),
        (b"id,question,answer\n1,who?,me\n", "is comma-separated text .*; write each row as a JSON object"),
    ],
    ids=["pointer", "html", "utf-16", "csv"],
)
def test_a_file_of_another_kind_is_called_what_it_is(tmp_path: Path, name: str, content: bytes, complaint: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}: {complaint}"):
        read_questions(tmp_path / name)


def test_bad_parquet_row_names_its_number(tmp_path: Path) -> None:
    path = write(tmp_path / "q.parquet", [OWN | {"gold_passage_ids": []}, {"question_id": "x", "gold_answers": ["y"]}])
    with pytest.raises(DataError, match=r"q\.parquet: row 2: text: Field required"):
        read_questions(path)


def test_missing_parquet_column_is_reported_before_any_row(tmp_path: Path) -> None:
    path = write(tmp_path / "q.parquet", [{"id": "a", "question": "Why?", "answers": ["x"]}])
    with pytest.raises(
        DataError, match=r"q\.parquet: has no column 'question_id', its columns are id, question, answers; w"
    ):
        read_questions(path)


@pytest.mark.parametrize("line", [b"{", b'{"text": "\xff"}'])
def test_line_that_is_not_json_is_a_data_error(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "q.jsonl"
    path.write_bytes(b"\n" + line)
    with pytest.raises(DataError, match=r"q\.jsonl:2: is not JSON .*; write one JSON object per line"):
        read_questions(path)


def test_files_that_hold_no_questions_are_data_errors(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "broken.parquet").write_bytes(b"PAR?")
    (tmp_path / "q.csv").touch()
    for name, complaint in {
        "empty.jsonl": "holds no questions; write",
        "broken.parquet": "not readable as parquet",
        "q.csv": r"'\.csv' is unknown; give a \.jsonl or \.parquet",
        "absent.jsonl": "does not exist; give",
    }.items():
        with pytest.raises(DataError, match=complaint):
            read_questions(tmp_path / name)


def pool(size: int) -> tuple[Question, ...]:
    return tuple(Question(question_id=f"q{i}", text="?", gold_answers=("x",)) for i in range(size))


SIZES = st.integers(1, 12).flatmap(lambda size: st.tuples(st.just(size), st.integers(1, size)))


@given(SIZES, st.integers(0, 5), st.integers(1, 40))
def test_every_epoch_asks_every_question_once(sizes: tuple[int, int], seed: int, num_steps: int) -> None:
    size, per_step = sizes
    sampler = QuestionSampler(pool(size), seed, per_step)
    batches = [sampler.batch(step) for step in range(num_steps)]
    assert all(len({question.question_id for question in batch}) == per_step for batch in batches)
    asked = [question.question_id for batch in batches for question in batch]
    for start in range(0, len(asked), size):
        assert max(Counter(asked[start : start + size]).values()) == 1


@given(SIZES, st.integers(0, 5), st.integers(0, 40))
def test_batch_depends_on_seed_and_step_alone(sizes: tuple[int, int], seed: int, step: int) -> None:
    size, per_step = sizes
    warm = QuestionSampler(pool(size), seed, per_step)
    for earlier in (0, step + 3, step):
        warm.batch(earlier)
    assert warm.batch(step) == QuestionSampler(pool(size), seed, per_step).batch(step)


def test_order_does_not_depend_on_the_files_order() -> None:
    forwards, backwards = QuestionSampler(pool(9), 1, 4), QuestionSampler(pool(9)[::-1], 1, 4)
    assert [forwards.batch(step) for step in range(9)] == [backwards.batch(step) for step in range(9)]


def test_seeds_and_epochs_shuffle_differently() -> None:
    first_epochs = {QuestionSampler(pool(30), seed, 30).batch(0) for seed in range(5)}
    epochs = {QuestionSampler(pool(30), 0, 30).batch(step) for step in range(5)}
    assert len(first_epochs | epochs) == 9


@given(SIZES, st.integers(0, 5), st.integers(0, 20))
def test_fresh_questions_go_round_all_that_are_not_in_the_batch(sizes: tuple[int, int], seed: int, step: int) -> None:
    size, per_step = sizes
    sampler = QuestionSampler(pool(size), seed, per_step)
    seen = Counter(question.question_id for question in sampler.batch(step)) if per_step == size else Counter[str]()
    num_others = size - per_step or size
    for index in range(3 * num_others):
        question, num_before = sampler.fresh(step, index)
        assert num_before == seen[question.question_id]
        seen[question.question_id] += 1
    assert len(seen) == num_others
    assert per_step == size or not seen.keys() & {question.question_id for question in sampler.batch(step)}


@given(SIZES, st.integers(0, 5), st.integers(0, 20), st.integers(0, 50))
def test_fresh_depends_on_seed_step_and_index_alone(sizes: tuple[int, int], seed: int, step: int, index: int) -> None:
    size, per_step = sizes
    warm, backwards = QuestionSampler(pool(size), seed, per_step), QuestionSampler(pool(size)[::-1], seed, per_step)
    for earlier in (step + 3, 0, step):
        warm.fresh(earlier, index + 1)
        warm.batch(earlier)
    assert warm.fresh(step, index) == backwards.fresh(step, index)


def test_steps_begin_with_other_fresh_questions() -> None:
    sampler = QuestionSampler(pool(40), 1, 4)
    assert len({sampler.fresh(step, 0)[0].question_id for step in range(8)}) > 4


@pytest.mark.parametrize("questions_per_step", [0, 4])
def test_batch_larger_than_the_pool_is_a_config_error(questions_per_step: int) -> None:
    with pytest.raises(ConfigError, match=r"data\.questions_per_step: .* from 3; set it between 1 and 3"):
        QuestionSampler(pool(3), 0, questions_per_step)
