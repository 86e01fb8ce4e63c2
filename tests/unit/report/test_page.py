"""The page about a run: self-contained, harmless, and true to the run's files."""

from __future__ import annotations

import json
import re
from contextlib import closing
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from megatron_sdsearch.errors import DataError
from megatron_sdsearch.logging import MetricsLog, names
from megatron_sdsearch.report.figures import MAX_DOTS
from megatron_sdsearch.report.page import write_page
from megatron_sdsearch.training.run_lock import lock_run_dir

EVIL = '<script>alert("x")</script><img src=x onerror=alert(1)>'


class Reader(HTMLParser):
    """Collects tags with their attributes, and the text inside each class."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.by_class: dict[str, list[str]] = {}
        self.text = ""
        self._open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "line", "polyline", "rect"):
            self._open.append(dict(attrs).get("class") or "")

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("meta", "br", "line", "polyline", "rect"):
            self._open.pop()

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._open and self._open[-1]:
            self.by_class.setdefault(self._open[-1], []).append(data)


def log_metrics(run_dir: Path, num_steps: int = 6) -> None:
    log = MetricsLog(run_dir, tensorboard=False)
    log.log(0, {names.EVAL_EM: 0.125})
    for step in range(1, num_steps + 1):
        phases = {names.PHASE_PREFIX + "rollout": 1.5, names.PHASE_PREFIX + "update": 0.5}
        log.log(step, {names.REWARD: step / 10, names.JSD: 0.01, names.STEP_SECONDS: 2.0, **phases})
    log.log(num_steps, {names.EVAL_EM: 0.625, "extra/unknown": 42})
    log.close()


def row(sibling: int, *, question_id: str = "q1", is_correct: bool = False, **changes: Any) -> dict[str, Any]:
    query = "my query"
    text = f"<search>{query}</search>"
    return {
        "step": 1,
        "question_id": question_id,
        "question": f"who is {question_id}",
        "gold_answers": ["Ada"],
        "gold_passage_ids": ["p9"],
        "dataset": "",
        "sibling": sibling,
        "status": "answered",
        "answer": "Bob",
        "is_correct": is_correct,
        "scores": {"f1": float(is_correct), "em": 0.0, "reward": 0.1},
        "advantage": -0.5,
        "is_leaking": False,
        "hindsight": {"text": "Earlier attempts at this question:\nCORRECT: a", "sources": [0], "dropped": []},
        "spans": [
            {"kind": "prompt", "text": "the prompt"},
            {"kind": "sampled", "text": text, "action": "search", "query_chars": [8, 8 + len(query)]},
            {"kind": "observation", "text": "the documents"},
            {"kind": "sampled", "text": "<answer>Bob</answer>", "action": "answer", "query_chars": None},
        ],
        **changes,
    }


def log_trajectories(run_dir: Path, step: int, rows: list[dict[str, Any]]) -> None:
    folder = run_dir / "trajectories"
    folder.mkdir(exist_ok=True)
    path = folder / f"step_{step:06d}.jsonl"
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")


def read_page(run_dir: Path) -> tuple[str, Reader]:
    html = write_page(run_dir).read_text(encoding="utf-8")
    return html, Reader(html)


def test_the_page_needs_nothing_from_outside_and_runs_nothing(tmp_path: Path) -> None:
    log_metrics(tmp_path)
    log_trajectories(tmp_path, 1, [row(0)])
    html, page = read_page(tmp_path)
    assert write_page(tmp_path) == tmp_path / "report.html"
    assert "://" not in html
    assert not re.search(r"url\(|@import", html)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "img", "iframe", "object"}
    assert not [name for _, attributes in page.tags for name in attributes if name in ("src", "href", "onload")]
    assert "prefers-color-scheme: dark" in html


def test_lost_trajectories_stand_beside_the_figures_that_leave_them_out(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, tensorboard=False)
    log.log(0, {names.EVAL_EM: 0.5, names.EVAL_NUM_LOST: 0})
    log.log(1, {names.REWARD: 0.5, names.NUM_LOST: 0, names.EVAL_EM: 0.75, names.EVAL_NUM_LOST: 19})
    log.close()
    _, page = read_page(tmp_path)
    assert "first and last; lost and left out: 0 and 19 trajectories" in page.text
    assert page.text.count("lost and left out") == 1, "not where none was lost"
    assert "Trajectories left out" in page.text
    assert "held-out, lost" in page.text
    assert "training, lost" not in page.text


def test_text_of_a_run_cannot_become_markup(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    log_metrics(run_dir)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 7, EVIL: EVIL}) + "\n")
    (run_dir / "summary.json").write_text(json.dumps({EVIL: EVIL}))
    spans = [{**span, "text": EVIL} for span in row(0)["spans"]]
    spoilt = row(
        0,
        question_id=EVIL,
        gold_answers=[EVIL],
        gold_passage_ids=[EVIL],
        status=EVIL,
        spans=spans,
        hindsight={"text": EVIL, "sources": [], "dropped": []},
    )
    log_trajectories(run_dir, 1, [spoilt])
    html, page = read_page(run_dir)
    assert not {tag for tag, _ in page.tags} & {"script", "img"}
    assert "<script" not in html
    assert page.text.count(EVIL) >= 8, "shown as text instead"


def test_headline_numbers_compare_first_and_last(tmp_path: Path) -> None:
    log_metrics(tmp_path)
    _, page = read_page(tmp_path)
    assert "Held-out EM0.125 → 0.625first and last" in page.text
    # Means of 0.1 0.2 0.3 and 0.4 0.5 0.6: half of the six steps each, for five would overlap.
    assert "Training reward0.2 → 0.5means of the first and last 3 steps" in page.text
    assert "Time0:00:122.00 s per step" in page.text
    assert "hit rate" not in page.text.lower(), "no metric, no tile and no chart"


def test_curves_and_all_metrics_are_there(tmp_path: Path) -> None:
    log_metrics(tmp_path)
    (tmp_path / "summary.json").write_text(json.dumps({"eval": {"em_last": 0.625}}))
    _, page = read_page(tmp_path)
    drawn = [tag for tag, _ in page.tags]
    assert drawn.count("polyline") == 3, "reward, held-out EM, JSD"
    assert drawn.count("polygon") == 2, "two phases"
    assert "extra/unknown" in page.text
    assert "eval.em_last" in page.text


def test_the_divergence_that_the_run_logged_is_charted(tmp_path: Path) -> None:
    with closing(MetricsLog(tmp_path, tensorboard=False)) as log:
        for step in (1, 2):
            log.log(step, {names.FORWARD_KL: 0.5, f"{names.FORWARD_KL}_mixed": 0.25})
    _, page = read_page(tmp_path)
    assert "forward KL, nats0.5 → 0.5" in page.text
    assert "Teacher and student: forward KL, nats" in page.text
    assert [tag for tag, _ in page.tags].count("polyline") == 2, "all groups, mixed ones"
    assert "JSD" not in page.text


def test_points_show_their_value_unless_there_are_too_many(tmp_path: Path) -> None:
    for num_steps, has_dots in ((MAX_DOTS, True), (MAX_DOTS + 1, False)):
        log_metrics(tmp_path / str(num_steps), num_steps)
        html, page = read_page(tmp_path / str(num_steps))
        assert ("training reward, step 2: 0.2" in html) == has_dots
        circles = [tag for tag, attributes in page.tags if tag == "circle" and attributes["class"] == "s0"]
        assert (len(circles) >= num_steps) == has_dots


def test_a_group_is_shown_with_its_spans_by_kind_and_the_query_marked(tmp_path: Path) -> None:
    log_metrics(tmp_path)
    log_trajectories(tmp_path, 1, [row(0, is_correct=True, is_leaking=True), row(1)])
    _, page = read_page(tmp_path)
    assert page.by_class["query"][1:] == ["my query"] * 2, "the first one is the legend's"
    assert page.by_class["observation"][1:] == ["the documents"] * 2
    assert page.by_class["prompt"] == ["the prompt"] * 2
    assert page.by_class["search"][1:] == ["<search>", "</search>"] * 2
    assert page.by_class["badge good"] == ["CORRECT"]
    assert page.by_class["badge bad"] == ["INCORRECT"]
    assert page.by_class["badge leak"] == ["gold answer in a query"]
    assert page.by_class["block"] == ["Earlier attempts at this question:\nCORRECT: a"], "once for the group"
    assert "who is q1" in page.text


def test_mixed_groups_of_the_first_and_last_step_come_first(tmp_path: Path) -> None:
    log_metrics(tmp_path)
    for step in (1, 2, 10):
        rows = [row(s, question_id=f"step{step}-{i}", is_correct=i == 3 and s == 0) for i in range(5) for s in (0, 1)]
        log_trajectories(tmp_path, step, rows)
    _, page = read_page(tmp_path)
    shown = list(dict.fromkeys(re.findall(r"who is (step\d+-\d)", page.text)))
    assert shown == ["step1-3", "step1-0", "step1-1", "step10-3", "step10-0", "step10-1"]


def test_a_big_step_is_read_no_further_than_the_groups_that_are_shown(tmp_path: Path) -> None:
    log_metrics(tmp_path)
    rows = [row(s, question_id=f"q{i}", is_correct=s == 0 and i != 1) for i in range(5) for s in (0, 1)]
    log_trajectories(tmp_path, 1, rows)
    with (tmp_path / "trajectories" / "step_000001.jsonl").open("a") as file:
        file.write("never read\n")
    _, page = read_page(tmp_path)
    assert list(dict.fromkeys(re.findall(r"who is (q\d)", page.text))) == ["q0", "q2", "q3"]


def test_different_blocks_are_shown_with_their_siblings(tmp_path: Path) -> None:
    log_metrics(tmp_path)
    empty = {"text": "", "sources": [], "dropped": []}
    log_trajectories(tmp_path, 1, [row(0), row(1, hindsight=empty)])
    _, page = read_page(tmp_path)
    assert len(page.by_class["block"]) == 2
    assert page.by_class["block"][1] == "(none: nothing is distilled)"
    assert "sibling 1:" in page.text


def test_a_run_without_trajectories_says_so(tmp_path: Path) -> None:
    log_metrics(tmp_path)
    _, page = read_page(tmp_path)
    assert "No trajectories were kept" in page.text


@pytest.mark.parametrize(
    ("files", "state", "sentence"),
    [
        ({}, "failed", "Failed or was killed after step 6: the same command continues from the newest checkpoint."),
        ({"summary.json": {"steps": 6}}, "finished", "Finished after step 6."),
        (
            {"stopped.json": {"signal": "SIGTERM", "step": 6}},
            "stopped",
            "Stopped after step 6 (SIGTERM) and saved: the same command continues from there.",
        ),
    ],
)
def test_the_state_is_read_from_what_the_run_left(
    files: dict[str, Any], state: str, sentence: str, tmp_path: Path
) -> None:
    log_metrics(tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    _, page = read_page(tmp_path)
    assert page.by_class[state] == [sentence]


def test_a_run_that_holds_its_folder_is_running(tmp_path: Path) -> None:
    log_metrics(tmp_path)
    with lock_run_dir(tmp_path):
        _, page = read_page(tmp_path)
        assert "Running: step 6 is done." in page.text
    _, page = read_page(tmp_path)
    assert "Running" not in page.text


@pytest.mark.parametrize(
    "torn", ['{"step": 7, "train/rew', '{"step": 7, "train/reward": 0.7, "loss/jsd": 0.0"loss/jsd": 1}\n']
)
def test_a_torn_last_line_of_a_killed_run_is_passed_over(torn: str, tmp_path: Path) -> None:
    log_metrics(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    _, page = read_page(tmp_path)
    assert "Failed or was killed after step 6" in page.text


def test_a_run_without_a_step_has_a_page(tmp_path: Path) -> None:
    MetricsLog(tmp_path, tensorboard=False).close()
    _, page = read_page(tmp_path)
    assert "Failed or was killed before the first step was done" in page.text
    assert not [tag for tag, _ in page.tags if tag == "svg"]


def test_a_number_known_once_is_no_comparison(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, tensorboard=False)
    log.log(0, {names.EVAL_EM: 0.125})
    log.close()
    _, page = read_page(tmp_path)
    assert "Held-out EM0.125so far once" in page.text


def test_the_held_out_figure_names_how_many_it_leaves_out(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, tensorboard=False)
    log.log(0, {names.EVAL_EM: 0.5, "eval/num_lost": 0})
    log.log(5, {names.EVAL_EM: 0.75, "eval/num_lost": 19})
    log.close()
    _, page = read_page(tmp_path)
    assert "Held-out EM0.5 → 0.75first and last; lost and left out: 0 and 19 trajectories" in page.text


def test_steps_that_taught_nothing_are_said_at_the_top(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, tensorboard=False)
    for step in range(1, 6):
        log.log(step, {names.STEP_SECONDS: 1.0, names.SHARE_WITHOUT_ADVANTAGE: 1.0, names.GRAD_NORM: 0.0})
    log.close()
    _, page = read_page(tmp_path)
    contrast, gradient = page.by_class["warning"]
    assert contrast.startswith("no group had contrast for 5 steps (1 to 5): ")
    assert gradient.startswith("the gradient was exactly 0 for 5 steps (1 to 5): ")


def test_the_page_goes_to_another_file_on_request_and_replaces_it_whole(tmp_path: Path) -> None:
    run_dir, out = tmp_path / "run", tmp_path / "page.html"
    log_metrics(run_dir)
    out.write_text("old")
    out.chmod(0o400)
    assert write_page(run_dir, out) == out
    assert out.read_text().startswith("<!doctype html>")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "run"]
    assert [path.name for path in run_dir.iterdir()] == ["metrics.jsonl"]


def test_a_run_without_metrics_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"metrics\.jsonl"):
        write_page(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("line", "problem"), [("not json\n", "1: not JSON"), ('{"step": 1}\n', "1: no hindsight")])
def test_a_spoilt_trajectory_file_is_an_error_that_names_the_line(tmp_path: Path, line: str, problem: str) -> None:
    log_metrics(tmp_path)
    log_trajectories(tmp_path, 1, [])
    (tmp_path / "trajectories" / "step_000001.jsonl").write_text(line)
    with pytest.raises(DataError, match=f"step_000001.jsonl:{problem}"):
        write_page(tmp_path)


@pytest.mark.parametrize("name", ["summary.json", "stopped.json"])
@pytest.mark.parametrize("content", ["not json", "[1]"])
def test_a_spoilt_summary_is_an_error(tmp_path: Path, content: str, name: str) -> None:
    log_metrics(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=re.escape(name)):
        write_page(tmp_path)
