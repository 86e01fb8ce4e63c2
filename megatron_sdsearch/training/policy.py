"""The policy: a megatron model with DDP, optimizer and schedule; one update, and forward-only reads of it.

Which losses are summed is ``loss/objective.py``'s; when is ``training/loop.py``'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor
from transformers import PretrainedConfig

from megatron_sdsearch.config import ModelConfig, OptimizerConfig, RunConfig
from megatron_sdsearch.errors import TrainingError
from megatron_sdsearch.loss.objective import RowLogits, policy_logprobs
from megatron_sdsearch.model.architecture import LMHead, build_model
from megatron_sdsearch.model.hf_config import load_hf_config
from megatron_sdsearch.model.hf_weights import (
    HFTensors,
    SafetensorsFolder,
    export_hf_weights,
    export_stage_weights,
    load_weights,
)
from megatron_sdsearch.model.megatron_folder import MegatronFolder
from megatron_sdsearch.parallel.groups import ParallelState
from megatron_sdsearch.parallel.schedule import DeviceMicrobatch, forward_backward, forward_collect
from megatron_sdsearch.records import Microbatch, Minibatch

Metrics = dict[str, float]
RowLoss = Callable[[RowLogits, DeviceMicrobatch], tuple[Tensor, dict[str, Tensor]]]
"""(logits on demand, batch) -> (scalar sum with global weights, 0-dim metrics with global weights)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateResult:
    """What one optimizer update did, equal on every rank.

    Attributes:
        metrics: sums of globally weighted metrics over microbatches and data-parallel ranks; names that end in
            ``_max`` are maxima.
        grad_norm: before clipping; 0 when there was nothing to learn from.
        learning_rate: used by this update.
    """

    metrics: Metrics
    grad_norm: float
    learning_rate: float


def starting_weights(model: ModelConfig, hf_config: PretrainedConfig) -> tuple[HFTensors, Path]:
    """What ``Network.load`` fills a model from, and where that is.

    Raises:
        DataError, CheckpointError: it cannot be read.
    """
    if model.megatron_dir is not None:
        return MegatronFolder(model.megatron_dir, hf_config), model.megatron_dir
    return SafetensorsFolder(model.hf_dir), model.hf_dir


class Network:
    """A model stage and its head, for forward-only reads: the policy itself, or its frozen reference."""

    def __init__(
        self,
        gpt: GPTModel,
        hf_config: PretrainedConfig,
        model: ModelConfig,
        parallel: ParallelState,
        temperature: float,
    ) -> None:
        self.gpt = gpt
        self.hf_config = hf_config
        self.parallel = parallel
        self.temperature = temperature
        self._chunk_rows = model.logits_chunk_tokens

    @classmethod
    def load(cls, config: RunConfig, parallel: ParallelState) -> Network:
        """Build this rank's stage and fill it from ``model.hf_dir``, or ``model.megatron_dir`` where it is given."""
        hf_config = load_hf_config(config.model.hf_dir)
        gpt = build_model(hf_config, config.model, parallel)
        load_weights(gpt, *starting_weights(config.model, hf_config), hf_config, parallel)
        temperature = config.rollout.temperature if config.train.mode == "rl" else 1.0
        return cls(gpt, hf_config, config.model, parallel, temperature)

    def row_logits(self, hidden: Tensor) -> RowLogits:
        """Logits on demand for the rows of one packed microbatch."""
        head = LMHead.of(self.gpt, self.hf_config, self.parallel)
        return RowLogits(
            hidden=head.gather(hidden),
            project=head.logits,
            shard=head.shard,
            chunk_rows=self._chunk_rows,
            temperature=self.temperature,
        )

    def collect(
        self, microbatches: Sequence[Microbatch], read: Callable[[RowLogits, DeviceMicrobatch], Any]
    ) -> list[Any]:
        """Forward only: what ``read`` returns for each microbatch on the last stage, nothing on the others."""
        self.gpt.eval()
        return forward_collect(
            self.gpt, microbatches, lambda hidden, batch: read(self.row_logits(hidden), batch), self.parallel
        )

    def logprobs(self, minibatch: Minibatch) -> list[Tensor]:
        """[N] log-probabilities (nats) of each microbatch's policy tokens; empty off the last stage."""
        return self.collect(
            minibatch.student, lambda logits, batch: policy_logprobs(logits, batch.policy_rows, batch.policy_labels)
        )

    def hf_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Whole tensors under their Hugging Face names, on every rank; all ranks must drain it."""
        return export_hf_weights(self.gpt, self.hf_config, self.parallel)

    def stage_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Whole tensors of this rank's pipeline stage; all ranks of its tensor-parallel group must drain it."""
        return export_stage_weights(self.gpt, self.hf_config, self.parallel)


class Policy(Network):
    """The network that learns."""

    def __init__(self, network: Network, config: RunConfig) -> None:
        super().__init__(network.gpt, network.hf_config, config.model, network.parallel, network.temperature)
        is_distributed = config.parallel.distributed_optimizer
        self.ddp = DistributedDataParallel(
            config=self.gpt.config,
            ddp_config=DistributedDataParallelConfig(
                grad_reduce_in_fp32=True, use_distributed_optimizer=is_distributed
            ),
            module=self.gpt,
        )
        self.optimizer: MegatronOptimizer = get_megatron_optimizer(
            _megatron_optimizer_config(config.optimizer, self.gpt.config, is_distributed=is_distributed), [self.ddp]
        )
        self.scheduler = _scheduler(self.optimizer, config.optimizer, config.num_updates)
        self.gpt.config.finalize_model_grads_func = finalize_model_grads
        self.gpt.config.grad_scale_func = self.optimizer.scale_loss

    @classmethod
    def build(cls, config: RunConfig, parallel: ParallelState) -> Policy:
        """The policy at its starting weights with a fresh optimizer."""
        return cls(Network.load(config, parallel), config)

    def load_training_state(self, optimizer: Any, scheduler: Any) -> None:
        """Take over moments and counters of a checkpoint; rates stay those of this run's configuration."""
        self.optimizer.load_state_dict(optimizer)
        for group in self.optimizer.param_groups:
            group["max_lr"], group["min_lr"] = self.scheduler.max_lr, self.scheduler.min_lr
        self.scheduler.load_state_dict(scheduler)

    def update(self, minibatch: Minibatch, loss: RowLoss) -> UpdateResult:
        """One optimizer step on the gradient of ``loss`` summed over the global minibatch.

        Without a policy token the weights stay as they are; the schedule counts the update all the same.

        Raises:
            TrainingError: the loss or a gradient is not finite; the weights are as before.
        """
        learning_rate = float(self.optimizer.param_groups[0]["lr"])
        if minibatch.num_policy_tokens == 0:
            self.scheduler.step(increment=1)
            return UpdateResult(metrics={}, grad_norm=0.0, learning_rate=learning_rate)
        metrics = self.accumulate(minibatch.student, loss)
        is_updated, grad_norm, _ = self.optimizer.step()
        if not is_updated:
            raise TrainingError("the optimizer skipped the update: a gradient overflowed; lower optimizer.lr")
        self.scheduler.step(increment=1)
        return UpdateResult(metrics=metrics, grad_norm=float(grad_norm or 0.0), learning_rate=learning_rate)

    def accumulate(self, microbatches: Sequence[Microbatch], loss: RowLoss) -> Metrics:
        """Gradient of the summed loss, all-reduced, in the parameters' ``main_grad``; its metrics on every rank.

        Raises:
            TrainingError: on all ranks alike, when a metric or a gradient of any rank is not finite.
        """
        self.ddp.train()
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        per_microbatch = forward_backward(
            self.ddp, microbatches, lambda hidden, batch: loss(self.row_logits(hidden), batch), self.parallel
        )
        return self._reduce(per_microbatch)

    def _reduce(self, per_microbatch: Sequence[dict[str, Tensor]]) -> Metrics:
        is_finite = torch.stack([p.main_grad.isfinite().all() for p in self.gpt.parameters()]).all()
        *parts, gradients = read_metrics([*per_microbatch, {"is_finite": is_finite}])
        # Tensor-parallel ranks hold equal metrics: one of them speaks for its data-parallel rank.
        own = merge_metrics(parts) if self.parallel.tp_rank == 0 else {}
        gathered = self.parallel.all_gather_object((own, bool(gradients["is_finite"])))
        metrics = merge_metrics([part for part, _ in gathered])
        broken = [f"{name}={value}" for name, value in metrics.items() if not math.isfinite(value)]
        broken += [f"gradients of rank {rank}" for rank, (_, is_good) in enumerate(gathered) if not is_good]
        if broken:
            raise TrainingError(f"not finite: {', '.join(broken)}; the weights are as before: lower optimizer.lr")
        return metrics


def read_metrics(parts: Sequence[dict[str, Tensor]]) -> list[Metrics]:
    """Bring 0-dim tensors of one device to the host, all in one transfer."""
    tensors = [value.double() for part in parts for value in part.values()]
    values = iter(torch.stack(tensors).tolist() if tensors else [])
    return [{name: next(values) for name in part} for part in parts]


def merge_metrics(parts: Sequence[Metrics]) -> Metrics:
    """Sum by name; names that end in ``_max`` take the maximum."""
    merged: Metrics = {}
    for part in parts:
        for name, value in part.items():
            if name not in merged:
                merged[name] = value
            elif name.endswith("_max"):
                merged[name] = max(merged[name], value)
            else:
                merged[name] += value
    return merged


def _megatron_optimizer_config(config: OptimizerConfig, model: Any, *, is_distributed: bool) -> MegatronOptimizerConfig:
    return MegatronOptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.eps,
        clip_grad=config.clip_grad,
        params_dtype=model.params_dtype,
        bf16=model.bf16,
        use_distributed_optimizer=is_distributed,
    )


def _scheduler(optimizer: MegatronOptimizer, config: OptimizerConfig, num_updates: int) -> OptimizerParamScheduler:
    return OptimizerParamScheduler(
        optimizer,
        init_lr=config.lr / (config.warmup_steps + 1),  # an update at a rate of 0 would waste a step's rollouts
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.warmup_steps,
        lr_decay_steps=num_updates,
        lr_decay_style=config.schedule,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        # A resumed run follows its configuration; by default the checkpoint's schedule would win without a word.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
