"""Supervised fine-tuning on demonstrations, through the same policy, packing and schedule as reinforcement learning."""

from __future__ import annotations

from torch import Tensor

from megatron_sdsearch.batching.demonstration_samples import demonstration_sample
from megatron_sdsearch.config import RunConfig
from megatron_sdsearch.data.demonstrations import DemonstrationSampler, check_profile, read_demonstrations
from megatron_sdsearch.data.prompts import get_profile
from megatron_sdsearch.loss.objective import Metrics, RowLogits, supervised_loss
from megatron_sdsearch.parallel.groups import ParallelState
from megatron_sdsearch.parallel.schedule import DeviceMicrobatch
from megatron_sdsearch.records import Minibatch
from megatron_sdsearch.tokenization.renderer import Renderer
from megatron_sdsearch.training.policy import Policy, UpdateResult
from megatron_sdsearch.training.updates import pack_samples


class WarmStart:
    """One update per step on a batch that is a pure function of (seed, step)."""

    def __init__(self, config: RunConfig, policy: Policy, parallel: ParallelState, renderer: Renderer) -> None:
        assert config.train.demonstrations is not None  # RunConfig has checked it
        demonstrations = read_demonstrations(config.train.demonstrations)
        check_profile(demonstrations, get_profile(config.data.prompt_profile))
        self._sampler = DemonstrationSampler(demonstrations, config.seed, config.train.demonstrations_per_step)
        self.renderer = renderer
        self._config = config
        self._policy = policy
        self._parallel = parallel

    def learn(self, minibatch: Minibatch) -> UpdateResult:
        """One update; the loss is on sampled spans alone."""
        return self._policy.update(minibatch, _loss)

    def minibatch(self, step: int) -> Minibatch:
        """The step's demonstrations, packed."""
        budget = self._config.train.max_tokens_per_microbatch
        samples = [demonstration_sample(row, self.renderer, budget) for row in self._sampler.batch(step)]
        batch = pack_samples(samples, self._config, self._parallel)
        return batch.minibatches[0]


def _loss(logits: RowLogits, batch: DeviceMicrobatch) -> tuple[Tensor, Metrics]:
    return supervised_loss(logits, batch.policy_rows, batch.policy_labels, batch.policy_weights)
