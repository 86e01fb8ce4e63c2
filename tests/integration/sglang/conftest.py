"""Two real SGLang servers on the CPU, started by the supervisor, and tiny random models for them.

Nothing here skips: servers that do not start are an error of every test, with the end of their log in the message. The
environment comes from `make test-sglang`.
"""

from __future__ import annotations

import itertools
import json
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from megatron_sdsearch.config import SGLangConfig
from megatron_sdsearch.rollout.server_process import read_model_info
from megatron_sdsearch.rollout.sglang_servers import ServerSupervisor
from megatron_sdsearch.rollout.supervised_server import Patience
from tests.unit.conftest import train_tokenizer

ROOT = Path(__file__).parents[3]
COMMAND = (str(ROOT / ".sglang/venv/bin/python"), str(ROOT / "tools/sglang_cpu/launch.py"))


class Servers:
    """The servers of this session.

    Attributes:
        supervisor: has started them.
    """

    def __init__(self, supervisor: ServerSupervisor) -> None:
        self.supervisor = supervisor
        self._versions = itertools.count(1)

    @property
    def urls(self) -> tuple[str, ...]:
        return self.supervisor.urls

    def next_version(self) -> int:
        """Every test that publishes takes its version from here: the supervisor reloads whatever is older."""
        return next(self._versions)

    def load(self, folder: Path) -> int:
        """Let the supervisor bring all servers to a folder's weights; return their version."""
        version = self.next_version()
        self.supervisor.set_weights(folder, version)
        wait_until(lambda: all(weight_version(url) == str(version) for url in self.urls), 120.0, self.supervisor)
        return version

    def main_process(self, url: str) -> psutil.Process:
        """The one that answers HTTP."""
        port = url.rsplit(":", 1)[1]
        return next(p for p in self.processes() if p.cmdline()[1:2] == [COMMAND[1]] and port in p.cmdline())

    def processes(self) -> list[psutil.Process]:
        """All that live, guardians included: whatever this process has started."""
        return [p for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]

    def segments(self) -> set[Path]:
        """Files in shared memory that they have mapped now, under whatever name."""
        lines = [line for p in self.processes() for line in Path(f"/proc/{p.pid}/maps").read_text().splitlines()]
        inodes = {int(line.split()[4]) for line in lines if " /dev/shm/" in line}
        return {path for path in Path("/dev/shm").iterdir() if path.stat().st_ino in inodes}


def tiny_config(vocab_size: int) -> Qwen2Config:
    """2 layers, grouped queries, tied embeddings; sharp enough that greedy choices are not ties."""
    return Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two folders of one architecture with different random weights, and a tokenizer in each."""
    tokenizer = train_tokenizer()
    folders = []
    for seed in (0, 1):
        folder = tmp_path_factory.mktemp(f"model_{seed}")
        torch.manual_seed(seed)
        Qwen2ForCausalLM(tiny_config(len(tokenizer) + 8)).save_pretrained(folder)  # padded, as real embeddings are
        tokenizer.save_pretrained(folder)
        folders.append(folder)
    return folders[0], folders[1]


@pytest.fixture(scope="session")
def servers(models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """Two servers that start from the first model; at the end nothing of them may be left."""
    config = SGLangConfig(num_servers=2, command=COMMAND, start_timeout_s=400.0)
    supervisor = ServerSupervisor(
        config, model_path=models[0], log_dir=tmp_path_factory.mktemp("logs"), patience=Patience(poll_s=0.2)
    )
    servers = Servers(supervisor)
    supervisor.start()
    try:
        yield servers
        processes, segments = servers.processes(), servers.segments()
    finally:
        supervisor.close()
    assert len(processes) >= 8  # of each server: guardian, main process, scheduler, detokenizer
    assert len(segments) >= 4  # of each server: its load snapshot, a semaphore
    assert [process for process in processes if process.is_running()] == []
    assert [segment for segment in segments if segment.exists()] == []


def weight_version(url: str) -> str | None:
    info = read_model_info(url, 5.0)
    return None if info is None else str(info["weight_version"])


def wait_until(is_reached: Callable[[], bool], limit_s: float, supervisor: ServerSupervisor) -> None:
    deadline = time.monotonic() + limit_s
    while not is_reached():
        supervisor.check()
        assert time.monotonic() < deadline, f"not reached within {limit_s} s"
        time.sleep(0.1)


def post(url: str, body: dict[str, Any], *, timeout_s: float = 120.0) -> Any:
    """The JSON answer to a JSON request."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=timeout_s) as response:
        return json.load(response)


def reference_logprobs(folder: Path, token_ids: list[int], temperature: float) -> torch.Tensor:
    """transformers' log-probabilities of each next token, nats, [L, V]."""
    model = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([token_ids])).logits[0]
    return torch.log_softmax(logits / temperature, dim=-1)
