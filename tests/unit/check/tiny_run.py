"""A tiny run that is in order, on real files; each test breaks one thing of it and sees that found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import Qwen2Config, Qwen2ForCausalLM

from megatron_sdsearch.check.findings import Finding, Report, Severity
from megatron_sdsearch.check.run import run_checks
from megatron_sdsearch.check.run_under_test import ClusterOptions
from tests.unit.conftest import train_tokenizer

CITIES = ("Lisbon", "Oslo", "Rome", "Paris", "Bern", "Riga", "Kiev", "Minsk", "Doha", "Lima")


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def question(name: str, text: str, *answers: str) -> dict[str, Any]:
    return {"question_id": name, "text": text, "gold_answers": list(answers)}


class TinyRun:
    """Files and a configuration in one folder.

    Attributes:
        folder: of everything.
        model: its Hugging Face folder.
        config: the YAML file.
    """

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.model = folder / "model"
        shutil.copytree(model, self.model)
        self.train = write_rows(
            folder / "train.jsonl", (question(f"t{i}", f"where is {c}?", c) for i, c in enumerate(CITIES))
        )
        self.heldout = write_rows(
            folder / "heldout.jsonl", (question(f"h{i}", f"what is {c}?", c) for i, c in enumerate(CITIES[:4]))
        )
        passages = ({"id": f"p{i}", "contents": f'"{c}"\n{c} is a city.'} for i, c in enumerate(CITIES))
        self.corpus = write_rows(folder / "corpus.jsonl", passages)
        spans = [{"kind": "sampled", "text": "<answer> Lisbon </answer>"}]
        lessons = ({"demonstration_id": f"d{i}", "prompt": "where?", "spans": spans} for i in range(8))
        self.demonstrations = write_rows(folder / "demonstrations.jsonl", lessons)
        self.config = folder / "config.yaml"
        self.config.write_text(yaml.safe_dump(self._settings()))

    def _settings(self) -> dict[str, Any]:
        return {
            "run_dir": str(self.folder / "run"),
            "model": {"hf_dir": str(self.model)},
            "data": {
                "train": str(self.train),
                "heldout": str(self.heldout),
                "prompt_profile": "plain",
                "questions_per_step": 4,
            },
            "rollout": {
                "group_size": 2,
                "max_turns": 1,
                "max_prompt_tokens": 80,
                "max_response_tokens": 32,
                "max_observation_tokens": 128,
                "max_total_tokens": 300,
            },
            "retrieval": {"corpus": str(self.corpus), "top_k": 2},
            "hindsight": {"max_block_tokens": 128},
            "objective": {"alpha": 0.1, "alpha_warmup_steps": 1, "reward": "f1"},
            "train": {"num_steps": 4, "trajectories_per_minibatch": None, "max_tokens_per_microbatch": 1024},
            "evaluation": {"every": 2},
            "checkpoint": {"every": 2},
        }

    def check(self, *overrides: str, is_online: bool = False, **options: Any) -> Report:
        """On CPUs, whatever the machine has, unless GPUs are given."""
        options.setdefault("device", "gpu" if options.get("gpus_per_node") else "cpu")
        return run_checks(self.config, overrides, options=ClusterOptions(**options), is_online=is_online)

    def found(self, *overrides: str, is_online: bool = False, **options: Any) -> list[Finding]:
        """What is worse than a note."""
        report = self.check(*overrides, is_online=is_online, **options)
        return [finding for finding in report.findings if finding.severity is not Severity.NOTE]

    def notes(self, *overrides: str, **options: Any) -> str:
        """All of them as one text."""
        report = self.check(*overrides, **options)
        return "\n".join(f"{f.field}: {f.problem}" for f in report.findings if f.severity is Severity.NOTE)

    def change_model(self, **settings: Any) -> None:
        """Of config.json."""
        path = self.model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))

    @property
    def warm_start(self) -> tuple[str, ...]:
        """Overrides that make it one."""
        return ("train.mode=warm_start", f"train.demonstrations={self.demonstrations}", "evaluation.every=0")


def only(findings: list[Finding]) -> Finding:
    assert len(findings) == 1, findings
    return findings[0]


def save_model(folder: Path) -> Path:
    """A random Qwen2 in several files, with its tokenizer."""
    tokenizer = train_tokenizer()
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer) + 8,  # padded, as real embeddings are
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder, max_shard_size="60KB")
    tokenizer.save_pretrained(folder)
    return folder
