"""Phases, metrics, trajectories and progress: what is written, refused, and removed on resume."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from megatron_sdsearch.errors import DataError, TrainingError
from megatron_sdsearch.logging import MetricsLog, PhaseTimer, ProgressDisplay, TrajectoryLog, final_table, names
from megatron_sdsearch.logging.metrics import read_metrics
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


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


# --- phases ---------------------------------------------------------------------------------------------------------


def test_phases_add_up_and_start_over() -> None:
    clock = Clock()
    timer = PhaseTimer(clock=clock)
    for _ in range(2):
        with timer.phase("rollout"):
            clock.now += 2.0
        clock.now += 50.0  # between phases: counted to none
        with timer.phase("update"):
            clock.now += 0.5
    assert timer.take() == {"rollout": 4.0, "update": 1.0}
    assert timer.take() == {}


def test_a_nested_phase_pauses_the_outer_one() -> None:
    clock, begun = Clock(), list[str]()
    timer = PhaseTimer(on_phase=begun.append, clock=clock)
    with timer.phase("update"):
        clock.now += 1.0
        with timer.phase("teacher"):
            clock.now += 10.0
        clock.now += 2.0
    assert timer.take() == {"update": 3.0, "teacher": 10.0}
    assert begun == ["update", "teacher", "update"]


def test_a_phase_that_fails_is_counted_and_closed() -> None:
    clock = Clock()
    timer = PhaseTimer(clock=clock)

    def fail() -> None:
        with timer.phase("update"):
            clock.now += 1.0
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    clock.now += 5.0
    assert timer.take() == {"update": 1.0}


# --- metrics --------------------------------------------------------------------------------------------------------


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_each_step_is_one_line_on_disk_at_once(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "run", tensorboard=False)
    log.log(1, {"train/em": 0.5, "train/num": np.int64(3), "loss/jsd": np.float32(0.25), "note": "é"})
    assert lines_of(tmp_path / "run") == [
        {"step": 1, "train/em": 0.5, "train/num": 3, "loss/jsd": 0.25, "note": "é"}
    ], "before close"
    log.log(3, {"train/em": 0.75})
    log.close()
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 3]


def test_later_numbers_of_the_same_step_join_its_line(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, tensorboard=False)
    log.log(0, {"eval/em": 0.123456789012345})
    log.log(1, {"train/em": 0.123456789012345})
    log.log(1, {"eval/em": 0.5, "train/em": 1})
    log.close()
    assert lines_of(tmp_path) == [
        {"step": 0, "eval/em": 0.123456789012345},
        {"step": 1, "train/em": 1, "eval/em": 0.5},
    ]


def test_a_line_that_becomes_shorter_leaves_no_remainder_behind(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, tensorboard=False)
    log.log(1, {"a": 0.123456789})
    log.log(1, {"a": 1})
    log.close()
    assert lines_of(tmp_path) == [{"step": 1, "a": 1}]


def test_an_earlier_step_is_refused(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, tensorboard=False)
    log.log(2, {"a": 1})
    with pytest.raises(ValueError, match="step 1 after step 2"):
        log.log(1, {"a": 1})
    log.close()
    assert lines_of(tmp_path) == [{"step": 2, "a": 1}]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float32("nan")])
def test_what_is_not_finite_is_refused_by_name_and_nothing_is_written(tmp_path: Path, value: float) -> None:
    log = MetricsLog(tmp_path, tensorboard=False)
    with pytest.raises(TrainingError, match=r"step 4: loss/jsd is (nan|inf)"):
        log.log(4, {"fine": 1.0, "loss/jsd": value})
    log.log(4, {"fine": 2.0})
    log.close()
    assert lines_of(tmp_path) == [{"step": 4, "fine": 2.0}]


def test_something_else_than_a_number_or_text_is_refused(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, tensorboard=False)
    value: Any = None
    with pytest.raises(TypeError, match="train/hit_rate is a NoneType"):
        log.log(1, {"train/hit_rate": value})
    log.close()


def test_resuming_cuts_off_later_steps_and_a_torn_line(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, tensorboard=False)
    for step in range(1, 6):
        log.log(step, {"a": step})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "a"')
    log = MetricsLog(tmp_path, tensorboard=False, resume_step=3)
    assert [row["step"] for row in lines_of(tmp_path)] == [1, 2, 3]
    log.log(3, {"eval": 1.0})
    log.log(4, {"a": 40})
    log.close()
    assert lines_of(tmp_path)[2:] == [{"step": 3, "a": 3, "eval": 1.0}, {"step": 4, "a": 40}]


def test_a_line_torn_while_numbers_joined_it_does_not_keep_a_run_from_going_on(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a": 1}\n{"step": 2, "a": 1, "eval/e"train/em": 0.25}\n')
    log = MetricsLog(tmp_path, tensorboard=False, resume_step=2)
    log.log(2, {"a": 2})
    log.close()
    assert lines_of(tmp_path) == [{"step": 1, "a": 1}, {"step": 2, "a": 2}]


def test_a_spoilt_file_is_an_error_that_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnot json\n{"step": 2}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: not JSON"):
        MetricsLog(tmp_path, tensorboard=False)
    (tmp_path / "metrics.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:1: no step"):
        read_metrics(tmp_path)


@pytest.mark.parametrize("evaluation", [{}, {"eval/em": 0.5}], ids=["no evaluation", "an evaluation of the last step"])
def test_tensorboard_shows_a_resumed_run_as_one_that_was_not_interrupted(
    tmp_path: Path, evaluation: dict[str, float]
) -> None:
    first = MetricsLog(tmp_path, tensorboard=True)
    for step in (1, 2, 3, 4):
        first.log(step, {"train/em": step / 10, "note": "text is no scalar"})
        first.log(step, evaluation)
    first.close()
    (before,) = (tmp_path / "tensorboard").iterdir()
    before.write_bytes(before.read_bytes()[:-7])  # as a killed process may leave it
    second = MetricsLog(tmp_path, tensorboard=True, resume_step=2)
    second.log(2, evaluation)  # as the loop does
    second.log(3, {"train/em": 0.9})
    second.close()
    shown = {"train/em": [(1, 0.1), (2, 0.2), (3, 0.9)]}
    assert shown_scalars(tmp_path) == shown | {name: [(1, 0.5), (2, 0.5)] for name in evaluation}


def test_tensorboard_of_a_run_that_begins_anew_shows_nothing_of_the_one_before(tmp_path: Path) -> None:
    for value in (0.25, 0.5):
        (tmp_path / "metrics.jsonl").unlink(missing_ok=True)
        log = MetricsLog(tmp_path, tensorboard=True)
        log.log(0, {"eval/em": value})
        log.close()
    assert shown_scalars(tmp_path) == {"eval/em": [(0, 0.5)]}


def shown_scalars(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    return {name: [(e.step, round(e.value, 3)) for e in board.Scalars(name)] for name in board.Tags()["scalars"]}


# --- trajectories ---------------------------------------------------------------------------------------------------


def decode(token_ids: Sequence[int]) -> str:
    return "".join(map(chr, token_ids))


def one_group() -> RolloutGroup:
    text = "<search>größe</search>"
    trajectory = Trajectory(
        trajectory_id=TrajectoryId(step=12, question_id="nq:train:1", sibling=4),
        spans=(
            ContextSpan(kind="prompt", token_ids=(81, 63)),
            SampledSpan(
                token_ids=tuple(map(ord, text)),
                logprobs=(-0.123456,) * len(text),
                text=text,
                action=Action.SEARCH,
                argument="größe",
                query_positions=(8, 9, 10, 11, 12),
                policy_version=12,
                finish_reason="stop",
            ),
            ContextSpan(kind="observation", token_ids=(68,), passage_ids=("p1", "p2")),
        ),
        status=TrajectoryStatus.NO_ANSWER,
    )
    return RolloutGroup(
        question=Question(question_id="nq:train:1", text="Q?", gold_answers=("x",), gold_passage_ids=("p2",)),
        trajectories=(trajectory,),
        scores=(Score(f1=0.5, em=0.0, reward=0.5, is_correct=True),),
    )


BLOCK = HindsightBlock(text="Earlier", teacher_prompt_ids=(1,), sources=(4,), dropped=(), leaks=(4,))


def test_a_trajectory_is_one_row_with_everything_a_reader_needs(tmp_path: Path) -> None:
    path = TrajectoryLog(tmp_path, decode).write(12, [one_group()], [[0.25]], [[BLOCK]])
    assert path == tmp_path / "trajectories" / "step_000012.jsonl"
    (row,) = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    spans = row.pop("spans")
    assert row == {
        "step": 12,
        "question_id": "nq:train:1",
        "question": "Q?",
        "gold_answers": ["x"],
        "gold_passage_ids": ["p2"],
        "dataset": "",
        "sibling": 4,
        "status": "no_answer",
        "answer": None,
        "is_correct": True,
        "scores": {"f1": 0.5, "em": 0.0, "reward": 0.5},
        "advantage": 0.25,
        "is_leaking": True,
        "hindsight": {"text": "Earlier", "sources": [4], "dropped": []},
    }
    assert [span["kind"] for span in spans] == ["prompt", "sampled", "observation"]
    assert [span["text"] for span in spans] == ["Q?", "<search>größe</search>", "D"]
    assert spans[2]["passage_ids"] == ["p1", "p2"]
    assert spans[1]["logprobs"][0] == -0.1235
    start, end = spans[1]["query_chars"]
    assert spans[1]["text"][start:end] == "größe"


def test_no_query_mark_where_tokens_do_not_decode_to_the_text(tmp_path: Path) -> None:
    log = TrajectoryLog(tmp_path, lambda ids: "#" * len(ids))
    row = json.loads(log.write(1, [one_group()], [[0.0]], [[BLOCK]]).read_text())
    assert row["spans"][1]["query_chars"] is None


def test_correct_is_what_the_score_says(tmp_path: Path) -> None:
    group = one_group()
    wrong = replace(group, scores=tuple(replace(score, is_correct=False) for score in group.scores))
    row = json.loads(TrajectoryLog(tmp_path, decode).write(1, [wrong], [[0.0]], [[BLOCK]]).read_text())
    assert row["is_correct"] is False


def test_a_step_written_again_replaces_the_file_and_leaves_nothing_behind(tmp_path: Path) -> None:
    log = TrajectoryLog(tmp_path, decode)
    log.write(1, [one_group(), one_group()], [[0.0], [0.0]], [[BLOCK], [BLOCK]])
    path = log.write(1, [one_group()], [[0.0]], [[BLOCK]])
    assert len(path.read_text().splitlines()) == 1
    assert list(path.parent.iterdir()) == [path]


def test_a_failing_write_leaves_the_old_file_whole(tmp_path: Path) -> None:
    log = TrajectoryLog(tmp_path, decode)
    path = log.write(1, [one_group()], [[0.5]], [[BLOCK]])
    before = path.read_text()
    with pytest.raises(ValueError, match="JSON compliant"):
        log.write(1, [one_group()], [[float("nan")]], [[BLOCK]])
    assert path.read_text() == before


def test_resuming_removes_files_of_later_steps(tmp_path: Path) -> None:
    log = TrajectoryLog(tmp_path, decode)
    for step in (1, 2, 3):
        log.write(step, [one_group()], [[0.0]], [[BLOCK]])
    TrajectoryLog(tmp_path, decode, resume_step=2)
    assert sorted(path.name for path in (tmp_path / "trajectories").iterdir()) == [
        "step_000001.jsonl",
        "step_000002.jsonl",
    ]


# --- progress -------------------------------------------------------------------------------------------------------


def show(console: Console, clock: Clock, **options: Any) -> None:
    with closing(ProgressDisplay(10, console=console, clock=clock, **options)) as display:
        for step in (1, 2):
            display.phase("rollout")
            clock.now += 30.0
            display.step(step, {names.REWARD: 0.25 * step, names.HIT_RATE: 0.5, "unknown/metric": 7})


def test_off_a_terminal_each_step_is_one_plain_line() -> None:
    out = io.StringIO()
    show(Console(file=out, width=40), Clock())
    assert out.getvalue().splitlines() == [
        "step 1/10  reward 0.250  hits 50%  0:04:30 left",
        "step 2/10  reward 0.500  hits 50%  0:04:00 left",
    ]


def test_how_many_lost_trajectories_a_number_leaves_out_stands_behind_it() -> None:
    out = io.StringIO()
    with closing(ProgressDisplay(10, console=Console(file=out, width=40), clock=Clock())) as display:
        display.step(1, {names.REWARD: 0.5, names.NUM_LOST: 3, names.EVAL_EM: 0.25, names.EVAL_NUM_LOST: 19})
        display.step(2, {names.REWARD: 0.5, names.NUM_LOST: 0, names.FORWARD_KL: 0.125})
    first, second = out.getvalue().splitlines()
    assert "reward 0.500 (3 lost)  held-out EM 0.250 (19 lost)" in first
    assert "lost" not in second
    assert "forward KL 0.12500" in second


def test_the_time_left_of_a_resumed_run_counts_its_own_steps() -> None:
    out, clock = io.StringIO(), Clock()
    with closing(ProgressDisplay(10, first_step=6, console=Console(file=out), clock=clock)) as display:
        clock.now += 10.0
        display.step(7, {})
    assert out.getvalue() == "step 7/10  0:00:30 left\n"


def test_on_a_terminal_the_bar_shows_phase_numbers_and_time() -> None:
    out = io.StringIO()
    show(Console(file=out, force_terminal=True, width=100), Clock())
    last = out.getvalue()
    assert "rollout" in last
    assert "step 2/10" in last
    assert "reward 0.500" in last
    assert "0:04:00 left" in last


def test_the_final_table_shows_every_number_and_reads_no_markup() -> None:
    console = Console(file=io.StringIO(), width=100)
    console.print(final_table({"eval": {"em_first": 0.07, "em_last": 0.654321}, "note": "[bold]x", "none": None}))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    rows = {line.split("│")[1].strip(): line.split("│")[2].strip() for line in text.splitlines() if "│" in line}
    assert rows == {"eval.em_first": "0.07", "eval.em_last": "0.6543", "note": "[bold]x", "none": "-"}
