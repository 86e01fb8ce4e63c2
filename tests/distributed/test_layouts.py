"""Any (tp, pp, dp, microbatches) factorisation gives the single-process loss and gradient, for every model family."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_sdsearch.batching.packing import Minibatch, pack
from megatron_sdsearch.config import RunConfig
from megatron_sdsearch.parallel.groups import ParallelState
from megatron_sdsearch.records import TrainingSample
from megatron_sdsearch.training.policy import Network, Policy
from megatron_sdsearch.training.updates import minibatch_losses, teacher_targets
from tests.distributed.launch import run_distributed
from tests.distributed.oracle import make_config, make_model, make_samples, oracle

TOPK: dict[str, object] = {"alpha": 0.7, "kl_coef": 0.3, "entropy_coef": 0.2, "topk": 20, "alpha_warmup_steps": 0}
WHOLE: dict[str, object] = {**TOPK, "topk": None}
Outcome = tuple[dict[str, float], dict[str, Tensor]]
# fp32 against float64; gradients are of the order of 1e-2 to 1.
RTOL, ATOL = 1e-4, 2e-6


@dataclass(frozen=True)
class Case:
    """One layout of one model; ``max_tokens`` sets the number of microbatches."""

    name: str
    family: str
    is_tied: bool
    tensor: int = 1
    pipeline: int = 1
    sequence: bool = False
    max_tokens: int = 64
    is_topk: bool = True
    recompute: str = "none"
    num_groups: int = 2
    correction: str = "none"
    topk_of: str = "teacher"
    aggregation: str = "all_trajectories"
    dtype: str = "float32"
    layer_spec: str = "local"

    @property
    def objective(self) -> dict[str, object]:
        form = TOPK if self.is_topk else WHOLE
        how = {"topk_of": self.topk_of, "distill_aggregation": self.aggregation}
        return {**form, "importance_correction": self.correction, **how}

    @property
    def model(self) -> str:
        return f"{self.family}-{'tied' if self.is_tied else 'untied'}-{self.num_groups}"


CASES = {
    1: [
        Case("one microbatch", "qwen2", is_tied=False, max_tokens=1000),
        Case("many microbatches", "qwen2", is_tied=False, aggregation="token"),
        Case("whole distributions", "qwen3", is_tied=True, is_topk=False),
        Case("recompute", "qwen3", is_tied=True, recompute="full"),
        Case("llama", "llama", is_tied=True),
    ],
    2: [
        Case("tp2", "qwen2", is_tied=False, tensor=2),
        Case("tp2 truncate", "qwen2", is_tied=False, tensor=2, correction="truncate"),
        Case("tp2 union", "qwen2", is_tied=False, tensor=2, topk_of="union"),
        Case("pp2 student", "qwen3", is_tied=False, pipeline=2, topk_of="student"),
        Case("tp2 tied sequence", "qwen2", is_tied=True, tensor=2, sequence=True),
        Case("tp2 qwen3", "qwen3", is_tied=True, tensor=2, is_topk=False),
        Case("tp2 qwen3 sequence", "qwen3", is_tied=False, tensor=2, sequence=True, recompute="full"),
        Case("pp2", "qwen3", is_tied=False, pipeline=2),
        Case("pp2 llama", "llama", is_tied=True, pipeline=2),
        Case("tp2 mistral", "mistral", is_tied=False, tensor=2),
        Case("pp2 tied", "qwen2", is_tied=True, pipeline=2),
        Case("dp2", "qwen2", is_tied=True),
        Case("dp2 mask", "qwen2", is_tied=True, correction="mask", aggregation="trajectory"),
        Case("dp2 one microbatch", "qwen3", is_tied=False, max_tokens=1000),
    ],
    4: [
        Case("tp4 of 2 key-value heads", "qwen2", is_tied=False, tensor=4),
        Case("tp4 sequence", "qwen3", is_tied=True, tensor=4, sequence=True, num_groups=4),
        Case("tp2 pp2 sequence", "qwen2", is_tied=True, tensor=2, pipeline=2, sequence=True),
        Case("tp4 union", "qwen2", is_tied=False, tensor=4, num_groups=4, topk_of="union"),
        Case("tp2 dp2", "qwen3", is_tied=False, tensor=2),
        Case("pp2 dp2", "qwen2", is_tied=True, pipeline=2, aggregation="token"),
    ],
}


def worker(rank: int, world_size: int, cases: list[Case], folder: Path) -> dict[str, Outcome]:
    return {case.name: _loss_and_gradient(case, folder) for case in cases}


def _loss_and_gradient(case: Case, folder: Path) -> Outcome:
    layout: dict[str, object] = {
        "tensor_model_parallel_size": case.tensor,
        "pipeline_model_parallel_size": case.pipeline,
        "sequence_parallel": case.sequence,
    }
    config = make_config(folder / case.model, folder, case.objective, parallel=layout)
    how = {"recompute": case.recompute, "dtype": case.dtype, "layer_spec": case.layer_spec}
    config = config.model_copy(update={"model": config.model.model_copy(update=how)})
    parallel = ParallelState.initialize(config.parallel, seed=1)
    policy = Policy(config, parallel)
    reference = Network(_with_model(config, folder / f"{case.model}-reference"), parallel)
    minibatch = _pack(make_samples(9), case, config, parallel)
    targets, ref = teacher_targets(policy, minibatch, config.objective), reference.logprobs(minibatch)
    losses = minibatch_losses(minibatch, config.objective, config.objective.alpha, ref=ref, targets=targets)
    metrics = policy.accumulate(minibatch.student, losses)
    with torch.no_grad():
        for parameter in policy.gpt.parameters():
            parameter.copy_(parameter.main_grad)  # so that the export names and joins gradients as it does weights
    gradients = {name: tensor.clone() for name, tensor in policy.hf_weights()}
    parallel_state.destroy_model_parallel()
    return metrics, gradients


def _with_model(config: RunConfig, hf_dir: Path) -> RunConfig:
    return config.model_copy(update={"model": config.model.model_copy(update={"hf_dir": hf_dir})})


def _pack(samples: list[TrainingSample], case: Case, config: RunConfig, parallel: ParallelState) -> Minibatch:
    batch = pack(
        samples,
        num_ranks=parallel.dp_size,
        rank=parallel.dp_rank,
        num_minibatches=1,
        max_tokens=case.max_tokens,
        alignment=parallel.alignment,
        equal_lengths=parallel.pp_size > 1,
        objective=config.objective,
    )
    return batch.minibatches[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every model of the cases, and a reference of other weights for each."""
    folder = tmp_path_factory.mktemp("models")
    for case in {case.model: case for cases in CASES.values() for case in cases}.values():
        for suffix, seed in (("", 0), ("-reference", 1)):
            target = folder / f"{case.model}{suffix}"
            make_model(target, case.family, is_tied=case.is_tied, num_groups=case.num_groups, seed=seed)
    return folder


@pytest.mark.parametrize("world_size", list(CASES))
def test_every_layout_gives_the_oracle_s_loss_and_gradient(world_size: int, folder: Path) -> None:
    cases = CASES[world_size]
    by_rank: list[dict[str, Any]] = run_distributed(worker, world_size, cases, folder, timeout_s=300)
    for case in cases:
        config = make_config(folder / case.model, folder, case.objective)
        metrics, gradient = oracle(
            folder / case.model, folder / f"{case.model}-reference", make_samples(9), config.objective
        )
        for results in by_rank:
            measured_metrics, measured = results[case.name]
            found = {name: measured_metrics[name] for name in metrics}
            # The gap is a small difference of entropies of 4.5 nats, each good to seven digits.
            assert found == pytest.approx(metrics, rel=1e-5, abs=1e-6), case.name
            assert set(measured) == set(gradient), case.name
            for name, expected in gradient.items():
                gap = (measured[name].double() - expected).abs()
                assert bool((gap <= ATOL + RTOL * expected.abs()).all()), f"{case.name} {name}: {float(gap.max()):.1e}"
