"""All sections of a check in turn, none of which depends on another's outcome."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_sdsearch.check import (
    batch,
    data,
    layout,
    lengths,
    memory,
    model_folder,
    objective,
    packages,
    retrieval,
    sglang,
    storage,
)
from megatron_sdsearch.check.configuration import read_all
from megatron_sdsearch.check.findings import Finding, Report, Severity
from megatron_sdsearch.check.subject import Subject
from megatron_sdsearch.check.world import GivenWorld, World

Section = Callable[[Subject], Iterable[Finding]]

# In the order of the page. A further check is one more line; what it finds needs nothing but a Subject.
SECTIONS: dict[str, Section] = {
    "data": data.check,
    "model": model_folder.check,
    "layout": layout.check,
    "memory": memory.check,
    "batch": batch.check,
    "lengths": lengths.check,
    "objective": objective.check,
    "storage": storage.check,
    "retrieval": retrieval.check,
    "sglang": sglang.check,
    "packages": packages.check,
}


def run_checks(
    path: Path, overrides: Sequence[str] = (), *, given: GivenWorld | None = None, is_online: bool = False
) -> Report:
    """Look at a configuration, the files that it names, and the machine.

    Args:
        path: the YAML file.
        overrides: as of ``train``.
        given: what is known of the world that it is meant for.
        is_online: ask servers, too.

    Returns:
        Everything that was found; a mistake never ends the check, but for YAML that cannot be read.
    """
    config, problems = read_all(path, overrides)
    found = [Finding.of(problem, problem.field) for problem in problems]
    if config is None:
        return Report(findings=_of_section("configuration", found))
    found += [Finding.of(error, error.field) for error in config.file_problems()]
    findings = _of_section("configuration", found)
    subject = Subject(config, World.of(config, given or GivenWorld()), is_online=is_online)
    refused = {problem.field for problem in problems}
    for name, section in SECTIONS.items():
        # A default stands in a refused value's place: what is found out about that one means nothing.
        findings += _of_section(name, (finding for finding in section(subject) if finding.field not in refused))
    return Report(findings=findings, world=subject.world.words)


def _of_section(name: str, findings: Iterable[Finding]) -> list[Finding]:
    return sorted(_named(name, findings), key=lambda finding: list(Severity).index(finding.severity))


def _named(name: str, findings: Iterable[Finding]) -> Iterator[Finding]:
    for finding in findings:
        yield replace(finding, section=name)
