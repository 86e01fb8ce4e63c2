"""What a check has to say, and how bad it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Generic, TypeVar

from megatron_sdsearch.errors import ConfigError, SDSearchError

T = TypeVar("T")


class Severity(StrEnum):
    """From worst to best, which is their order on the page."""

    ERROR = "error"
    """The run would fail, or not start."""
    WARNING = "warning"
    """It would run, and most likely not do what is wanted."""
    NOTE = "note"
    """Good to know."""


@dataclass(frozen=True, slots=True, kw_only=True)
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

    @classmethod
    def error(cls, field: str, problem: str, fix: str) -> Finding:
        """The run would fail."""
        return cls(severity=Severity.ERROR, field=field, problem=problem, fix=fix)

    @classmethod
    def warning(cls, field: str, problem: str, fix: str) -> Finding:
        """The run would be wasted, wholly or in part."""
        return cls(severity=Severity.WARNING, field=field, problem=problem, fix=fix)

    @classmethod
    def note(cls, field: str, told: str) -> Finding:
        """Nothing to do."""
        return cls(severity=Severity.NOTE, field=field, problem=told)

    @classmethod
    def of(cls, error: SDSearchError, field: str) -> Finding:
        """What training would raise; ``field`` for errors that name none."""
        if isinstance(error, ConfigError):
            return cls.error(error.field, error.problem, error.fix)
        # Messages of this project end with their fix, after a semicolon.
        problem, _, fix = str(error).rpartition("; ")
        return cls.error(field, problem or fix, fix if problem else "see the message")


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All findings of one check.

    Attributes:
        findings: section after section; in each, errors first.
        world: what the run was taken to be meant for, in words.
    """

    findings: Sequence[Finding]
    world: str = ""

    def count(self, severity: Severity) -> int:
        """Findings of that severity."""
        return sum(finding.severity is severity for finding in self.findings)

    @property
    def exit_code(self) -> int:
        """2 with an error, 1 with warnings alone, 0 with neither."""
        if self.count(Severity.ERROR):
            return 2
        return 1 if self.count(Severity.WARNING) else 0

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "exit_code": self.exit_code,
            "num_errors": self.count(Severity.ERROR),
            "num_warnings": self.count(Severity.WARNING),
            "num_notes": self.count(Severity.NOTE),
            "world": self.world,
            "findings": [asdict(finding) for finding in self.findings],
        }


@dataclass(frozen=True, slots=True)
class Attempt(Generic[T]):
    """Something that several checks need and one of them reports: its value, or why there is none."""

    value: T | None = None
    error: SDSearchError | None = None

    @classmethod
    def at(cls, work: Callable[[], T]) -> Attempt[T]:
        """Do it."""
        try:
            return cls(value=work())
        except SDSearchError as error:
            return cls(error=error)
