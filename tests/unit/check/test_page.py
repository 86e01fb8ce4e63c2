"""A report on a terminal and as JSON."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from megatron_sdsearch.check.findings import Finding, Report, errors, note, warning
from megatron_sdsearch.errors import ConfigError, DataError, as_config_error

(ERROR,) = errors([ConfigError("a.b", "is [red]wrong[/red]", "fix it")])
WARNING = warning("a.c", "is doubtful", "look")
NOTE = note("a.d", "is 7")


def shown(report: Report, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(report.page())
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("findings", "code", "text"),
    [
        ([], 0, "no errors, no warnings: ready to run"),
        ([NOTE], 0, "no errors, no warnings: ready to run"),
        ([NOTE, WARNING], 1, "no errors, 1 warning: the run would start"),
        ([WARNING, ERROR, WARNING], 2, "1 error, 2 warnings: the run would fail"),
    ],
)
def test_the_worst_finding_decides(findings: list[Finding], code: int, text: str) -> None:
    report = Report(findings=findings)
    assert report.exit_code == code
    assert report.summary == text
    assert shown(report).splitlines()[-1].strip() == text


def test_everything_of_a_finding_is_shown_as_it_is() -> None:
    page = shown(Report(findings=[ERROR, NOTE], cluster="1 node"))
    for text in ("error", "a.b: is [red]wrong[/red]", "-> fix it", "note", "a.d: is 7", "Meant for 1 node"):
        assert text in page


def test_errors_about_files_become_problems_of_settings() -> None:
    found = as_config_error(ConfigError("f", "is bad", "set it; or not"), "other")
    assert (found.field, found.problem, found.fix) == ("f", "is bad", "set it; or not")
    found = as_config_error(DataError("x.jsonl:3: no text; write some"), "data.train")
    assert (found.field, found.problem, found.fix) == ("data.train", "x.jsonl:3: no text", "write some")
    assert as_config_error(DataError("x is bad"), "f").problem == "x is bad"
