"""Findings of a check, their severity, and their table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from itertools import groupby
from typing import Any, Final

from rich.console import Group
from rich.table import Table
from rich.text import Text

from megatron_sdsearch.errors import ConfigError


class Severity(StrEnum):
    """Severities from worst to best, their order in the table."""

    ERROR = "error"
    """The run would fail, or not start."""
    WARNING = "warning"
    """The run would start, but most likely not do what is wanted."""
    NOTE = "note"
    """Information; nothing to do."""


_STYLES: Final = {Severity.ERROR: "bold red", Severity.WARNING: "yellow", Severity.NOTE: "dim"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One problem or note.

    Attributes:
        severity: see ``Severity``.
        field: dotted name of the setting concerned.
        problem: what is wrong, or the text of a note.
        fix: what to do about it; empty for notes.
        section: heading in the table.
    """

    severity: Severity
    field: str
    problem: str
    fix: str = ""
    section: str = ""


def errors(problems: Iterable[ConfigError]) -> Iterator[Finding]:
    """Turn problems that training would refuse into findings."""
    return (Finding(Severity.ERROR, problem.field, problem.problem, problem.fix) for problem in problems)


def warning(field: str, problem: str, fix: str) -> Finding:
    """Make a finding about a run that would be wasted, wholly or in part."""
    return Finding(Severity.WARNING, field, problem, fix)


def note(field: str, problem: str) -> Finding:
    """Make a finding that needs no action."""
    return Finding(Severity.NOTE, field, problem)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All findings of one check.

    Attributes:
        findings: by section; errors first in each.
        cluster: description of the assumed cluster.
    """

    findings: Sequence[Finding]
    cluster: str = ""

    def count(self, severity: Severity) -> int:
        """Count the findings of a severity."""
        return sum(finding.severity is severity for finding in self.findings)

    @property
    def exit_code(self) -> int:
        """2 with errors, 1 with only warnings, 0 with neither."""
        if self.count(Severity.ERROR):
            return 2
        return 1 if self.count(Severity.WARNING) else 0

    @property
    def summary(self) -> str:
        """One line with counts and verdict."""
        counts = {str(severity): self.count(severity) for severity in (Severity.ERROR, Severity.WARNING)}
        verdict = ("ready to run", "the run would start", "the run would fail")[self.exit_code]
        return ", ".join(f"{n or 'no'} {name}{'s' * (n != 1)}" for name, n in counts.items()) + f": {verdict}"

    def to_dict(self) -> dict[str, Any]:
        """Return the object that ``--json`` prints."""
        return {
            "exit_code": self.exit_code,
            **{f"num_{severity}s": self.count(severity) for severity in Severity},
            "world": self.cluster,
            "findings": [asdict(finding) for finding in self.findings],
        }

    def page(self) -> Group:
        """Lay out findings by section in a table, then the summary."""
        table = Table(show_header=False, box=None, pad_edge=False, padding=(0, 1))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for section, findings in groupby(self.findings, key=lambda finding: finding.section):
            table.add_row(Text(section, style="bold underline"), "")
            for finding in findings:
                # Text, since rich reads square brackets in a str as markup.
                text = Text(f"{finding.field}: ", style="bold") + Text(finding.problem, style="not bold")
                if finding.fix:
                    text += Text(f"\n-> {finding.fix}", style="cyan")
                table.add_row(Text(f"  {finding.severity}", style=_STYLES[finding.severity]), text)
        return Group(table, *([Text(f"\nMeant for {self.cluster}")] if self.cluster else []), Text(self.summary))
