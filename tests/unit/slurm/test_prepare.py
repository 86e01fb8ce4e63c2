"""What a job finds out before its GPUs are used: whether it has made progress since its last start."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from megatron_sdsearch.errors import EngineError, TrainingError
from megatron_sdsearch.sglang.servers import free_ports
from slurm.prepare import count_start


def saved(run_dir: Path, step: int) -> None:
    (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    (run_dir / "checkpoints" / "latest").write_text(f"step_{step:06d}")


def test_starts_without_progress_are_counted_up_to_a_limit(tmp_path: Path) -> None:
    assert [count_start(tmp_path, 7, restart, 2) for restart in (0, 1)] == [0, 0]
    with pytest.raises(TrainingError, match="job 7 has started 2 times at step 0"):
        count_start(tmp_path, 7, 2, 2)


def test_progress_restarts_the_count(tmp_path: Path) -> None:
    steps = [0, 0, 40, 40, 60]
    for restart, step in enumerate(steps):
        saved(tmp_path, step)
        assert count_start(tmp_path, 7, restart, 2) == step


def test_another_job_restarts_the_count(tmp_path: Path) -> None:
    for job in (7, 8, 9):
        assert count_start(tmp_path, job, 0, 1) == 0


def test_a_port_in_use_is_passed_over() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        port = taken.getsockname()[1]
        assert free_ports(1, "", range(port, port + 50)) > [port]
        with pytest.raises(EngineError, match="fewer than 1 free ports on this host"):
            free_ports(1, "", [port])
