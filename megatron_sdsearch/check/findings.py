"""What a check has found, how bad it is, and how it is shown."""

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
    """From worst to best, which is their order on the page."""

    ERROR = "error"
    """The run would fail, or not start."""
    WARNING = "warning"
    """It would run, and most likely not do what is wanted."""
    NOTE = "note"
    """Good to know."""


_STYLES: Final = {Severity.ERROR: "bold red", Severity.WARNING: "yellow", Severity.NOTE: "dim"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was found.

    Attributes:
        severity: see ``Severity``.
        field: the setting to look at, dotted.
        problem: what is wrong, or what was found.
        fix: what to do about it; notes have none.
        section: of the check.
    """

    severity: Severity
    field: str
    problem: str
    fix: str = ""
    section: str = ""


def errors(problems: Iterable[ConfigError]) -> Iterator[Finding]:
    """What training would refuse."""
    return (Finding(Severity.ERROR, problem.field, problem.problem, problem.fix) for problem in problems)


def warning(field: str, problem: str, fix: str) -> Finding:
    """What would waste the run, wholly or in part."""
    return Finding(Severity.WARNING, field, problem, fix)


def note(field: str, problem: str) -> Finding:
    """What needs nothing done."""
    return Finding(Severity.NOTE, field, problem)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All findings of one check.

    Attributes:
        findings: section after section; in each, errors first.
        cluster: what the run was taken to be meant for, as text.
    """

    findings: Sequence[Finding]
    cluster: str = ""

    def count(self, severity: Severity) -> int:
        """Findings of that severity."""
        return sum(finding.severity is severity for finding in self.findings)

    @property
    def exit_code(self) -> int:
        """2 with an error, 1 with warnings alone, 0 with neither."""
        if self.count(Severity.ERROR):
            return 2
        return 1 if self.count(Severity.WARNING) else 0

    @property
    def summary(self) -> str:
        """One line that sums it up."""
        counts = {str(severity): self.count(severity) for severity in (Severity.ERROR, Severity.WARNING)}
        verdict = ("ready to run", "the run would start", "the run would fail")[self.exit_code]
        return ", ".join(f"{n or 'no'} {name}{'s' * (n != 1)}" for name, n in counts.items()) + f": {verdict}"

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "exit_code": self.exit_code,
            **{f"num_{severity}s": self.count(severity) for severity in Severity},
            "world": self.cluster,
            "findings": [asdict(finding) for finding in self.findings],
        }

    def page(self) -> Group:
        """A table, section after section, and the summary."""
        table = Table(show_header=False, box=None, pad_edge=False, padding=(0, 1))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for section, findings in groupby(self.findings, key=lambda finding: finding.section):
            table.add_row(Text(section, style="bold underline"), "")
            for finding in findings:
                # Text, not str: a value with square brackets must not be read as markup.
                text = Text(f"{finding.field}: ", style="bold") + Text(finding.problem, style="not bold")
                if finding.fix:
                    text += Text(f"\n-> {finding.fix}", style="cyan")
                table.add_row(Text(f"  {finding.severity}", style=_STYLES[finding.severity]), text)
        return Group(table, *([Text(f"\nMeant for {self.cluster}")] if self.cluster else []), Text(self.summary))
