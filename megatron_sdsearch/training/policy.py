"""The policy: a megatron model with DDP, optimizer and schedule; updates, and forward-only passes.

``loss/objective.py`` defines the loss, ``training/loop.py`` the order of a step.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor
from transformers import PretrainedConfig

from megatron_sdsearch.batching.packing import Microbatch, Minibatch
from megatron_sdsearch.config import ModelConfig, RunConfig
from megatron_sdsearch.errors import TrainingError
from megatron_sdsearch.loss.objective import Metrics
from megatron_sdsearch.loss.rows import RowLogits
from megatron_sdsearch.model.architecture import LMHead, build_model
from megatron_sdsearch.model.hf_config import load_hf_config
from megatron_sdsearch.model.hf_weights import HFTensors, SafetensorsFolder, export_hf_weights, load_weights
from megatron_sdsearch.model.megatron_folder import MegatronFolder
from megatron_sdsearch.parallel.groups import ParallelState
from megatron_sdsearch.parallel.schedule import forward_backward, forward_collect

RowLoss = Callable[[RowLogits, Microbatch], tuple[Tensor, Metrics]]
"""(logits, batch on the device) -> (scalar sum with global weights, 0-dim metrics with global weights)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateResult:
    """Result of one optimizer update, equal on every rank.

    Attributes:
        metrics: sums of globally weighted metrics over microbatches and data-parallel ranks; names that end in
            ``_max`` are maxima.
        grad_norm: before clipping; 0 for a minibatch without a policy token.
        learning_rate: of this update.
    """

    metrics: dict[str, float]
    grad_norm: float
    learning_rate: float


def starting_weights(model: ModelConfig, hf_config: PretrainedConfig) -> tuple[HFTensors, Path]:
    """Return the initial weights of a ``Network``, and their folder.

    Raises:
        DataError, CheckpointError: the folder cannot be read.
    """
    if model.megatron_dir is not None:
        return MegatronFolder(model.megatron_dir, hf_config), model.megatron_dir
    return SafetensorsFolder(model.hf_dir), model.hf_dir


class Network:
    """This rank's stage of a model, for forward-only passes: the policy, or its frozen reference.

    Loads the weights of ``model.megatron_dir`` if it is set, else those of ``model.hf_dir``.
    """

    def __init__(self, config: RunConfig, parallel: ParallelState) -> None:
        self.hf_config = load_hf_config(config.model.hf_dir)
        self.parallel = parallel
        self.gpt = build_model(self.hf_config, config.model, parallel)
        load_weights(self.gpt, *starting_weights(config.model, self.hf_config), self.hf_config, parallel)
        self.temperature = config.rollout.temperature if config.train.mode == "rl" else 1.0
        self._chunk_rows = config.model.logits_chunk_tokens

    def row_logits(self, hidden: Tensor) -> RowLogits:
        """Return lazily computed logits of one packed microbatch, from its hidden states [T, h]."""
        head = LMHead.from_model(self.gpt, self.hf_config, self.parallel)
        return RowLogits(
            hidden=head.gather(hidden),
            project=head.logits,
            shard=head.shard,
            chunk_rows=self._chunk_rows,
            temperature=self.temperature,
        )

    def collect(self, microbatches: Sequence[Microbatch], read: Callable[[RowLogits, Microbatch], Any]) -> list[Any]:
        """Run forward passes and return ``read``'s result for each microbatch; empty except on the last stage."""
        self.gpt.eval()
        return forward_collect(
            self.gpt, microbatches, lambda hidden, batch: read(self.row_logits(hidden), batch), self.parallel
        )

    def logprobs(self, minibatch: Minibatch) -> list[Tensor]:
        """Return [N] log-probabilities (nats) of each microbatch's policy tokens; empty except on the last stage."""
        return self.collect(minibatch.student, RowLogits.logprobs)

    def hf_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield whole tensors under Hugging Face names, on every rank; a collective that all ranks must drain."""
        return export_hf_weights(self.gpt, self.hf_config, self.parallel)

    def stage_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield whole tensors of this stage; a collective that all ranks of its tensor-parallel group must drain."""
        return export_hf_weights(self.gpt, self.hf_config, self.parallel, own_stage_only=True)


class Policy(Network):
    """The network that is trained, with its initial weights and a fresh optimizer."""

    def __init__(self, config: RunConfig, parallel: ParallelState) -> None:
        super().__init__(config, parallel)
        optimizer, is_distributed = config.optimizer, config.parallel.distributed_optimizer
        self.ddp = DistributedDataParallel(
            config=self.gpt.config,
            ddp_config=DistributedDataParallelConfig(
                grad_reduce_in_fp32=True, use_distributed_optimizer=is_distributed
            ),
            module=self.gpt,
        )
        self.optimizer: MegatronOptimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=optimizer.lr,
                min_lr=optimizer.min_lr,
                weight_decay=optimizer.weight_decay,
                adam_beta1=optimizer.beta1,
                adam_beta2=optimizer.beta2,
                adam_eps=optimizer.eps,
                clip_grad=optimizer.clip_grad,
                params_dtype=self.gpt.config.params_dtype,
                bf16=self.gpt.config.bf16,
                use_distributed_optimizer=is_distributed,
            ),
            [self.ddp],
        )
        self.scheduler = OptimizerParamScheduler(
            self.optimizer,
            init_lr=optimizer.lr / (optimizer.warmup_steps + 1),  # a rate of 0 would waste the first rollouts
            max_lr=optimizer.lr,
            min_lr=optimizer.min_lr,
            lr_warmup_steps=optimizer.warmup_steps,
            lr_decay_steps=config.num_updates,
            lr_decay_style=optimizer.schedule,
            start_wd=optimizer.weight_decay,
            end_wd=optimizer.weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
            # A resumed run follows its configuration; by default the checkpoint's schedule would silently win.
            use_checkpoint_opt_param_scheduler=False,
            override_opt_param_scheduler=True,
        )
        self.gpt.config.finalize_model_grads_func = finalize_model_grads
        self.gpt.config.grad_scale_func = self.optimizer.scale_loss

    def load_training_state(self, optimizer: Any, scheduler: Any) -> None:
        """Load moments and counters of a checkpoint; learning rates stay those of the configuration."""
        self.optimizer.load_state_dict(optimizer)
        for group in self.optimizer.param_groups:
            group["max_lr"], group["min_lr"] = self.scheduler.max_lr, self.scheduler.min_lr
        self.scheduler.load_state_dict(scheduler)

    def update(self, minibatch: Minibatch, losses: Sequence[RowLoss]) -> UpdateResult:
        """Take one optimizer step on the sum of ``losses``, one per microbatch, over the global minibatch.

        A minibatch without a policy token leaves the weights unchanged, but advances the schedule.

        Raises:
            TrainingError: the loss or a gradient is not finite; the weights are unchanged.
        """
        learning_rate = float(self.optimizer.param_groups[0]["lr"])
        if minibatch.num_policy_tokens == 0:
            self.scheduler.step(increment=1)
            return UpdateResult(metrics={}, grad_norm=0.0, learning_rate=learning_rate)
        metrics = self.accumulate(minibatch.student, losses)
        is_updated, grad_norm, _ = self.optimizer.step()
        if not is_updated:
            raise TrainingError("the optimizer skipped the update: a gradient overflowed; lower optimizer.lr")
        self.scheduler.step(increment=1)
        return UpdateResult(metrics=metrics, grad_norm=float(grad_norm or 0.0), learning_rate=learning_rate)

    def accumulate(self, microbatches: Sequence[Microbatch], losses: Sequence[RowLoss]) -> dict[str, float]:
        """Write the all-reduced gradient of the summed losses to ``main_grad``; return the metrics on every rank.

        Raises:
            TrainingError: on all ranks: a metric or a gradient of any rank is not finite.
        """
        self.ddp.train()
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()

        def on_hidden(loss: RowLoss, hidden: Tensor, batch: Microbatch) -> tuple[Tensor, Metrics]:
            return loss(self.row_logits(hidden), batch)

        per_microbatch = forward_backward(
            self.ddp, microbatches, [partial(on_hidden, loss) for loss in losses], self.parallel
        )
        is_finite = torch.stack([p.main_grad.isfinite().all() for p in self.gpt.parameters()]).all()
        *parts, gradients = read_metrics([*per_microbatch, {"is_finite": is_finite}])
        # Tensor-parallel ranks hold equal metrics: one of them reports for its data-parallel rank.
        own = merge_metrics(parts) if self.parallel.tp_rank == 0 else {}
        gathered = self.parallel.all_gather_object((own, bool(gradients["is_finite"])))
        metrics = merge_metrics([part for part, _ in gathered])
        broken = [f"{name}={value}" for name, value in metrics.items() if not math.isfinite(value)]
        broken += [f"gradients of rank {rank}" for rank, (_, is_good) in enumerate(gathered) if not is_good]
        if broken:
            raise TrainingError(f"not finite: {', '.join(broken)}; the weights are unchanged; lower optimizer.lr")
        return metrics


def read_metrics(parts: Sequence[Metrics]) -> list[dict[str, float]]:
    """Copy 0-dim tensors of one device to the host in one transfer."""
    tensors = [value.double() for part in parts for value in part.values()]
    values = iter(torch.stack(tensors).tolist() if tensors else [])
    return [{name: next(values) for name in part} for part in parts]


def merge_metrics(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """Sum by name; names that end in ``_max`` take the maximum."""
    merged: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            combine = max if name.endswith("_max") else operator.add
            merged[name] = combine(merged[name], value) if name in merged else value
    return merged
