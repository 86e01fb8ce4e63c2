"""A report on a terminal and as JSON."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from megatron_sdsearch.check.findings import Finding, Report
from megatron_sdsearch.check.page import page, summary
from megatron_sdsearch.errors import ConfigError, DataError

ERROR = Finding.error("a.b", "is [red]wrong[/red]", "fix it")
WARNING = Finding.warning("a.c", "is doubtful", "look")
NOTE = Finding.note("a.d", "is 7")


def shown(report: Report, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(page(report))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("findings", "code", "words"),
    [
        ([], 0, "no errors, no warnings: ready to run"),
        ([NOTE], 0, "no errors, no warnings: ready to run"),
        ([NOTE, WARNING], 1, "no errors, 1 warning: the run would start"),
        ([WARNING, ERROR, WARNING], 2, "1 error, 2 warnings: the run would fail"),
    ],
)
def test_the_worst_finding_decides(findings: list[Finding], code: int, words: str) -> None:
    report = Report(findings=findings)
    assert report.exit_code == code
    assert summary(report) == words
    assert shown(report).splitlines()[-1].strip() == words


def test_everything_of_a_finding_is_shown_as_it_is() -> None:
    text = shown(Report(findings=[ERROR, NOTE], world="1 node"))
    for words in ("error", "a.b: is [red]wrong[/red]", "-> fix it", "note", "a.d: is 7", "Meant for 1 node"):
        assert words in text


def test_errors_of_training_become_findings() -> None:
    found = Finding.of(ConfigError("f", "is bad", "set it; or not"), "other")
    assert (found.field, found.problem, found.fix) == ("f", "is bad", "set it; or not")
    found = Finding.of(DataError("x.jsonl:3: no text; write some"), "data.train")
    assert (found.field, found.problem, found.fix) == ("data.train", "x.jsonl:3: no text", "write some")
    assert Finding.of(DataError("x is bad"), "f").problem == "x is bad"
