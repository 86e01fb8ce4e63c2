"""The simplest engine: every call is one greedy ``generate`` of stock transformers, without batching.

Shares no decoding code with ``embedded.py``, so that it can verify exported models and the other engine.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from megatron_sdsearch.errors import EngineError
from megatron_sdsearch.records import TrajectoryId
from megatron_sdsearch.rollout.checks import check_request
from megatron_sdsearch.rollout.engine import Generation, GenerationRequest
from megatron_sdsearch.tokenization.spans import TokenBytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _StopStrings(StoppingCriteria):
    """Ends generation once the new tokens' bytes hold a stop string."""

    def __init__(self, token_bytes: TokenBytes, stop: Sequence[str], prompt_length: int) -> None:
        self._token_bytes = token_bytes
        self._stop = [text.encode() for text in stop]
        self._prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: Any) -> Tensor:
        written = b"".join(self._token_bytes.lookup(input_ids[0, self._prompt_length :].tolist()))
        return torch.tensor([any(text in written for text in self._stop)], device=input_ids.device)


class PlainEngine:
    """Implements ``Engine`` for temperature 0; calls block the event loop.

    Args:
        model: a causal language model; its generation defaults (e.g. a repetition penalty) are replaced by plain
            greedy decoding. Its weights count as policy version 0.
        token_bytes: of the model's tokenizer, for stop strings.
        eos_ids: ids that end a generation.
        max_total_tokens: of prompt and new tokens together.
    """

    def __init__(
        self, model: PreTrainedModel, token_bytes: TokenBytes, eos_ids: Collection[int], max_total_tokens: int
    ) -> None:
        self._model: Any = model
        self._model.train(False)
        self._token_bytes = token_bytes
        self._eos_ids = sorted(eos_ids)
        self._max_total_tokens = max_total_tokens
        self._model.generation_config = GenerationConfig(
            do_sample=False, eos_token_id=self._eos_ids or None, pad_token_id=min(self._eos_ids, default=0)
        )

    async def generate(self, request: GenerationRequest) -> Generation:
        """Sample as ``Engine.generate`` does.

        Raises:
            EngineError: also for a temperature other than 0.
        """
        check_request(request, self._model.config.vocab_size, self._max_total_tokens)
        if request.params.temperature != 0.0:
            raise EngineError(f"the plain engine only samples at temperature 0, not {request.params.temperature}")
        prompt = torch.tensor([request.prompt_ids], device=self._model.device)
        stop_strings = _StopStrings(self._token_bytes, request.params.stop, len(request.prompt_ids))
        with torch.inference_mode():
            output = self._model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=request.params.max_new_tokens,
                stopping_criteria=StoppingCriteriaList([stop_strings]),
                output_logits=True,
                return_dict_in_generate=True,
            )
        new_ids: list[int] = output.sequences[0, len(request.prompt_ids) :].tolist()
        logprobs = torch.stack(output.logits)[:, 0].float().log_softmax(dim=-1)
        chosen = logprobs.gather(1, torch.tensor(new_ids, device=logprobs.device)[:, None])[:, 0]
        reason: Literal["stop", "eos", "length"] = "length"
        if stop_strings(output.sequences, None).item():
            reason = "stop"
        elif new_ids[-1] in self._eos_ids:
            reason = "eos"
        return Generation(
            token_ids=tuple(new_ids), logprobs=tuple(chosen.tolist()), finish_reason=reason, policy_version=0
        )

    async def release(self, trajectory_id: TrajectoryId) -> None:
        """Do nothing: no cache is kept between calls."""

    async def close(self) -> None:
        """Do nothing: there is nothing to release."""
