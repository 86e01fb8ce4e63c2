from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sdsearch.errors import ConfigError
from megatron_sdsearch.training.run_lock import LOCK_FILE, lock_run_dir

HOLD = """
import sys, subprocess, time
from pathlib import Path
from megatron_sdsearch.training.run_lock import lock_run_dir
with lock_run_dir(Path(sys.argv[1])):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    print(child.pid, flush=True)
    time.sleep(60)
"""


def test_a_second_holder_is_told_who_the_first_is_and_does_it_no_harm(tmp_path: Path) -> None:
    run_dir = tmp_path / "new" / "run"
    with lock_run_dir(run_dir):
        before = (run_dir / LOCK_FILE).read_bytes()
        reason = (
            rf"run_dir: {re.escape(str(run_dir))} is in use by process {os.getpid()} on {socket.gethostname()}, since"
        )
        for _ in range(2):
            with pytest.raises(ConfigError, match=reason), lock_run_dir(run_dir):
                pytest.fail("both hold it")
        assert (run_dir / LOCK_FILE).read_bytes() == before
    with lock_run_dir(run_dir):
        assert json.loads((run_dir / LOCK_FILE).read_text())["pid"] == os.getpid()


def test_it_is_given_back_when_the_run_fails(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="training"), lock_run_dir(tmp_path):
        raise RuntimeError("training")
    with lock_run_dir(tmp_path):
        pass


@pytest.mark.parametrize("content", ["", '{"pid": 3', "[]"])
def test_a_holder_that_has_not_said_who_it_is_holds_it_all_the_same(tmp_path: Path, content: str) -> None:
    with lock_run_dir(tmp_path):
        (tmp_path / LOCK_FILE).write_text(content)
        with pytest.raises(ConfigError, match="is in use by another process; wait"), lock_run_dir(tmp_path):
            pytest.fail("both hold it")


def test_a_killed_process_gives_it_back_though_its_child_lives_on(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    try:
        with pytest.raises(ConfigError, match=f"is in use by process {holder.pid} on"), lock_run_dir(tmp_path):
            pytest.fail("both hold it")
        holder.kill()
        holder.wait(10)
        os.kill(child, 0)  # still there
        with lock_run_dir(tmp_path):
            pass
    finally:
        holder.kill()
        holder.wait(10)
        holder.stdout.close()
        os.kill(child, signal.SIGKILL)


def test_a_file_system_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with lock_run_dir(tmp_path):
        assert "No locks available): nothing prevents a second run" in caplog.text
