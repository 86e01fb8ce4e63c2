"""Two real SGLang servers on the CPU, started by the supervisor, and tiny random models for them.

Nothing here skips: servers that do not start are an error of every test, with the end of their log in the message. The
environment comes from `make test-sglang`.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from megatron_sdsearch.config import parse_config
from megatron_sdsearch.errors import EngineError
from megatron_sdsearch.sglang.api import SGLangServer
from megatron_sdsearch.sglang.servers import ServerSupervisor
from tests.unit.conftest import train_tokenizer

ROOT = Path(__file__).parents[3]
PROMPTS = [[5, 9, 33, 60, 7], [300, 4, 81], list(range(40, 120))]
NUM_NEW = 24
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
        """All that live, guardians included."""
        ports = {url.rsplit(":", 1)[1] for url in self.urls}
        own = psutil.Process().children()
        guardians = [p for p in own if ports & {word for c in p.children() for word in c.cmdline()}]
        members = [p for guardian in guardians for p in (guardian, *guardian.children(recursive=True))]
        return [p for p in members if p.status() != psutil.STATUS_ZOMBIE]

    def segments(self) -> set[Path]:
        """Files in shared memory that they have mapped now."""
        return segments_of(self.processes())


def segments_of(processes: Sequence[psutil.Process]) -> set[Path]:
    """Files in shared memory that are mapped now, under whatever name: a semaphore is mapped without its own."""
    inodes = set()
    for process in processes:
        try:
            lines = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
        except OSError:  # it ended meanwhile
            continue
        inodes |= {int(line.split()[4]) for line in lines if " /dev/shm/" in line}
    return {path for path in Path("/dev/shm").iterdir() if path.stat().st_ino in inodes}


def tiny_config(vocab_size: int, *, is_tied: bool = True) -> Qwen2Config:
    """2 layers, grouped queries; sharp enough that greedy choices are no ties; 4 MiB: some of the smallest buckets."""
    return Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,  # room for a generation of some seconds
        tie_word_embeddings=is_tied,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )


def save_models(folder: Path, *, is_tied: bool) -> tuple[Path, Path]:
    """Two folders of one architecture with different random weights, and a tokenizer in each."""
    tokenizer = train_tokenizer()
    # More rows than tokens, as real embeddings have, and no multiple of the 64 to which SGLang pads.
    config = tiny_config(len(tokenizer) + 8, is_tied=is_tied)
    assert config.vocab_size % 64
    folders = folder / "first", folder / "second"
    for seed, target in enumerate(folders):
        torch.manual_seed(seed)
        Qwen2ForCausalLM(config).save_pretrained(target)
        tokenizer.save_pretrained(target)
    return folders


@contextmanager
def serving(model: Path, log_dir: Path, num_servers: int) -> Iterator[Servers]:
    """Servers that start from a model; at the end nothing of them may be left."""
    config = parse_config(
        {
            "run_dir": str(log_dir / "run"),
            "model": {"hf_dir": str(model), "dtype": "float32"},
            "data": {"train": "none"},
            "retrieval": {"corpus": "none"},
            "rollout": {
                "engine": "sglang",
                "max_total_tokens": 4000,  # the model has 4096 positions
                "sglang": {"num_servers": num_servers, "command": list(COMMAND), "start_timeout_s": 400.0},
            },
        }
    )
    supervisor = ServerSupervisor(config, log_dir=log_dir)
    servers = Servers(supervisor)
    supervisor.start()
    try:
        yield servers
        processes, segments = servers.processes(), servers.segments()
    finally:
        supervisor.close()
    assert len(processes) >= 4 * num_servers  # guardian, main process, scheduler, detokenizer
    assert len(segments) >= 2 * num_servers  # its load snapshot, a semaphore
    assert [process for process in processes if process.is_running()] == []
    assert [segment for segment in segments if segment.exists()] == []


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """With tied embeddings."""
    return save_models(tmp_path_factory.mktemp("tied"), is_tied=True)


@pytest.fixture(scope="session")
def untied_models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """With an output layer of their own."""
    return save_models(tmp_path_factory.mktemp("untied"), is_tied=False)


@pytest.fixture(scope="session")
def servers(models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """Two servers that start from the first tied model."""
    with serving(models[0], tmp_path_factory.mktemp("logs"), 2) as servers:
        yield servers


@pytest.fixture(scope="session")
def untied_servers(untied_models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """One, for a running server takes no other architecture. Its supervisor gets no weights, and reloads none."""
    with serving(untied_models[0], tmp_path_factory.mktemp("logs"), 1) as servers:
        yield servers


def weight_version(url: str) -> str | None:
    try:
        return str(asyncio.run(SGLangServer(url, timeout_s=5.0).call("/model_info"))["weight_version"])
    except EngineError:
        return None


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


def generate(url: str, prompts: list[list[int]], temperature: float) -> list[tuple[list[int], list[float]]]:
    """Sampled ids and their log-probabilities, for each prompt."""
    params = {"temperature": temperature, "max_new_tokens": NUM_NEW, "ignore_eos": True}
    answers = post(url + "/generate", {"input_ids": prompts, "sampling_params": params, "return_logprob": True})
    triples = [answer["meta_info"]["output_token_logprobs"] for answer in answers]
    return [([t[1] for t in each], [t[0] for t in each]) for each in triples]


def assert_equals_transformers(url: str, folder: Path, temperature: float) -> None:
    """Greedy ids are the reference's argmax at each place, and log-probabilities agree to 1e-4."""
    for prompt, (ids, logprobs) in zip(PROMPTS, generate(url, PROMPTS, temperature), strict=True):
        assert len(ids) == NUM_NEW
        reference = reference_logprobs(folder, prompt + ids[:-1], temperature or 1.0)[len(prompt) - 1 :]
        if temperature == 0:
            assert ids == reference.argmax(-1).tolist()
        expected = reference.gather(-1, torch.tensor(ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(logprobs), expected, atol=1e-4, rtol=0)
