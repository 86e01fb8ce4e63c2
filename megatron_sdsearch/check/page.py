"""A report as a person reads it: one table, section after section, the worst first, and one line that sums it up."""

from __future__ import annotations

from itertools import groupby
from typing import Final

from rich.console import Group
from rich.table import Table
from rich.text import Text

from megatron_sdsearch.check.findings import Report, Severity

_STYLES: Final = {Severity.ERROR: "bold red", Severity.WARNING: "yellow", Severity.NOTE: "dim"}


def page(report: Report) -> Group:
    """Everything in ``report``."""
    table = Table(show_header=False, box=None, pad_edge=False, padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for section, findings in groupby(report.findings, key=lambda finding: finding.section):
        table.add_row(Text(section, style="bold underline"), "")
        for finding in findings:
            # Text, not str: a value with square brackets must not be read as markup.
            words = Text(f"{finding.field}: ", style="bold") + Text(finding.problem, style="not bold")
            if finding.fix:
                words += Text(f"\n-> {finding.fix}", style="cyan")
            table.add_row(Text(f"  {finding.severity}", style=_STYLES[finding.severity]), words)
    return Group(table, *([Text(f"\nMeant for {report.world}")] if report.world else []), Text(summary(report)))


def summary(report: Report) -> str:
    """One line."""
    errors, warnings = report.count(Severity.ERROR), report.count(Severity.WARNING)
    verdict = "the run would fail" if errors else "the run would start" if warnings else "ready to run"
    return f"{_number(errors, 'error')}, {_number(warnings, 'warning')}: {verdict}"


def _number(count: int, noun: str) -> str:
    return f"{count or 'no'} {noun}{'s' * (count != 1)}"
