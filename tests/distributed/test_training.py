"""Training the same trajectories gives the same weights on every layout, through checkpoints, and after export."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_sdsearch.batching.packing import Microbatch, TrainBatch, pack
from megatron_sdsearch.config import RunConfig
from megatron_sdsearch.errors import CheckpointError, TrainingError
from megatron_sdsearch.logging import PhaseTimer
from megatron_sdsearch.loss.rows import RowLogits
from megatron_sdsearch.model.checkpoint import CheckpointStore, TrainingState
from megatron_sdsearch.model.hf_folder import write_hf_folder
from megatron_sdsearch.parallel.groups import ParallelState
from megatron_sdsearch.records import TrainingSample
from megatron_sdsearch.training.policy import Network, Policy, UpdateResult
from megatron_sdsearch.training.updates import run_updates
from tests.distributed.launch import run_distributed
from tests.distributed.oracle import make_config, make_model, make_samples

NUM_STEPS = 3
OBJECTIVE: dict[str, object] = {"alpha": 0.5, "alpha_warmup_steps": 1, "kl_coef": 0.1, "entropy_coef": 0.01, "topk": 20}
LAYOUTS: dict[int, list[dict[str, object]]] = {
    1: [{}],
    2: [
        {"tensor_model_parallel_size": 2},
        {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        {"pipeline_model_parallel_size": 2},
        {},
    ],
}
Weights = dict[str, Tensor]
Outcome = tuple[list[float], Weights]


def _config(folder: Path, layout: dict[str, object], **optimizer: object) -> RunConfig:
    # eps bounds what Adam makes of a gradient that is 0 but for rounding: such a parameter would move by a full lr.
    return make_config(
        folder / "hf",
        folder / "run",
        OBJECTIVE,
        parallel=layout,
        optimizer={"lr": 1e-3, "eps": 1e-4, "weight_decay": 0.1, "warmup_steps": 2, "schedule": "cosine", **optimizer},
        data={"train": "unused", "questions_per_step": 2},
        train={"num_steps": NUM_STEPS, "trajectories_per_minibatch": 5},
    )


class Run:
    """A policy and what it learns from, on the current layout."""

    def __init__(self, config: RunConfig) -> None:
        self.parallel = ParallelState.initialize(config.parallel, seed=1)
        self.policy = Policy(config, self.parallel)
        self.reference = Network(config, self.parallel)
        self.config = config

    def step(self, step: int) -> list[float]:
        """Gradient norms of the step's updates."""
        return [result.grad_norm for result in self.learn(self.batch(step), step)]

    def learn(self, batch: TrainBatch, step: int) -> list[UpdateResult]:
        objective = self.config.objective
        alpha = objective.alpha_at(step)
        return run_updates(self.policy, self.reference, batch, objective, alpha, PhaseTimer())

    def batch(self, step: int) -> TrainBatch:
        return self.pack(make_samples(10, seed=step))

    def pack(self, samples: list[TrainingSample]) -> TrainBatch:
        return pack(
            samples,
            num_ranks=self.parallel.dp_size,
            rank=self.parallel.dp_rank,
            num_minibatches=2,
            max_tokens=64,
            alignment=self.parallel.alignment,
            equal_lengths=self.parallel.pp_size > 1,
            objective=self.config.objective,
        )

    def weights(self) -> Weights:
        return {name: tensor.clone() for name, tensor in self.policy.hf_weights()}

    def end(self) -> None:
        parallel_state.destroy_model_parallel()


def train_on(rank: int, world_size: int, layouts: list[dict[str, object]], folder: Path) -> list[Outcome]:
    results = []
    for layout in layouts:
        run = Run(_config(folder, layout))
        norms = [norm for step in range(NUM_STEPS) for norm in run.step(step)]
        results.append((norms, run.weights()))
        run.end()
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    make_model(folder / "hf", "qwen2", is_tied=True)
    return folder


@pytest.fixture(scope="module")
def single(folder: Path) -> Outcome:
    result: list[list[Outcome]] = run_distributed(train_on, 1, LAYOUTS[1], folder)
    return result[0][0]


def test_three_steps_give_the_same_weights_on_every_layout(folder: Path, single: Outcome) -> None:
    norms, weights = single
    start = AutoModelForCausalLM.from_pretrained(folder / "hf").state_dict()
    moved = max(float((weights[name] - start[name]).abs().max()) for name in weights)
    assert moved > 1e-3, "the steps must do something"
    outcomes: list[list[Outcome]] = run_distributed(train_on, 2, LAYOUTS[2], folder, timeout_s=240)
    for by_layout in outcomes:
        for layout, (other_norms, other_weights) in zip(LAYOUTS[2], by_layout, strict=True):
            assert other_norms == pytest.approx(norms, rel=1e-4), layout  # clipping depends on it
            for name, expected in weights.items():
                gap = float((other_weights[name] - expected).abs().max())
                assert gap < 5e-6, f"{layout} {name}: {gap:.2e}, where weights moved by up to {moved:.2e}"


DISTRIBUTED: dict[int, list[dict[str, object]]] = {2: [{}], 4: [{"tensor_model_parallel_size": 2}]}


def train_both_ways(
    rank: int, world_size: int, layouts: list[dict[str, object]], folder: Path
) -> list[tuple[list[Outcome], tuple[int, int]]]:
    """With the plain and with the distributed optimizer; and how many first moments this rank holds in either case."""
    results = []
    for layout in layouts:
        outcomes, sizes = [], []
        for is_distributed in (False, True):
            run = Run(_config(folder, {**layout, "distributed_optimizer": is_distributed}))
            norms = [norm for step in range(NUM_STEPS) for norm in run.step(step)]
            outcomes.append((norms, run.weights()))
            states = run.policy.optimizer.chained_optimizers[0].optimizer.state.values()
            sizes.append(sum(state["exp_avg"].numel() for state in states))
            run.end()
        results.append((outcomes, (sizes[0], sizes[1])))
    return results


@pytest.mark.parametrize("world_size", list(DISTRIBUTED))
def test_the_distributed_optimizer_gives_the_weights_of_the_plain_one(folder: Path, world_size: int) -> None:
    layouts = DISTRIBUTED[world_size]
    by_rank = run_distributed(train_both_ways, world_size, layouts, folder, timeout_s=280)
    for index, layout in enumerate(layouts):
        for by_layout in by_rank:
            (plain_norms, plain), (norms, weights) = by_layout[index][0]
            assert norms == pytest.approx(plain_norms, rel=1e-5), layout
            worst = max(float((weights[name] - plain[name]).abs().max()) for name in plain)
            assert worst < 2e-7, f"{layout}: {worst:.1e}"
        held = [by_layout[index][1] for by_layout in by_rank]
        assert sum(num for _, num in held) == sum(num for num, _ in held) // 2, "each moment lives on one of two ranks"


def _steps(config: RunConfig, num_steps: int) -> RunConfig:
    return config.model_copy(update={"train": config.train.model_copy(update={"num_steps": num_steps})})


def interrupt_and_go_on(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    root = folder / "checkpoints"
    config = _config(folder, {"tensor_model_parallel_size": 2})
    first = Run(config)
    first.step(0)
    first.step(1)
    store = CheckpointStore(root, first.policy, first.parallel, config)
    store.save(TrainingState(step=2))
    store.finish()
    first.step(2)
    uninterrupted = first.weights()
    first.end()

    second = Run(config)
    step = CheckpointStore(root, second.policy, second.parallel, config).load().step
    second.step(step)
    resumed = second.weights()
    for other, named in ((config.model_copy(update={"seed": 2}), "seed = 1"), (_steps(config, 1), "train.num_steps")):
        with pytest.raises(CheckpointError, match=named):
            CheckpointStore(root, second.policy, second.parallel, other).load()
    write_hf_folder(second.policy.hf_weights(), folder / "hf", folder / "export", is_writer=rank == 0)
    microbatch = second.batch(0).minibatches[0].student[0]
    logprobs = second.policy.collect([microbatch], RowLogits.logprobs)[0]
    second.end()
    return {
        "step": step,
        "gaps": {name: float((resumed[name] - uninterrupted[name]).abs().max()) for name in resumed},
        "microbatch": microbatch,
        "logprobs": logprobs,
    }


def test_a_resumed_run_is_the_uninterrupted_one_and_its_export_loads(folder: Path) -> None:
    result = run_distributed(interrupt_and_go_on, 2, folder, timeout_s=240)[0]
    assert result["step"] == 2
    assert set(result["gaps"].values()) == {0.0}
    assert (folder / "checkpoints" / "latest").read_text() == "step_000002"

    model = AutoModelForCausalLM.from_pretrained(folder / "export")
    batch = result["microbatch"]
    expected = []
    for start, end in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
        with torch.no_grad():
            logp = model(batch.token_ids[start:end][None]).logits[0].log_softmax(-1)
        mask = batch.loss_mask[start:end]
        expected.append(logp[mask].gather(1, batch.labels[start:end][mask, None])[:, 0])
    torch.testing.assert_close(result["logprobs"], torch.cat(expected), rtol=0, atol=1e-5)


def nothing_to_learn(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    config = _config(folder, {"tensor_model_parallel_size": 2}, weight_decay=0.0)
    run = Run(config.model_copy(update={"objective": config.objective.model_copy(update={"entropy_coef": 0.0})}))
    start = run.weights()
    samples = [
        replace(sample, distill_mask=np.zeros_like(sample.distill_mask), teacher_prompts=(), advantage=0.0)
        for sample in make_samples(5)
    ]
    results = {
        "no query, no contrast": run.learn(run.pack(samples), 1),
        "no token": run.learn(
            run.pack([replace(sample, loss_mask=np.zeros_like(sample.loss_mask)) for sample in samples]), 2
        ),
        "no sample": run.learn(run.pack([]), 3),
    }
    results["fewer samples than updates"] = run.learn(run.pack(samples[:1]), 4)
    moved = max(float((run.weights()[name] - weight).abs().max()) for name, weight in start.items())
    num_scheduled = run.policy.scheduler.num_steps
    run.end()
    norms = {name: [r.grad_norm for r in rs] for name, rs in results.items()}
    return {"moved": moved, "norms": norms, "num_scheduled": num_scheduled}


def test_steps_with_nothing_to_learn_advance_the_schedule_alone(folder: Path) -> None:
    for result in run_distributed(nothing_to_learn, 2, folder, timeout_s=240):
        # At the start policy and reference are equal: no advantage, no divergence, no KL, but for the rounding of k3.
        assert max(result["norms"]["no query, no contrast"]) < 1e-4
        assert result["norms"]["no token"] == [0.0, 0.0]
        assert result["norms"]["no sample"] == [0.0, 0.0]
        assert result["norms"]["fewer samples than updates"][1] == 0.0
        assert result["num_scheduled"] == 4 * 2, "two updates are planned for every step"
        assert result["moved"] < 1e-5


def refuse_what_is_not_finite(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    run = Run(_config(folder, {}))
    before = run.weights()
    minibatch = run.batch(0).minibatches[0]

    def loss(logits: RowLogits, batch: Microbatch) -> tuple[Tensor, dict[str, Tensor]]:
        value = logits.logprobs(batch).sum() * float("nan")
        return value, {"loss": value.detach()}

    with pytest.raises(TrainingError, match="not finite"):
        run.policy.update(minibatch, [loss] * len(minibatch.student))
    groups = run.policy.optimizer.param_groups
    decays = {bool(group["wd_mult"]): {p.dim() for p in group["params"]} for group in groups if group["params"]}
    return {"moved": max(float((run.weights()[n] - w).abs().max()) for n, w in before.items()), "decays": decays}


def test_a_loss_that_is_not_finite_leaves_the_weights_alone_and_norms_never_decay(folder: Path) -> None:
    (result,) = run_distributed(refuse_what_is_not_finite, 1, folder)
    assert result["moved"] == 0.0
    assert result["decays"] == {True: {2}, False: {1}}
