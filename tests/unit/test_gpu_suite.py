"""tests/gpu, which runs on no machine of this project: it is whole, and fails rather than skips without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_pytest(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_every_gpu_test_is_collected() -> None:
    done = run_pytest("--collect-only", "tests/gpu")
    assert done.returncode == 0, done.stdout
    collected = {line.split("::")[0] for line in done.stdout.splitlines() if "::" in line}
    assert collected == {str(path.relative_to(ROOT)) for path in (ROOT / "tests/gpu").glob("test_*.py")}


def test_without_a_gpu_they_fail_in_one_clear_line() -> None:
    done = run_pytest("tests/gpu/test_training.py")
    assert done.returncode == 1
    assert "tests/gpu needs GPUs, and torch finds none: see docs/gpu-first-run.md" in done.stdout
    assert " skipped" not in done.stdout
    assert " passed" not in done.stdout
