"""Sizes that ruff has no rule for; those of functions are in [tool.ruff.lint.pylint]."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
MAX_LINES = 450


def test_no_file_is_longer_than_can_be_read_at_once() -> None:
    files = [
        file for name in ("megatron_sdsearch", "tools", "slurm", "examples") for file in (ROOT / name).rglob("*.py")
    ]
    assert len(files) > 50
    lengths = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in files}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}
