"""Metrics of each step: one JSON line in ``metrics.jsonl``, and scalars for TensorBoard on request."""

from __future__ import annotations

import json
import math
import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sdsearch.errors import DataError, TrainingError
from megatron_sdsearch.files import write_file, writing

METRICS_FILE = "metrics.jsonl"
Metric = float | int | str
MetricLike = Metric | np.integer[Any] | np.floating[Any]
Row = dict[str, Any]


class MetricsLog:
    """Appends to ``run_dir/metrics.jsonl``: one line per step, ``{"step": ..., name: number or text, ...}``.

    Metrics that arrive later for the step of the last line (an evaluation of the policy after that step) are merged
    into that line; an earlier step is refused. A torn last line, left by a killed run, is dropped.

    Args:
        run_dir: created where missing.
        tensorboard: also write scalars to ``run_dir/tensorboard``.
        resume_step: the step that the run continues from, 0 for a new run. Lines of later steps are removed, since they
            will be written again.

    Attributes:
        rows: the file's lines, by step.

    Raises:
        DataError: a line of an existing file is not JSON with a step; names file and line.
        StorageError: the disk is full.
    """

    def __init__(self, run_dir: Path, tensorboard: bool, resume_step: int = 0) -> None:
        with writing(run_dir):
            run_dir.mkdir(parents=True, exist_ok=True)
        self._path = run_dir / METRICS_FILE
        self.rows = [row for row in read_metrics(run_dir) if row["step"] <= resume_step]
        write_file(self._path, b"".join(map(_json_line, self.rows)))
        self._file = self._path.open("r+b", buffering=0)
        self._last_start = self._path.stat().st_size - (len(_json_line(self.rows[-1])) if self.rows else 0)
        self._events: _EventFile | None = None
        if tensorboard:
            with writing(run_dir / "tensorboard"):
                self._events = _EventFile(run_dir / "tensorboard", purge_step=resume_step)
            if self.rows and self.rows[-1]["step"] == resume_step:
                self._add_scalars(resume_step, self.rows[-1])  # the purge hides it together with the later steps

    def log(self, step: int, metrics: Mapping[str, MetricLike]) -> None:
        """Write one step's metrics and flush them.

        Args:
            step: at least the last line's.
            metrics: numbers (also numpy's) and texts by name; leave out undefined ones instead of passing NaN.

        Raises:
            TrainingError: a number is NaN or infinite; names all such metrics, and nothing is written.
            ValueError: the step is before the last one.
            StorageError: the disk is full; earlier lines are unharmed.
        """
        last = self.rows[-1] if self.rows else {"step": -1}
        if step < last["step"]:
            raise ValueError(f"step {step} after step {last['step']}: metrics only go forward")
        values = _checked(step, metrics)
        if step > last["step"]:
            last, before = {"step": step}, b""
            self._last_start = self._file.seek(0, os.SEEK_END)
            self.rows.append(last)
        else:
            before = _json_line(last)
        new_values = {name: value for name, value in values.items() if last.get(name) != value}
        last |= values
        line = _json_line(last)
        with writing(self._path, len(line)):
            try:
                self._replace_last_line(line)
            except OSError:
                with suppress(OSError):
                    self._replace_last_line(before)  # it fitted before
                raise
        self._add_scalars(step, new_values)  # a resumed run repeats the evaluation of its first step

    def _add_scalars(self, step: int, values: Mapping[str, Any]) -> None:
        scalars = [
            {"tag": name, "simple_value": value}
            for name, value in values.items()
            if name != "step" and not isinstance(value, str)
        ]
        if self._events is not None:
            with writing(self._path.parent / "tensorboard"):
                self._events.add(step=step, summary={"value": scalars})

    def _replace_last_line(self, line: bytes) -> None:
        self._file.seek(self._last_start)
        remainder = memoryview(line)
        while remainder:
            remainder = remainder[self._file.write(remainder) :]  # a short write when the disk becomes full
        self._file.truncate()
        os.fsync(self._file.fileno())  # a checkpoint must not be ahead of the metrics

    def close(self) -> None:
        """Close the files. Called once."""
        self._file.close()
        if self._events is not None:
            self._events.close()


class _EventFile:
    """TensorBoard event file that makes readers hide ``purge_step`` and later steps of earlier files.

    torch's SummaryWriter does the same, but from a thread that prints a traceback when the disk is full.
    """

    def __init__(self, folder: Path, purge_step: int) -> None:
        # Imported late: it takes a second, which runs without TensorBoard save.
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._records = RecordWriter((folder / name).open("wb"))
        self._event_type = Event
        self.add(file_version="brain.Event:2")
        self.add(step=purge_step, session_log={"status": "START"})

    def add(self, **fields: Any) -> None:
        self._records.write(self._event_type(wall_time=time.time(), **fields).SerializeToString())
        self._records.flush()

    def close(self) -> None:
        with suppress(OSError):  # only what a full disk refused is not flushed, and that was reported
            self._records.close()


def read_metrics(run_dir: Path) -> list[Row]:
    """Read all whole lines of a run's metrics; none if there is no file.

    A torn last line is dropped, with or without a line end: a run killed while it rewrites its last line leaves the end
    of the old one after the beginning of the new one.

    Raises:
        DataError: a line is not JSON with a step; names file and line.
    """
    path = run_dir / METRICS_FILE
    if not path.exists():
        return []
    *lines, torn = path.read_text(encoding="utf-8", errors="replace").split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines) and not torn:
                break
            raise DataError(f"{path}:{number}: not JSON ({error.msg}); fix or remove the line") from error
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise DataError(f"{path}:{number}: no step in this line; fix or remove it")
        rows.append(row)
    return rows


def _json_line(row: Mapping[str, Any]) -> bytes:
    return (json.dumps(row, allow_nan=False) + "\n").encode()


def _checked(step: int, metrics: Mapping[str, MetricLike]) -> dict[str, Metric]:
    """Convert metrics to Python's numbers and texts."""
    values = {name: value.item() if isinstance(value, np.generic) else value for name, value in metrics.items()}
    for name, value in values.items():
        if not isinstance(value, Metric):
            raise TypeError(f"metric {name} is a {type(value).__name__}, not a number or a text")
    bad = [
        f"{name} is {value}"
        for name, value in values.items()
        if not isinstance(value, str) and not math.isfinite(value)
    ]
    if bad:
        raise TrainingError(f"step {step}: {', '.join(bad)}; such a step must not be trained on or logged")
    return values
