"""A run's summary as a person reads it: flat names, short numbers, one table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from rich.table import Table
from rich.text import Text

from megatron_sdsearch.config import flatten

SUMMARY_FILE: Final = "summary.json"
"""In ``run_dir``; only a finished run has it."""


def final_table(summary: Mapping[str, Any]) -> Table:
    """A two-column table of everything in ``summary``; nested mappings get dotted names."""
    table = Table(title="Summary", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for name, value in flatten(summary).items():
        # Text, not str: a value with square brackets must not be read as markup.
        table.add_row(Text(name), Text(short(value)))
    return table


def short(value: object) -> str:
    """A number with four significant digits, anything else as text; ``None`` is a dash."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)
