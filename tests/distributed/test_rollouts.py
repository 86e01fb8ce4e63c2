"""The rollouts of a step on one process and on two: the same groups, refills included, and counts of all ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

import megatron_sdsearch.rollout.collector
from megatron_sdsearch.config import HindsightConfig, ParallelConfig
from megatron_sdsearch.data.prompts import get_profile
from megatron_sdsearch.data.questions import QuestionSampler
from megatron_sdsearch.errors import TrainingError
from megatron_sdsearch.hindsight.block import build_hindsight
from megatron_sdsearch.parallel.groups import ParallelState
from megatron_sdsearch.records import CollectionCounts, Question, Score, Trajectory
from megatron_sdsearch.tokenization.renderer import Renderer
from megatron_sdsearch.training.policy import Network
from megatron_sdsearch.training.rollouts import DistributedRollouts, StepRollouts
from tests.distributed.launch import run_distributed
from tests.distributed.oracle import make_config
from tests.unit.conftest import train_tokenizer

PER_STEP, STEP = 3, 2
POOL = [Question(question_id=f"q{i}", text=f"where is book {i}", gold_answers=("Lisbon",)) for i in range(12)]
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
TOO_LONG: dict[str, object] = {"max_prompt_tokens": 1}
PLACEBO: dict[str, object] = {"group_size": 4}
Outcome = tuple[list[list[tuple[str, list[int]]]], CollectionCounts]
Placebo = list[list[tuple[bool, str]]]


def worker(
    rank: int, world_size: int, folder: Path, cases: list[dict[str, object]]
) -> tuple[list[Outcome], Placebo, list[str]]:
    """Outcomes of each case, placebo labels, and what is said where no prompt is short enough."""
    parallel = ParallelState.initialize(ParallelConfig(), seed=1)
    outcomes = [_outcome(_collect(parallel, folder, rollout)) for rollout in cases]
    return outcomes, _placebo(parallel, folder), _refusals(_rollouts(parallel, folder, TOO_LONG))


def _placebo(parallel: ParallelState, folder: Path) -> Placebo:
    """Of each trajectory whether it is right, and its block. A random policy never is: odd questions count as right."""

    def score(trajectory: Trajectory, *_: object) -> Score:
        f1 = float(int(trajectory.trajectory_id.question_id[1:]) % 2)
        return Score(f1=f1, em=f1, reward=f1, is_correct=f1 > 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(megatron_sdsearch.rollout.collector, "score_trajectory", score)
        groups = _collect(parallel, folder, PLACEBO).groups
    renderer, config = Renderer.from_folder(folder / "hf"), HindsightConfig(max_block_tokens=100, labels="shuffled")
    step_blocks = build_hindsight(groups, renderer, get_profile("plain"), config, seed=1)
    return [
        [(score.is_correct, block.text) for score, block in zip(group.scores, blocks, strict=True)]
        for group, blocks in zip(groups, step_blocks, strict=True)
    ]


def _refusals(rollouts: DistributedRollouts) -> list[str]:
    """Of a step, and of an evaluation."""
    said = []
    with pytest.raises(TrainingError) as caught:
        rollouts.collect(QuestionSampler(POOL, 1, PER_STEP), step=STEP)
    said.append(str(caught.value))
    with pytest.raises(TrainingError) as caught:
        rollouts.evaluate(POOL[:PER_STEP], step=STEP)
    rollouts.close()
    return [*said, str(caught.value)]


def _outcome(step: StepRollouts) -> Outcome:
    ids = [[(str(t.trajectory_id), t.token_ids.tolist()) for t in group.trajectories] for group in step.groups]
    return ids, step.counts


def _collect(parallel: ParallelState, folder: Path, rollout: dict[str, object]) -> StepRollouts:
    rollouts = _rollouts(parallel, folder, rollout)
    step = rollouts.collect(QuestionSampler(POOL, 1, PER_STEP), step=STEP)
    rollouts.close()
    return step


def _rollouts(parallel: ParallelState, folder: Path, rollout: dict[str, object]) -> DistributedRollouts:
    config = make_config(
        folder / "hf",
        folder / "run",
        {},
        data={"train": "unused", "prompt_profile": "plain"},
        retrieval={"corpus": str(folder / "corpus.jsonl")},
        rollout=ROLLOUT | rollout,
    )
    rollouts = DistributedRollouts(config, parallel, Renderer.from_folder(config.model.hf_dir))
    rollouts.publish(Network(config, parallel), version=STEP)
    return rollouts


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
    ((alone, placebo, _),) = run_distributed(worker, 1, folder, [REFILLED])
    (first, shown, refusals), second = run_distributed(worker, 2, folder, [REFILLED, OVERSAMPLED])
    assert (first, shown, refusals) == second, "all ranks see all groups, and end together"
    for said, what, number in zip(
        refusals, ("step 3", "evaluation after step 2"), (PER_STEP * 2, PER_STEP), strict=True
    ):
        assert said.startswith(f"{what}: none of its {number} trajectories ({number} prompt_too_long) has a token")
        assert said.endswith("raise rollout.max_prompt_tokens, `check` says how long prompts are")
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
