"""The page of a run that is still going."""

from __future__ import annotations

import logging
from pathlib import Path
from types import TracebackType
from typing import Self

from megatron_sdsearch.errors import ConfigError, ContinuationError
from megatron_sdsearch.logging.metrics import METRICS_FILE
from megatron_sdsearch.report.page import PAGE_FILE, write_page

_log = logging.getLogger(__name__)


class LivePage:
    """Keeps ``run_dir/report.html`` up to date; entered around the run, it writes the last one of a run that fails.

    Never ends the run: an error in writing is one warning, of the first such error.

    Args:
        run_dir: of the run.
        is_writer: False does nothing: every rank but the first.
    """

    def __init__(self, run_dir: Path, *, is_writer: bool = True) -> None:
        self._run_dir = run_dir
        self._is_writer = is_writer
        self._has_warned = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # A start that was refused changes no page, and one that came to no number has none.
        is_refused = isinstance(error, ConfigError | ContinuationError)
        if error is not None and not is_refused and (self._run_dir / METRICS_FILE).exists():
            self._write(is_running=False)

    def write(self) -> None:
        """Write the page of a run that goes on, or has just left ``summary.json`` or ``stopped.json``."""
        self._write(is_running=True)

    def _write(self, *, is_running: bool) -> None:
        if not self._is_writer:
            return
        try:
            write_page(self._run_dir, is_running=is_running)
        except Exception as error:  # noqa: BLE001  # whatever it is, the run matters more
            if not self._has_warned:
                path = self._run_dir / PAGE_FILE
                _log.warning("%s is not up to date: %s: %s", path, type(error).__name__, error)
            self._has_warned = True
