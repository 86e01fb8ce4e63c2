"""Write one self-contained page about a run: headline numbers, curves, and a few groups to read.

Reads only the run's files (``metrics.jsonl``, ``summary.json``, ``stopped.json``, ``trajectories/``), finished or not.
The page has no scripts and loads nothing from the network; all text of models and passages is escaped.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from megatron_sdsearch.config import flatten
from megatron_sdsearch.errors import ConfigError, ContinuationError, DataError
from megatron_sdsearch.files import write_file
from megatron_sdsearch.logging import idle_step_warnings
from megatron_sdsearch.logging.metrics import METRICS_FILE, read_metrics
from megatron_sdsearch.logging.summary import SUMMARY_FILE, short
from megatron_sdsearch.report import figures
from megatron_sdsearch.report.examples import pick_examples, text_pieces
from megatron_sdsearch.report.figures import make_charts, make_tiles, metric_table
from megatron_sdsearch.training.run_lock import live_run
from megatron_sdsearch.training.stop_request import STOPPED_FILE

PAGE_FILE = "report.html"
_log = logging.getLogger(__name__)


def write_page(run_dir: Path, out: Path | None = None, *, is_running: bool = False) -> Path:
    """Write the page of a running, stopped, failed or finished run, atomically replacing an older one.

    Args:
        run_dir: of the run.
        out: the page's file; ``run_dir/report.html`` by default.
        is_running: True when called by the run itself, since some file systems have no locks.

    Returns:
        The page's path.

    Raises:
        DataError: not a run's folder, or one of its files is malformed; names it.
        StorageError: the page cannot be written.
    """
    path = run_dir / PAGE_FILE if out is None else out
    if not (run_dir / METRICS_FILE).exists():
        raise DataError(f"{run_dir / METRICS_FILE} does not exist; give the folder of a run (its run_dir)")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"short": short, "pieces": text_pieces}
    rows = read_metrics(run_dir)
    html = environment.get_template("page.html.j2").render(
        title=run_dir.resolve().name,
        state=_read_state(run_dir, rows[-1]["step"] if rows else 0, is_running=is_running),
        last_numbers=datetime.fromtimestamp((run_dir / METRICS_FILE).stat().st_mtime).astimezone(),
        now=datetime.now().astimezone(),
        warnings=idle_step_warnings(rows),
        tiles=make_tiles(rows),
        charts=make_charts(rows),
        frame=figures,
        summary=flatten(_read_object(run_dir / SUMMARY_FILE)),
        metrics=metric_table(rows),
        examples=pick_examples(run_dir),
    )
    write_file(path, html, is_shared=True)
    return path


def _read_state(run_dir: Path, last_step: int, *, is_running: bool) -> tuple[str, str]:
    """Derive a run's state from its folder: running, stopped, finished or failed, and a sentence about it.

    ``failed`` covers every end without a summary and without ``stopped.json``, including SIGKILL.
    """
    after = f"after step {last_step}" if last_step else "before the first step was done"
    if (run_dir / SUMMARY_FILE).exists():
        return "finished", f"Finished {after}."
    if stopped := _read_object(run_dir / STOPPED_FILE):
        by = stopped.get("signal", "a signal")
        saved = " and saved: the same command continues from there" if stopped.get("step") else ", with nothing to save"
        return "stopped", f"Stopped {after} ({by}){saved}."
    if is_running or live_run(run_dir) is not None:
        done = f"step {last_step} is done" if last_step else "no step is done yet"
        return "running", f"Running: {done}."
    return "failed", f"Failed or was killed {after}: the same command continues from the newest checkpoint."


def _read_object(path: Path) -> dict[str, Any]:
    """Read a run's JSON object; empty if there is no file."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: not a mapping of names to values")
    return content


@contextmanager
def live_page(run_dir: Path, *, is_writer: bool = True) -> Iterator[Callable[[], None]]:
    """Yield a function that updates ``run_dir/report.html``, and write the last page of a run that fails.

    Call the function while the run continues, or after it has written ``summary.json`` or ``stopped.json``. It never
    ends the run: the first error is logged as a warning, later ones are ignored.

    Args:
        run_dir: of the run.
        is_writer: True on the main rank, which alone writes.
    """
    has_warned = False

    def refresh(*, is_running: bool = True) -> None:
        nonlocal has_warned
        try:
            if is_writer:
                write_page(run_dir, is_running=is_running)
        except Exception as error:  # noqa: BLE001  # the page must not end the run
            if not has_warned:
                path = run_dir / PAGE_FILE
                _log.warning("%s is not up to date: %s: %s", path, type(error).__name__, error)
            has_warned = True

    try:
        yield refresh
    except (ConfigError, ContinuationError):
        raise  # a refused start leaves the page alone
    except BaseException:
        if (run_dir / METRICS_FILE).exists():
            refresh(is_running=False)
        raise
