"""How far a run has come and whether it still goes, from what its folder holds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from megatron_sdsearch.errors import DataError
from megatron_sdsearch.logging.metrics import METRICS_FILE
from megatron_sdsearch.logging.summary import SUMMARY_FILE
from megatron_sdsearch.training.run_lock import live_run
from megatron_sdsearch.training.stop_request import STOPPED_FILE


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """State of a run.

    Attributes:
        kind: ``failed`` stands for every end that left neither a summary nor word of a stop: SIGKILL, too.
        text: one sentence with the last step.
        last_numbers: local time of the last metrics.
    """

    kind: Literal["running", "stopped", "finished", "failed"]
    text: str
    last_numbers: datetime


def run_state(run_dir: Path, last_step: int, *, is_running: bool = False) -> RunState:
    """State of the run in ``run_dir``.

    Args:
        run_dir: holds ``metrics.jsonl``.
        last_step: of the metrics; 0 before the first step is done.
        is_running: True when the run itself asks, on a file system whose locks tell nothing.

    Raises:
        DataError: ``stopped.json`` is malformed.
    """
    time = datetime.fromtimestamp((run_dir / METRICS_FILE).stat().st_mtime).astimezone()
    after = f"after step {last_step}" if last_step else "before the first step was done"
    if (run_dir / SUMMARY_FILE).exists():
        return RunState(kind="finished", text=f"Finished {after}.", last_numbers=time)
    stopped = read_object(run_dir / STOPPED_FILE)
    if stopped:
        by = stopped.get("signal", "a signal")
        saved = " and saved: the same command goes on from there" if stopped.get("step") else ", with nothing to save"
        text = f"Stopped {after} ({by}){saved}."
        return RunState(kind="stopped", text=text, last_numbers=time)
    if is_running or live_run(run_dir) is not None:
        done = f"step {last_step} is done" if last_step else "no step is done yet"
        return RunState(kind="running", text=f"Running: {done}.", last_numbers=time)
    text = f"Failed or was killed {after}: the same command goes on from the newest checkpoint."
    return RunState(kind="failed", text=text, last_numbers=time)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file that a run wrote; empty where there is no file.

    Raises:
        DataError: it is not JSON, or no object.
    """
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: not a mapping of names to values")
    return content
