"""The rollouts of a step on one process and on two: the same groups, refills included, and counts of all ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

import megatron_sdsearch.rollout.collector
from megatron_sdsearch.config import ParallelConfig
from megatron_sdsearch.data.questions import QuestionSampler
from megatron_sdsearch.parallel.groups import ParallelState
from megatron_sdsearch.records import CollectionCounts, Question, Score, Trajectory
from megatron_sdsearch.tokenization.renderer import Renderer
from megatron_sdsearch.training.policy import Network
from megatron_sdsearch.training.rollouts import DistributedRollouts, StepRollouts
from tests.distributed.launch import run_distributed
from tests.distributed.oracle import make_config
from tests.unit.conftest import train_tokenizer

PER_STEP, STEP = 3, 2
ROLLOUT: dict[str, object] = {
    "group_size": 2,
    "max_turns": 1,
    "max_prompt_tokens": 300,
    "max_response_tokens": 8,
    "max_observation_tokens": 60,
    "max_total_tokens": 400,
}


REFILLED: dict[str, object] = {"max_refills": 2}
OVERSAMPLED: dict[str, object] = {"oversample": 1.5}
PLACEBO: dict[str, object] = {"group_size": 4}
Outcome = tuple[list[list[tuple[str, list[int]]]], CollectionCounts]


def worker(
    rank: int, world_size: int, folder: Path, cases: list[dict[str, object]]
) -> tuple[list[Outcome], list[list[tuple[bool, str]]]]:
    parallel = ParallelState.initialize(ParallelConfig(), seed=1)
    return [_outcome(_collect(parallel, folder, rollout)) for rollout in cases], _placebo(parallel, folder)


def _placebo(parallel: ParallelState, folder: Path) -> list[list[tuple[bool, str]]]:
    """Of each trajectory whether it is right, and its block. A random policy never is: odd questions count as right."""

    def score(trajectory: Trajectory, *_: object) -> Score:
        f1 = float(int(trajectory.trajectory_id.question_id[1:]) % 2)
        return Score(f1=f1, em=f1, reward=f1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(megatron_sdsearch.rollout.collector, "score_trajectory", score)
        step = _collect(parallel, folder, PLACEBO, labels="shuffled")
    return [
        [(score.f1 > 0, block.text) for score, block in zip(group.scores, blocks, strict=True)]
        for group, blocks in step.groups
    ]


def _outcome(step: StepRollouts) -> Outcome:
    ids = [[(str(t.trajectory_id), t.token_ids.tolist()) for t in group.trajectories] for group, _ in step.groups]
    return ids, step.counts


def _collect(
    parallel: ParallelState, folder: Path, rollout: dict[str, object], labels: str = "outcome"
) -> StepRollouts:
    config = make_config(
        folder / "hf",
        folder / "run",
        {},
        data={"train": "unused", "prompt_profile": "plain"},
        retrieval={"corpus": str(folder / "corpus.jsonl")},
        hindsight={"max_block_tokens": 100, "labels": labels},
        rollout=ROLLOUT | rollout,
    )
    rollouts = DistributedRollouts(config, parallel, Renderer.from_folder(config.model.hf_dir))
    rollouts.publish(Network.load(config, parallel), version=STEP)
    pool = [Question(question_id=f"q{i}", text=f"where is book {i}", gold_answers=("Lisbon",)) for i in range(12)]
    step = rollouts.collect(QuestionSampler(pool, 1, PER_STEP), step=STEP)
    rollouts.close()
    return step


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rollouts")
    tokenizer = train_tokenizer()
    tokenizer.save_pretrained(folder / "hf")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "hf")
    passage = {"id": "p1", "contents": '"Lisbon"\nLisbon is the capital of Portugal.'}
    (folder / "corpus.jsonl").write_text(json.dumps(passage) + "\n")
    return folder


def test_two_processes_give_the_groups_of_one_and_count_together(folder: Path) -> None:
    ((alone, placebo),) = run_distributed(worker, 1, folder, [REFILLED])
    (first, shown), second = run_distributed(worker, 2, folder, [REFILLED, OVERSAMPLED])
    assert (first, shown) == second, "all ranks see all groups"
    assert first[0] == alone[0]
    ids, counts = first[0]
    assert len(ids) == PER_STEP
    assert counts == CollectionCounts(num_refilled=2 * PER_STEP), "a random policy is always wrong"
    ids, counts = first[1]
    assert len(ids) == PER_STEP
    assert counts == CollectionCounts(num_abandoned=1 + 1), "each rank over-samples its own share: 3 for 2, 2 for 1"
    assert shown == placebo
    _check_placebo(placebo)


def _check_placebo(groups: list[list[tuple[bool, str]]]) -> None:
    """As many labels as outcomes over all groups, and so over all processes, but not in each group."""
    true = [[is_right for is_right, _ in group] for group in groups]
    shown = [[line.startswith("CORRECT") for line in group[0][1].splitlines()[1:]] for group in groups]
    assert [len(group) for group in shown] == [len(group) for group in true]
    assert sum(map(sum, shown)) == sum(map(sum, true)) > 0
    assert [sum(group) for group in shown] != [sum(group) for group in true]
