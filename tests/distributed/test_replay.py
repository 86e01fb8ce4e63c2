"""A step repeated from a replay store, without corpus and index, is the same step to the last bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from megatron_sdsearch.config import ParallelConfig
from megatron_sdsearch.data.questions import QuestionSampler
from megatron_sdsearch.parallel.groups import ParallelState
from megatron_sdsearch.records import ContextSpan, Question, RolloutGroup
from megatron_sdsearch.retrieval.replay import HITS, MISSES
from megatron_sdsearch.tokenization.renderer import Renderer
from megatron_sdsearch.training.policy import Network
from megatron_sdsearch.training.rollouts import DistributedRollouts
from tests.distributed.launch import run_distributed
from tests.distributed.oracle import make_config
from tests.unit.conftest import train_tokenizer

STEP = 2
Outcome = tuple[list[RolloutGroup], list[RolloutGroup], dict[str, int]]


def worker(rank: int, world_size: int, folder: Path, mode: str) -> Outcome:
    """The groups of a step, those of an evaluation, and what the engine counted."""
    parallel = ParallelState.initialize(ParallelConfig(), seed=1)
    config = make_config(
        folder / "hf",
        folder / "run",
        {},
        data={"train": "unused", "prompt_profile": "plain"},
        retrieval={
            "corpus": str(folder / "corpus" / "corpus.jsonl"),
            "replay": {"mode": mode, "store": str(folder / "replay.db")},
        },
        hindsight={"max_block_tokens": 100},
        rollout={
            "group_size": 3,
            "max_turns": 3,
            "max_prompt_tokens": 300,
            "max_response_tokens": 12,
            "max_observation_tokens": 60,
            "max_total_tokens": 700,
            "max_failed_search_share": 0.0,
        },
    )
    rollouts = DistributedRollouts(config, parallel, Renderer.from_folder(config.model.hf_dir))
    rollouts.source.publish(Network(config, parallel), version=STEP)
    pool = [Question(question_id=f"q{i}", text=f"where is book {i}", gold_answers=("Lisbon",)) for i in range(6)]
    step = rollouts.collect(QuestionSampler(pool, 1, 3), step=STEP)
    evaluated = rollouts.evaluate(pool, step=STEP)
    rollouts.close()
    return step.groups, evaluated, step.engine_counts


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    _make_searching_policy(tmp_path / "hf")
    # Queries are random characters: every one of them is a passage.
    rows = [{"id": f"p{i}", "contents": f'"{chr(i)}"\n{chr(i)} {chr(i + 1)} and text'} for i in range(48, 122)]
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def _make_searching_policy(folder: Path) -> None:
    """A random model that likes to open and to close a search.

    The first channel of the residual stream is made a constant, through which the output layer adds to two logits.
    """
    tokenizer = train_tokenizer(has_tag_tokens=True)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        initializer_range=0.1,
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 3.0
        for tag in ("<search>", "</search>"):
            model.lm_head.weight[tokenizer.get_vocab()[tag], 0] = 1.2
    model.save_pretrained(folder)


def test_a_rerun_without_the_index_is_the_same_step(folder: Path) -> None:
    first, second = run_distributed(worker, 2, folder, "cache")
    assert first == second, "all ranks see all groups"
    groups, evaluated, counts = first
    spans = [span for group in groups for trajectory in group.trajectories for span in trajectory.spans]
    shown = [span.passage_ids for span in spans if isinstance(span, ContextSpan) and span.kind == "observation"]
    assert len(shown) > 5, "the policy searches"
    assert any(shown), "and finds"
    assert counts[MISSES] > 5
    shutil.rmtree(folder / "corpus")
    for groups_again, evaluated_again, counts in run_distributed(worker, 2, folder, "only"):
        assert groups_again == groups
        assert evaluated_again == evaluated
        assert counts[MISSES] == 0
        assert counts[HITS] > 5
