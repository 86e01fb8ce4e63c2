"""NQ and HotpotQA as they are published, through to the files of a run."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_sdsearch.data.preparation import (
    BadRow,
    Prepared,
    PrepareSettings,
    find_question_files,
    prepare,
    write_prepared,
)
from megatron_sdsearch.data.questions import read_questions
from megatron_sdsearch.errors import ConfigError, DataError
from tests.unit.data import published
from tools import prepare_data

DEFAULTS = PrepareSettings()


def run(*sources: Path, bad_rows: list[BadRow] | None = None, **changes: Any) -> Prepared:
    asked = replace(DEFAULTS, **changes)
    files = [file for source in sources for file in find_question_files(str(source), asked)]
    return prepare(files, asked, [] if bad_rows is None else bad_rows, on_file=lambda *_: None)


def ids(prepared: Prepared, split: str) -> list[str]:
    return [question.question_id for question in prepared.splits[split]]


@pytest.fixture
def flashrag(tmp_path: Path) -> Path:
    return published.write_both(tmp_path / "flashrag")


@pytest.fixture
def search_r1(tmp_path: Path) -> Path:
    return published.write_search_r1(tmp_path / "search_r1")


def test_flashrag_folders(flashrag: Path) -> None:
    prepared = run(flashrag)
    assert ids(prepared, "train") == ["nq:train:0", "nq:train:1", "nq:train:2", "hotpotqa:train:0", "hotpotqa:train:1"]
    assert prepared.splits["train"][2].gold_answers == ("Wilhelm Conrad Röntgen",)
    assert sorted(ids(prepared, "test")) == sorted(
        [f"nq:test:{i}" for i in range(6)] + [f"hotpotqa:dev:{i}" for i in range(7)]
    )
    assert prepared.origins["test"] == {"nq": "test", "hotpotqa": "dev"}
    assert (prepared.num_bad_rows, prepared.duplicates, prepared.leaks) == (0, {}, {})


def test_train_keeps_the_requested_order(flashrag: Path) -> None:
    assert ids(run(flashrag, train=("hotpotqa", "nq")), "train")[:3] == [
        "hotpotqa:train:0",
        "hotpotqa:train:1",
        "nq:train:0",
    ]


def test_one_question_has_one_id_in_both_formats(flashrag: Path, search_r1: Path) -> None:
    ours, theirs = run(flashrag), run(search_r1)
    assert ids(ours, "train") == ids(theirs, "train")
    for mine, other in zip(ours.splits["train"], theirs.splits["train"], strict=True):
        assert other.text in (mine.text, f"{mine.text}?")
        assert (mine.gold_answers, mine.dataset) == (other.gold_answers, other.dataset)


def test_heldout_is_drawn_from_dev_where_there_is_one(flashrag: Path, search_r1: Path) -> None:
    prepared = run(flashrag, heldout_per_dataset=5)
    splits = Counter(question_id.rpartition(":")[0] for question_id in ids(prepared, "heldout"))
    assert splits == {"nq:dev": 5, "hotpotqa:dev": 5}
    assert run(search_r1, heldout_per_dataset=5).origins["heldout"] == {"nq": "test", "hotpotqa": "test"}
    assert run(flashrag, heldout_from="test").origins["heldout"] == {"nq": "test", "hotpotqa": "dev"}
    assert "heldout" not in run(flashrag, heldout_per_dataset=0).splits


@given(seed=st.integers(0, 9), per_dataset=st.integers(1, 9))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
def test_a_draw_depends_on_its_seed_and_not_on_other_data_sets(flashrag: Path, seed: int, per_dataset: int) -> None:
    drawn = run(flashrag, seed=seed, heldout_per_dataset=per_dataset)
    assert ids(drawn, "heldout") == ids(run(flashrag, seed=seed, heldout_per_dataset=per_dataset), "heldout")
    alone = run(flashrag, seed=seed, heldout_per_dataset=per_dataset, test=("nq",))
    assert ids(alone, "heldout") == [i for i in ids(drawn, "heldout") if i.startswith("nq:")]
    more = run(flashrag, seed=seed, heldout_per_dataset=per_dataset + 1)
    assert set(ids(drawn, "heldout")) <= set(ids(more, "heldout"))


def test_seeds_draw_differently(flashrag: Path) -> None:
    assert len({tuple(ids(run(flashrag, seed=seed, heldout_per_dataset=3), "heldout")) for seed in range(6)}) == 6


TEXTS = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=12)
FILES = st.dictionaries(st.sampled_from(["nq", "hotpotqa", "triviaqa"]), st.lists(TEXTS, min_size=1, max_size=6))


@given(files=FILES.filter(lambda files: "nq" in files), others_first=st.booleans())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
def test_ids_are_unique_and_do_not_depend_on_other_data_sets(
    tmp_path: Path, files: dict[str, list[str]], others_first: bool
) -> None:
    root = tmp_path / "any"
    shutil.rmtree(root, ignore_errors=True)
    for dataset, texts in files.items():
        for split in ("train", "test"):
            published.write_flashrag(root, dataset, split, [(text, "x") for text in texts])
    names = tuple(sorted(files, reverse=others_first))
    prepared = run(root, train=names, test=names)
    everything = [*ids(prepared, "train"), *ids(prepared, "test")]
    assert len(set(everything)) == len(everything) == 2 * sum(map(len, files.values()))
    alone = run(root, train=("nq",), test=("nq",))
    for split in ("train", "test"):
        mine = [q for q in prepared.splits[split] if q.dataset == "nq"]
        assert [(q.question_id, q.text) for q in mine] == [(q.question_id, q.text) for q in alone.splits[split]]


def test_bad_rows_are_listed_with_location_and_are_an_error_above_the_limit(flashrag: Path) -> None:
    path = flashrag / "nq" / "train.jsonl"
    with path.open("a", encoding="utf-8") as file:
        file.write('{"id": "train_3", "question": " ", "golden_answers": ["x"]}\n')
        file.write("not json\n")
        file.write('{"id": "train_5", "query": "who?", "golden_answers": ["x"]}\n')
    listed: list[BadRow] = []
    with pytest.raises(DataError, match=r"bad rows: 3, and at most 2 may be left out; fix them, or raise the limit"):
        run(flashrag, max_bad_rows=2, bad_rows=listed)
    prepared = run(flashrag, max_bad_rows=3)
    assert prepared.num_bad_rows == 3
    assert [bad.location for bad in listed] == [f"{path}:4", f"{path}:5", f"{path}:6"]
    for bad, reason in zip(listed, ("question: String should", "is not JSON", "question: Field required"), strict=True):
        assert reason in bad.reason
    assert len(prepared.splits["train"]) == 5


def test_texts_of_lists_are_written_as_lists(flashrag: Path, tmp_path: Path) -> None:
    published.write_flashrag(flashrag, "nq", "train", [("Who?", "x")], golden_answers="['Al' 'Bo']")
    manifest = write_prepared(run(flashrag, train=("nq",)), DEFAULTS, tmp_path / "out", "parquet")
    assert pq.read_table(manifest.parent / "train.parquet")["gold_answers"].to_pylist() == [["Al", "Bo"]]


def test_an_lfs_pointer_is_one_error_not_many_bad_rows(flashrag: Path) -> None:
    (flashrag / "nq" / "train.jsonl").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(DataError, match=r"nq/train\.jsonl: is a git LFS pointer"):
        run(flashrag, max_bad_rows=100)


def test_a_long_list_of_bad_rows_is_cut_in_the_message_alone(flashrag: Path) -> None:
    published.write_flashrag(flashrag, "nq", "train", [("", "x")] * 23)
    listed: list[BadRow] = []
    with pytest.raises(DataError, match=r"(?s)bad rows: 23, .*\n  and 13 more$") as caught:
        run(flashrag, bad_rows=listed)
    assert len(str(caught.value).splitlines()) == 12
    assert len(listed) == 23


def test_files_that_number_other_questions_alike_are_found(search_r1: Path, tmp_path: Path) -> None:
    """AutoRefine's valid_500 is shuffled before it is numbered: its row 0 is not the test set's row 0."""
    shuffled = published.search_r1_rows("nq", "test", "test", published.NQ_TEST[::-1])
    published.write_parquet(tmp_path / "valid" / "test.parquet", shuffled)
    with pytest.raises(DataError, match=r"row 1: id 'nq:test:0' is that of .*test\.parquet: row 1"):
        run(search_r1, tmp_path / "valid")


def test_duplicates_and_leaks_are_counted_and_dropped_on_request(flashrag: Path) -> None:
    again = [
        *published.HOTPOTQA_TRAIN,
        ("Big little lies season 2: how many episodes?", "7"),
        ("The dev question 3", "x"),
    ]
    published.write_flashrag(flashrag, "hotpotqa", "train", again)
    prepared = run(flashrag)
    assert prepared.duplicates == {"hotpotqa:train:2": "nq:train:1"}
    assert prepared.leaks == {"hotpotqa:train:3": "nq:dev:3"}
    assert (len(prepared.splits["train"]), prepared.num_dropped) == (7, 0)
    dropped = run(flashrag, drop_duplicates=True, drop_leaks=True)
    assert ids(dropped, "train") == [
        i for i in ids(prepared, "train") if i not in ("hotpotqa:train:2", "hotpotqa:train:3")
    ]
    assert dropped.num_dropped == 2


@pytest.mark.parametrize("file_format", ["parquet", "jsonl"])
def test_written_files_are_read_back_and_have_the_same_bytes_each_time(
    flashrag: Path, tmp_path: Path, file_format: Any
) -> None:
    contents = []
    for name in ("one", "two"):
        prepared = run(flashrag)
        manifest = write_prepared(prepared, DEFAULTS, tmp_path / name, file_format)
        for split, questions in prepared.splits.items():
            assert read_questions(manifest.parent / f"{split}.{file_format}") == questions
        contents.append({path.name: path.read_bytes() for path in manifest.parent.iterdir()})
    assert contents[0] == contents[1]
    assert set(contents[0]) == {"manifest.json", *(f"{split}.{file_format}" for split in ("train", "heldout", "test"))}


def test_manifest_has_sources_counts_and_checksums(flashrag: Path, tmp_path: Path) -> None:
    manifest = json.loads(write_prepared(run(flashrag), DEFAULTS, tmp_path / "out", "parquet").read_text())
    assert manifest["files"]["train.parquet"]["datasets"] == {"hotpotqa": 2, "nq": 3}
    assert manifest["files"]["test.parquet"]["from_split"] == {"nq": "test", "hotpotqa": "dev"}
    assert {entry["file"]: entry["num_questions"] for entry in manifest["sources"]} == {
        "nq/train.jsonl": 3,
        "nq/dev.jsonl": 8,
        "nq/test.jsonl": 6,
        "hotpotqa/train.jsonl": 2,
        "hotpotqa/dev.jsonl": 7,
    }
    assert all(len(entry["sha256"]) == 64 for entry in [*manifest["sources"], *manifest["files"].values()])


def test_a_folder_with_other_files_is_never_replaced(flashrag: Path, tmp_path: Path) -> None:
    write_prepared(run(flashrag), DEFAULTS, tmp_path / "out", "parquet")
    write_prepared(run(flashrag, heldout_per_dataset=0), DEFAULTS, tmp_path / "out", "jsonl")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"manifest.json", "train.jsonl", "test.jsonl"}
    (tmp_path / "out" / "notes.txt").touch()
    with pytest.raises(ConfigError, match=r"--out: .* holds files other than prepared questions; give a new folder"):
        write_prepared(run(flashrag), DEFAULTS, tmp_path / "out", "parquet")
    assert not list(tmp_path.glob(".out*"))


def test_a_folder_that_cannot_be_written_is_one_error(flashrag: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written"):
        write_prepared(run(flashrag), DEFAULTS, tmp_path / "file" / "out", "parquet")


def test_an_interrupted_replacement_leaves_what_was_there(
    flashrag: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    write_prepared(run(flashrag), DEFAULTS, out, "parquet")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    rename = Path.rename

    def interrupt(self: Path, target: Path) -> Path:
        if target == out and self.name.endswith(str(os.getpid())):  # the second of two renames
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_prepared(run(flashrag, heldout_per_dataset=0), DEFAULTS, out, "jsonl")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("column", ["prompt", "reward_model", "extra_info"])
def test_a_missing_column_is_named(search_r1: Path, column: str) -> None:
    path = search_r1 / "train.parquet"
    pq.write_table(pq.read_table(path).drop_columns([column]), path)
    with pytest.raises(DataError, match=rf"train\.parquet: has no column '{column}', its columns are id, question"):
        run(search_r1)


def test_a_missing_data_set_is_an_error_that_lists_those_that_exist(flashrag: Path, search_r1: Path) -> None:
    there = "hotpotqa/dev, hotpotqa/train, nq/dev, nq/test, nq/train"
    with pytest.raises(DataError, match=rf"squad: no questions in a split train; found {there}: choose one"):
        run(flashrag, train=("squad",))
    with pytest.raises(DataError, match="popqa: no questions in a split test or dev or train; found hotpotqa/te"):
        run(search_r1, test=("popqa",))


def test_other_benchmarks_are_found(flashrag: Path) -> None:
    published.write_flashrag(flashrag, "popqa", "test", [("What is X's occupation?", "politician")])
    published.write_flashrag(flashrag, "musique", "dev", [("Who is the spouse of the performer?", "Miquette")])
    prepared = run(flashrag, test=("nq", "popqa", "musique"))
    assert prepared.origins["test"] == {"nq": "test", "popqa": "test", "musique": "dev"}


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Exit code of the tool."""
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", *arguments])
    try:
        prepare_data.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_command(
    flashrag: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert command(monkeypatch, str(flashrag), "--out", str(out), "--heldout", "2") == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["num_questions"] == {"train": 5, "heldout": 4, "test": 13}
    assert "read nq/train.jsonl: 3 rows" in said.err
    with (flashrag / "nq" / "train.jsonl").open("a") as file:
        file.write("{}\n")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert command(monkeypatch, str(flashrag), "--out", str(out)) == 2
    assert "DataError: bad rows: 1" in capsys.readouterr().err
    listed = [json.loads(line) for line in (tmp_path / "out-bad-rows.jsonl").read_text().splitlines()]
    assert [row["place"] for row in listed] == [f"{flashrag / 'nq' / 'train.jsonl'}:4"]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert command(monkeypatch, str(flashrag), "--out", str(out), "--max-bad-rows", "1") == 0
    assert command(monkeypatch, str(flashrag), "--out", str(out), "--train", "nq", "nq") == 2
    assert "--train names a data set twice" in capsys.readouterr().err
    assert command(monkeypatch, str(tmp_path / "nowhere"), "--out", str(out)) == 2
    assert "SOURCE: " in capsys.readouterr().err
