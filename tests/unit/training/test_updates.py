"""A step that has nothing to learn from is an error, never a step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from megatron_sdsearch.batching.demonstration_samples import demonstration_sample
from megatron_sdsearch.config import parse_config
from megatron_sdsearch.data.demonstrations import Demonstration, DemonstrationSpan
from megatron_sdsearch.errors import TrainingError
from megatron_sdsearch.tokenization.renderer import Renderer
from megatron_sdsearch.training.updates import pack_samples

LESSON = Demonstration(
    demonstration_id="d0", prompt="where?", spans=(DemonstrationSpan(kind="sampled", text="<answer>x</answer>"),)
)


@pytest.mark.parametrize("num_samples", [0, 2])
def test_a_step_without_a_sampled_token_is_an_error(renderer: Renderer, num_samples: int) -> None:
    train = {"mode": "warm_start", "demonstrations": "d.jsonl"}
    config = parse_config({"run_dir": "run", "model": {"hf_dir": "model"}, "train": train})
    sample = demonstration_sample(LESSON, renderer, 1000)
    parallel: Any = None  # nothing is packed
    empty = replace(sample, loss_mask=np.zeros_like(sample.loss_mask))
    with pytest.raises(TrainingError, match=f"none of the step's {num_samples} samples has a sampled token"):
        pack_samples([empty] * num_samples, config, parallel)
