"""The rollouts of a step on one process and on two: the same groups, refills included, and counts of all ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

import megatron_sdsearch.training.rollouts
from megatron_sdsearch.config import ParallelConfig, RunConfig
from megatron_sdsearch.data.questions import QuestionSampler
from megatron_sdsearch.errors import TrainingError
from megatron_sdsearch.parallel.groups import ParallelState
from megatron_sdsearch.records import Question
from megatron_sdsearch.tokenization.renderer import Renderer
from megatron_sdsearch.training.engines import PolicyEngine, start_engine
from megatron_sdsearch.training.policy import Network
from megatron_sdsearch.training.rollouts import DistributedRollouts
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
TOO_LONG: dict[str, object] = {"max_prompt_tokens": 1}
SERVERS: dict[str, object] = {"engine": "sglang", "sglang": {"urls": ["http://127.0.0.1:9"]}}
Outcome = tuple[list[list[tuple[str, list[int]]]], int]


def worker(rank: int, world_size: int, folder: Path) -> tuple[Outcome, list[str]]:
    """The groups of a step, and the messages where no prompt is short enough."""
    parallel = ParallelState.initialize(ParallelConfig(), seed=1)
    outcome = _outcome(_rollouts(parallel, folder, REFILLED))
    return outcome, _refusals(_rollouts(parallel, folder, TOO_LONG))


def server_worker(
    rank: int, world_size: int, folder: Path, tensor: int, pipeline: int
) -> tuple[bool, bool, Outcome, list[list[str]]]:
    """Whether this rank is its replica's first, whether it rolls out, the step's groups and the ids of an evaluation.

    Configured with servers, in whose stead the embedded engine samples.
    """
    sizes = ParallelConfig(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline)
    parallel = ParallelState.initialize(sizes, seed=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(megatron_sdsearch.training.rollouts, "start_engine", _start_embedded)
        rollouts = _rollouts(parallel, folder, REFILLED | SERVERS, sizes)
        evaluated = [[str(t.trajectory_id) for t in g.trajectories] for g in rollouts.evaluate(POOL[:3], step=STEP)]
        is_client = rollouts._collector is not None
        if not is_client:
            patch.setattr(rollouts.source, "engine", None)  # which a rank that does not roll out never asks
        outcome = _outcome(rollouts)
    return parallel.tp_rank == parallel.pp_rank == 0, is_client, outcome, evaluated


def _start_embedded(config: RunConfig, renderer: Renderer, parallel: ParallelState) -> PolicyEngine:
    rollout = config.rollout.model_copy(update={"engine": "embedded"})
    return start_engine(config.model_copy(update={"rollout": rollout}), renderer, parallel)


def _refusals(rollouts: DistributedRollouts) -> list[str]:
    """The messages of a step and of an evaluation."""
    messages = []
    with pytest.raises(TrainingError) as caught:
        rollouts.collect(QuestionSampler(POOL, 1, PER_STEP), step=STEP)
    messages.append(str(caught.value))
    with pytest.raises(TrainingError) as caught:
        rollouts.evaluate(POOL[:PER_STEP], step=STEP)
    rollouts.close()
    return [*messages, str(caught.value)]


def _outcome(rollouts: DistributedRollouts) -> Outcome:
    step = rollouts.collect(QuestionSampler(POOL, 1, PER_STEP), step=STEP)
    rollouts.close()
    ids = [[(str(t.trajectory_id), t.token_ids.tolist()) for t in group.trajectories] for group in step.groups]
    return ids, step.num_refilled


def _rollouts(
    parallel: ParallelState, folder: Path, rollout: dict[str, object], sizes: ParallelConfig | None = None
) -> DistributedRollouts:
    config = make_config(
        folder / "hf",
        folder / "run",
        {},
        data={"train": "unused", "prompt_profile": "plain"},
        retrieval={"corpus": str(folder / "corpus.jsonl")},
        hindsight={"max_block_tokens": 100},
        parallel=sizes.model_dump() if sizes else {},
        rollout=ROLLOUT | rollout,
    )
    rollouts = DistributedRollouts(config, parallel, Renderer.from_folder(config.model.hf_dir))
    rollouts.source.publish(Network(config, parallel), version=STEP)
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
    ((alone, _),) = run_distributed(worker, 1, folder)
    (first, refusals), second = run_distributed(worker, 2, folder)
    assert (first, refusals) == second, "all ranks see all groups, and end together"
    for message, what, number in zip(
        refusals, ("step 3", "evaluation after step 2"), (PER_STEP * 2, PER_STEP), strict=True
    ):
        assert message.startswith(f"{what}: none of its {number} trajectories ({number} prompt_too_long) has a token")
        assert message.endswith("raise rollout.max_prompt_tokens; `check` reports the lengths of prompts")
    assert first == alone
    ids, num_refilled = first
    assert len(ids) == PER_STEP
    assert all(trajectory_id.startswith(f"{STEP + 1}/") for group in ids for trajectory_id, _ in group)
    assert num_refilled == 2 * PER_STEP, "a random policy is always wrong"


@pytest.mark.parametrize(("world_size", "tensor", "pipeline"), [(2, 2, 1), (4, 1, 2)])
def test_with_servers_one_rank_of_each_replica_rolls_out(
    folder: Path, world_size: int, tensor: int, pipeline: int
) -> None:
    ((alone, _),) = run_distributed(worker, 1, folder)
    for is_first, is_client, outcome, evaluated in run_distributed(server_worker, world_size, folder, tensor, pipeline):
        assert is_client == is_first
        assert outcome == alone, "the same groups, in the same order, on every rank"
        assert evaluated == [[f"{STEP + 1}/q{i}/0"] for i in range(3)]
