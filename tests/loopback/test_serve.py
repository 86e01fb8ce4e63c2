"""``sdsearch serve``, as a node's only program, with servers that are processes but not SGLang."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from tests.loopback.test_sglang_servers import FAKE, ROOT, model_info, wait_until

START_LIMIT_S = 120.0  # it imports torch
LOOKS_S = 3.0  # time for some looks at the folders


class Node:
    """The program, and what it leaves in a folder."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        self.folder = folder
        self.urls_file = folder / "job" / "urls.1"
        self.weights = folder / "run" / "weights"
        for name in ("corpus.jsonl", "train.jsonl", "config.json", "model.safetensors"):
            (folder / name).write_text("")
        config = {
            "run_dir": str(folder / "run"),
            "model": {"hf_dir": str(folder)},
            "data": {"train": str(folder / "train.jsonl")},
            "retrieval": {"corpus": str(folder / "corpus.jsonl")},
            "rollout": {
                "engine": "sglang",
                "sglang": {
                    "command": [sys.executable, str(FAKE)],
                    "environment": {"FAKE_STATE": str(folder), "PYTHONDONTWRITEBYTECODE": "1"},
                    "start_timeout_s": 20.0,
                },
            },
        }
        (folder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
        command = [sys.executable, "-m", "megatron_sdsearch", "serve", str(folder / "config.yaml"), *overrides]
        flags = ["--host", "127.0.0.1", "--urls-file", str(self.urls_file), "--index", "1"]
        with (folder / "output").open("ab") as stream:
            self.process = subprocess.Popen(
                [*command, *flags, "--log-dir", str(folder / "logs")],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
                stdout=stream,
                stderr=stream,
            )

    @property
    def output(self) -> str:
        return (self.folder / "output").read_text()

    @property
    def log(self) -> str:
        return (self.folder / "logs" / "server_0.log").read_text()

    @property
    def server(self) -> int:
        """The living server's process id."""
        return int((self.folder / "pid").read_text())

    def url(self) -> str:
        def is_there() -> bool:
            assert self.process.poll() is None, self.output
            return self.urls_file.exists()

        wait_until(is_there, START_LIMIT_S)
        (url,) = self.urls_file.read_text().splitlines()
        return url

    def publish(self, version: int) -> Path:
        folder = self.weights / f"v{version:06d}"
        folder.mkdir(parents=True)
        return folder

    def leftovers(self) -> list[int]:
        found = []
        for process in psutil.process_iter():
            try:
                is_ours = process.environ().get("FAKE_STATE") == str(self.folder)
            except psutil.Error:
                continue
            if is_ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        return found


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    for process in psutil.Process().children():
        process.kill()
        process.wait()


def version_of(url: str) -> str | None:
    info = model_info(url)
    return None if info is None else str(info["weight_version"])


def test_a_restarted_server_reads_what_was_published_and_nothing_is_left(folder: Path) -> None:
    (folder / "run" / "weights" / "v000009").mkdir(parents=True)  # of a run before, which went back to a checkpoint
    node = Node(folder)
    url = node.url()
    assert "--random-seed 2 " in node.log, "the second node's first server"
    newest = node.publish(4)
    time.sleep(LOOKS_S)
    assert version_of(url) == "default", "the trainer tells a living server itself"
    first = node.server
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: version_of(url) == "4", 30.0)
    assert node.server != first
    events = (folder / "events").read_text().splitlines()
    assert [event for event in events if event.startswith("loaded")] == [f"loaded {newest}"]
    node.publish(5)
    time.sleep(LOOKS_S)
    assert version_of(url) == "4"
    node.process.send_signal(signal.SIGTERM)
    assert node.process.wait(30.0) == 0, node.output
    assert not node.urls_file.exists()
    assert node.leftovers() == []


def test_usr1_ends_neither_server_nor_program(folder: Path) -> None:
    node = Node(folder)
    url = node.url()
    server = node.server
    guardian = psutil.Process(server).parent()
    for process in (node.process.pid, guardian.pid, server):
        os.kill(process, signal.SIGUSR1)
    with pytest.raises(subprocess.TimeoutExpired):
        node.process.wait(3.0)
    assert node.server == server
    assert version_of(url) == "default"
    node.process.send_signal(signal.SIGTERM)
    assert node.process.wait(30.0) == 0


def test_used_up_restarts_end_the_program_with_the_servers_message(folder: Path) -> None:
    node = Node(folder, "rollout.sglang.max_restarts=0")
    node.url()
    os.kill(node.server, signal.SIGKILL)
    assert node.process.wait(30.0) == 1
    assert "EngineError: SGLang server 0" in node.output
    assert "ended with exit code 137 (restarts: 0)" in node.output
    assert not node.urls_file.exists()
    assert node.leftovers() == []


def test_a_run_without_servers_is_a_wrong_setting(folder: Path) -> None:
    node = Node(folder, "rollout.engine=embedded")
    assert node.process.wait(START_LIMIT_S) == 2
    assert "ConfigError: rollout.engine: embedded has no servers; set rollout.engine=sglang" in node.output
