"""A step takes the updates that its configuration plans; with nothing to learn from it is an error, never a step."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sdsearch.config import parse_config
from megatron_sdsearch.errors import TrainingError
from megatron_sdsearch.parallel.groups import ParallelState
from megatron_sdsearch.records import TrainingSample
from megatron_sdsearch.training.updates import pack_samples

PARALLEL = cast("ParallelState", SimpleNamespace(dp_size=1, dp_rank=0, alignment=1, pp_size=1))


def sample(index: int) -> TrainingSample:
    return TrainingSample(
        sample_id=f"sample {index}",
        token_ids=np.array([index, 1, 2]),
        labels=np.array([1, 2, 0]),
        loss_mask=np.array([True, True, False]),
        distill_mask=np.zeros(3, dtype=np.bool_),
        rollout_logprobs=np.zeros(3),
        advantage=1.0,
        prompt_length=1,
    )


@settings(deadline=None)
@given(questions=st.integers(1, 8), group_size=st.integers(2, 6), size=st.integers(1, 60), share=st.floats(0, 1))
def test_a_step_makes_the_updates_that_are_planned_for_it(
    questions: int, group_size: int, size: int, share: float
) -> None:
    config = parse_config(
        {
            "run_dir": "r",
            "model": {"hf_dir": "m"},
            "data": {"train": "t", "questions_per_step": questions},
            "rollout": {"group_size": group_size},
            "retrieval": {"corpus": "c"},
            "train": {"trajectories_per_minibatch": size},
        }
    )
    num_trainable = max(1, int(share * questions * group_size))
    batch = pack_samples([sample(i) for i in range(num_trainable)], config, PARALLEL)
    sizes = [minibatch.num_policy_tokens // 2 for minibatch in batch.minibatches]  # a sample has two
    assert len(sizes) * config.train.num_steps == config.num_updates
    assert sum(sizes) == num_trainable
    assert max(sizes) <= size
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("num_samples", [0, 2])
def test_a_step_without_a_sampled_token_is_an_error(num_samples: int) -> None:
    train = {"mode": "warm_start", "demonstrations": "d.jsonl"}
    config = parse_config({"run_dir": "run", "model": {"hf_dir": "model"}, "train": train})
    empty = replace(sample(0), loss_mask=np.zeros(3, dtype=np.bool_))
    with pytest.raises(TrainingError, match=f"none of the step's {num_samples} samples has a sampled token"):
        pack_samples([empty] * num_samples, config, PARALLEL)
