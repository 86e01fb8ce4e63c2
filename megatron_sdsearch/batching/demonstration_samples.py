"""From a demonstration to a training sample of the warm start."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from megatron_sdsearch.batching.samples import next_token_aligned
from megatron_sdsearch.data.demonstrations import Demonstration
from megatron_sdsearch.errors import DataError
from megatron_sdsearch.records import TrainingSample

if TYPE_CHECKING:
    from megatron_sdsearch.tokenization.renderer import Renderer


def demonstration_sample(demonstration: Demonstration, renderer: Renderer, max_tokens: int) -> TrainingSample:
    """Encode each span once, in place: as rollouts would, what is observed as text from outside.

    Raises:
        DataError: the demonstration is longer than ``max_tokens``, or its sampled text has no tokens.
    """
    prompt = renderer.prompt_ids(demonstration.prompt)
    pieces = [
        renderer.encode_own(span.text) if span.kind == "sampled" else renderer.encode(span.text)
        for span in demonstration.spans
    ]
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
    if not np.concatenate(is_sampled).any():
        raise DataError(
            f"demonstration {demonstration.demonstration_id}: the tokenizer makes no token of its sampled text, so "
            "there is nothing to learn: remove it"
        )
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
