"""Supervised fine-tuning on demonstrations, through the same policy, packing and schedule as reinforcement learning."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from megatron_sdsearch.batching.samples import next_token_aligned
from megatron_sdsearch.config import RunConfig
from megatron_sdsearch.data.demonstrations import Demonstration, DemonstrationSampler, read_demonstrations
from megatron_sdsearch.errors import DataError
from megatron_sdsearch.loss.objective import Metrics, RowLogits, supervised_loss
from megatron_sdsearch.parallel.groups import ParallelState
from megatron_sdsearch.parallel.schedule import DeviceMicrobatch
from megatron_sdsearch.records import Minibatch, TrainingSample
from megatron_sdsearch.tokenization.renderer import Renderer
from megatron_sdsearch.training.policy import Policy, UpdateResult
from megatron_sdsearch.training.updates import pack_samples


class WarmStart:
    """One update per step on a batch that is a pure function of (seed, step)."""

    def __init__(self, config: RunConfig, policy: Policy, parallel: ParallelState) -> None:
        assert config.train.demonstrations is not None  # RunConfig has checked it
        demonstrations = read_demonstrations(config.train.demonstrations)
        self._sampler = DemonstrationSampler(demonstrations, config.seed, config.train.demonstrations_per_step)
        self.renderer = Renderer.from_folder(config.model.hf_dir)
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


def demonstration_sample(demonstration: Demonstration, renderer: Renderer, max_tokens: int) -> TrainingSample:
    """Encode each span once, in place.

    Raises:
        DataError: the demonstration is longer than ``max_tokens``.
    """
    prompt = renderer.prompt_ids(demonstration.prompt)
    pieces = [renderer.encode(span.text) for span in demonstration.spans]
    ids = np.asarray([*prompt, *(token for piece in pieces for token in piece)], dtype=np.int64)
    if len(ids) > max_tokens:
        raise DataError(
            f"demonstration {demonstration.demonstration_id} has {len(ids)} tokens, more than "
            f"train.max_tokens_per_microbatch = {max_tokens}: shorten it or raise the budget"
        )
    is_sampled = [np.zeros(len(prompt), dtype=np.bool_)]
    is_sampled += [
        np.full(len(piece), span.kind == "sampled") for piece, span in zip(pieces, demonstration.spans, strict=True)
    ]
    return TrainingSample(
        sample_id=demonstration.demonstration_id,
        token_ids=ids,
        labels=next_token_aligned(ids),
        loss_mask=next_token_aligned(np.concatenate(is_sampled)),
        query_mask=np.zeros(len(ids), dtype=np.bool_),
        rollout_logprobs=np.zeros(len(ids)),
        advantage=0.0,
        prompt_length=len(prompt),
    )


def _loss(logits: RowLogits, batch: DeviceMicrobatch) -> tuple[Tensor, Metrics]:
    return supervised_loss(logits, batch.policy_rows, batch.policy_labels, batch.policy_weights)
