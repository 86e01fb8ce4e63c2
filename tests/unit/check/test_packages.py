"""Installed versions against those that the package's own metadata asks for."""

from __future__ import annotations

import pytest

from megatron_sdsearch.check import packages
from tests.unit.check.tiny_run import TinyRun, only

ELASTIC = ("retrieval.engine=elasticsearch",)


def test_what_is_installed_here_fits(tiny: TinyRun) -> None:
    assert "packages: Python 3." in tiny.notes()
    assert "megatron-core" in tiny.notes()


@pytest.mark.parametrize(
    ("wanted", "words"),
    [("torch>=999", "is not in >=999"), ("nobody-wrote-this", "nobody-wrote-this is not installed")],
)
def test_a_package_that_does_not_fit_is_found(
    tiny: TinyRun, monkeypatch: pytest.MonkeyPatch, wanted: str, words: str
) -> None:
    monkeypatch.setattr(packages, "requires", lambda name: [wanted])
    finding = only(tiny.found())
    assert (finding.severity, finding.field) == ("error", "packages")
    assert words in finding.problem
    assert finding.fix.startswith("pip install")


def test_extras_count_where_they_are_used(tiny: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "requires", lambda name: ['nobody-wrote-this; extra == "elasticsearch"'])
    assert tiny.found() == []
    assert only(tiny.found(*ELASTIC)).problem == "nobody-wrote-this is not installed"
