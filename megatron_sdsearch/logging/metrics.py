"""Metrics of each step: one JSON line in ``metrics.jsonl``, and scalars for TensorBoard on request."""

from __future__ import annotations

import json
import math
import numbers
import os
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sdsearch.errors import DataError, TrainingError
from megatron_sdsearch.files import write_file, writing

METRICS_FILE = "metrics.jsonl"
Metric = float | int | str
MetricLike = Metric | np.integer[Any] | np.floating[Any]


class MetricsLog:
    """Appends to ``run_dir/metrics.jsonl``: one line per step, ``{"step": ..., name: number or text, ...}``.

    Numbers that arrive later for the step of the last line (an evaluation of the policy that the step gave) are merged
    into that line; a step before it is refused. A torn last line of a run that was killed is dropped.

    Args:
        run_dir: created where missing.
        tensorboard: also write scalars to ``run_dir/tensorboard``.
        resume_step: the step the run goes on from: lines of later steps are cut off, for they will be written again.
            0 for a run from the start.

    Raises:
        DataError: a line of an existing file is not JSON with a step; names file and line.
        StorageError: the disk is full.
    """

    def __init__(self, run_dir: Path, tensorboard: bool, resume_step: int = 0) -> None:
        with writing(run_dir):
            run_dir.mkdir(parents=True, exist_ok=True)
        self._path = run_dir / METRICS_FILE
        kept = [row for row in read_metrics(run_dir) if row["step"] <= resume_step]
        write_file(self._path, b"".join(map(_line, kept)))
        self._last: dict[str, Any] = kept[-1] if kept else {"step": -1}
        self._file = self._path.open("r+b", buffering=0)
        self._last_start = self._file.seek(0, os.SEEK_END) - (len(_line(kept[-1])) if kept else 0)
        self._board = None
        if tensorboard:
            with writing(run_dir / "tensorboard"):
                self._board = _Board(run_dir / "tensorboard", kept)

    def log(self, step: int, metrics: Mapping[str, MetricLike]) -> None:
        """Write one step's metrics and flush them.

        Args:
            step: at least that of the line before.
            metrics: numbers (numpy's too) and texts by name; what is undefined is left out, not NaN.

        Raises:
            TrainingError: a number is NaN or infinite; names all such metrics, and nothing is written.
            ValueError: the step lies before the last one.
            StorageError: the disk is full; the lines that were there are unharmed.
        """
        if step < self._last["step"]:
            raise ValueError(f"step {step} after step {self._last['step']}: metrics only go forward")
        row = {name: _plain(name, value) for name, value in metrics.items()}
        _refuse_not_finite(step, row)
        before = _line(self._last) if step == self._last["step"] else b""
        if not before:
            self._last = {"step": step}
            self._last_start = self._file.seek(0, os.SEEK_END)
        news = {name: value for name, value in row.items() if self._last.get(name) != value}
        self._last |= row
        self._rewrite_last(before, _line(self._last))
        if self._board is not None:
            with writing(self._path.parent / "tensorboard"):
                self._board.add(step, news)  # a resumed run evaluates once more what it may have logged already

    def _rewrite_last(self, before: bytes, line: bytes) -> None:
        with writing(self._path, len(line)):
            try:
                self._put(line)
            except OSError:
                with suppress(OSError):
                    self._put(before)  # there was room for it
                raise

    def _put(self, line: bytes) -> None:
        self._file.seek(self._last_start)
        rest = memoryview(line)
        while rest:
            rest = rest[self._file.write(rest) :]  # less than all of it where the disk becomes full
        self._file.truncate()
        os.fsync(self._file.fileno())  # a checkpoint must not know of a step that its metrics have forgotten

    def close(self) -> None:
        """Close the files. Called once."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All whole lines of a run's metrics in order; none where there is no file.

    A torn last line is dropped, with its end or without: that line is written over when numbers join it, and then the
    old one's end stays behind what a killed run had written.

    Raises:
        DataError: a line is not JSON with a step; names file and line.
    """
    path = run_dir / METRICS_FILE
    if not path.exists():
        return []
    *lines, torn = path.read_text(encoding="utf-8", errors="replace").split("\n")
    if lines and not torn and not _is_json(lines[-1]):
        lines.pop()
    return [_parse(line, path, number) for number, line in enumerate(lines, start=1)]


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except json.JSONDecodeError:
        return False
    return True


def _parse(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{number}: not JSON ({error.msg}); fix or remove the line") from error
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise DataError(f"{path}:{number}: no step in this line; fix or remove it")
    return row


def _line(row: Mapping[str, Any]) -> bytes:
    return (json.dumps(row, allow_nan=False) + "\n").encode()


def _plain(name: str, value: object) -> Metric:
    if isinstance(value, str):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    raise TypeError(f"metric {name} is a {type(value).__name__}, not a number or a text")


def _refuse_not_finite(step: int, row: Mapping[str, Metric]) -> None:
    bad = [f"{name} is {value}" for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
    if bad:
        raise TrainingError(f"step {step}: {', '.join(bad)}; such a step must not be learned from or logged")


class _Board:
    """TensorBoard's event file through the tensorboard package alone.

    What an earlier process of the run wrote is written again, as far as ``kept`` goes: its files may end in a torn
    record, hold steps that are taken back, or know a step twice. Times of the steps are carried over.
    """

    def __init__(self, log_dir: Path, kept: Sequence[Mapping[str, Any]]) -> None:
        # Imported late: it costs a second, and runs without TensorBoard need none of it.
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        old = sorted(log_dir.glob("events.out.tfevents.*"))
        times = _times(old)
        log_dir.mkdir(parents=True, exist_ok=True)
        now = time.time_ns()
        name = f"events.out.tfevents.{now // 10**9}.{socket.gethostname()}.{os.getpid()}.0.{now}"
        # tensorboard's EventFileWriter writes in a thread, which leaves a full disk to threading's own traceback.
        self._file = (log_dir / name).open("wb")
        self._records = RecordWriter(self._file)
        self._event = Event
        self._records.write(Event(wall_time=now / 1e9, file_version="brain.Event:2").SerializeToString())
        for row in kept:
            values = {name: value for name, value in row.items() if name != "step"}
            self._write(row["step"], values, times.get(row["step"], time.time()))
        self._file.flush()
        for path in old:
            path.unlink()

    def add(self, step: int, row: Mapping[str, Metric]) -> None:
        self._write(step, row, time.time())
        self._file.flush()

    def _write(self, step: int, row: Mapping[str, Metric], wall_time: float) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [
            Summary.Value(tag=name, simple_value=value) for name, value in row.items() if not isinstance(value, str)
        ]
        event = self._event(wall_time=wall_time, step=step, summary=Summary(value=values))
        self._records.write(event.SerializeToString())

    def close(self) -> None:
        with suppress(OSError):  # all was flushed, but for what a full disk has refused, which was said
            self._file.close()


def _times(event_files: Sequence[Path]) -> dict[int, float]:
    """When the steps in older event files were written, in seconds; a torn end is passed over."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    times: dict[int, float] = {}
    for path in event_files:
        for event in LegacyEventFileLoader(str(path)).Load():
            if event.HasField("summary"):
                times.setdefault(event.step, event.wall_time)
    return times
