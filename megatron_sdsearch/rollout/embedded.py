"""A rollout engine in the trainer's own process: batched decoding of a plain transformers model.

``generate`` queues a request; one task per burst of requests admits them, decodes one token for every running row,
returns finished rows and yields to the event loop, so that some episodes search while others decode. Rows at different
turns share a step. Token ids and log-probabilities are those of the model, and depend on the other rows of the batch
only through float rounding (``sampling.py``). ``kv_cache.py`` defines the memory layout.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from megatron_sdsearch.errors import EngineError
from megatron_sdsearch.records import TrajectoryId
from megatron_sdsearch.rollout.checks import check_model, check_request
from megatron_sdsearch.rollout.engine import Generation, GenerationRequest
from megatron_sdsearch.rollout.kv_cache import SlotCache
from megatron_sdsearch.rollout.sampling import sample_tokens, uniforms
from megatron_sdsearch.tokenization.spans import StopMatcher, TokenBytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FinishReason = Literal["stop", "eos", "length"]
_Prefill = tuple[int, int, tuple[int, ...]]  # slot, start, new ids
_MAX_PREFILL_TOKENS = 8192  # padded tokens per forward pass; limits its mask and activations


class _Row:
    """A request that is waiting or running."""

    def __init__(self, request: GenerationRequest, answer: asyncio.Future[Generation]) -> None:
        params, start = request.params, len(request.prompt_ids)
        self.request = request
        self.answer = answer
        self.slot = -1
        self.next_input = request.prompt_ids[-1]
        self.matcher = StopMatcher(params.stop)
        self.uniforms = (
            np.zeros(params.max_new_tokens)
            if params.temperature == 0.0
            else uniforms(request.seed, request.trajectory_id, start, start + params.max_new_tokens)
        )
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []

    def push(self, token_id: int, logprob: float, token: bytes, eos_ids: Collection[int]) -> FinishReason | None:
        """Append a sampled token; return the finish reason, or None."""
        self.token_ids.append(token_id)
        self.logprobs.append(logprob)
        self.next_input = token_id
        if self.matcher.push(token):
            return "stop"
        if token_id in eos_ids:
            return "eos"
        return "length" if len(self.token_ids) == self.request.params.max_new_tokens else None


class EmbeddedEngine:
    """Implements ``Engine`` with a causal language model of transformers.

    Args:
        model: with full (not sliding-window) attention; set to evaluation mode, its weights are updated in place.
        token_bytes: of the model's tokenizer, for stop strings.
        eos_ids: ids that end a generation.
        max_total_tokens: of prompt and new tokens together.

    Attributes:
        policy_version: of the current weights; 0 for the model's initial ones.

    Raises:
        EngineError: the model's attention or number of positions is not supported.
    """

    def __init__(
        self, model: PreTrainedModel, token_bytes: TokenBytes, eos_ids: Collection[int], max_total_tokens: int
    ) -> None:
        check_model(model, max_total_tokens)
        self._model = model
        self._model.train(False)
        self._token_bytes = token_bytes
        self._eos_ids = frozenset(eos_ids)
        self._max_total_tokens = max_total_tokens
        self.policy_version = 0
        self._has_whole_weights = True
        self._cache = SlotCache()
        self._waiting: list[_Row] = []
        self._running: list[_Row] = []
        self._busy: set[TrajectoryId] = set()
        self._driver: asyncio.Task[None] | None = None

    async def generate(self, request: GenerationRequest) -> Generation:
        """Sample as ``Engine.generate`` does; one request at a time per trajectory."""
        check_request(request, self._model.config.vocab_size, self._max_total_tokens)
        if not self._has_whole_weights:
            raise EngineError("the last load_weights failed half-way; load all weights before sampling")
        if request.trajectory_id in self._busy:
            raise EngineError(f"{request.trajectory_id}: a request is already open")
        loop = asyncio.get_running_loop()
        row = _Row(request, loop.create_future())
        self._waiting.append(row)
        self._busy.add(request.trajectory_id)
        if self._driver is None or self._driver.done():
            self._driver = loop.create_task(self._drive())
        try:
            return await row.answer
        except asyncio.CancelledError:  # a cancelled caller must not keep its row in the batch
            self._waiting = [other for other in self._waiting if other is not row]
            self._running = [other for other in self._running if other is not row]
            raise
        finally:
            self._busy.discard(request.trajectory_id)

    async def release(self, trajectory_id: TrajectoryId) -> None:
        """Free the trajectory's slot."""
        self._cache.release(trajectory_id)

    async def close(self) -> None:
        """Stop decoding; waiting callers get an EngineError."""
        if self._driver is not None and not self._driver.done():
            self._driver.cancel()
            await asyncio.gather(self._driver, return_exceptions=True)
        self._fail(EngineError("the engine was closed"))

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], policy_version: int) -> None:
        """Copy new weights into the model in place and clear the cache.

        Args:
            named_tensors: with the names of the model's ``state_dict``; one of several tied tensors is enough.
            policy_version: of these weights.

        Raises:
            EngineError: a name is unknown or missing, a shape or dtype differs, or a generation is under way. Except in
                the last case the weights are then a mixture, and ``generate`` fails until all weights are loaded.
        """
        if num_open := len(self._waiting) + len(self._running):
            raise EngineError(f"weights cannot change while {num_open} generations are under way")
        self._has_whole_weights = False
        self._cache = SlotCache()
        own = self._model.state_dict()
        written = set()
        for name, tensor in named_tensors:
            if name not in own:
                raise EngineError(f"weight {name} is unknown to {type(self._model).__name__}")
            if tensor.shape != own[name].shape:
                raise EngineError(f"weight {name} has shape {tuple(tensor.shape)}, expected {tuple(own[name].shape)}")
            if tensor.dtype != own[name].dtype:
                raise EngineError(
                    f"weight {name} is {tensor.dtype}, the engine's is {own[name].dtype}; build it with the same dtype"
                )
            own[name].copy_(tensor)
            written.add(own[name].data_ptr())
        missing = [
            name for name, tensor in own.items() if tensor.data_ptr() not in written
        ]  # tied tensors share an address
        if missing:
            raise EngineError(f"{len(missing)} weights are missing, the first is {missing[0]}")
        self._has_whole_weights = True
        self.policy_version = policy_version

    async def _drive(self) -> None:
        try:
            while self._waiting or self._running:
                self._step()
                await asyncio.sleep(0)
        except Exception as error:  # noqa: BLE001  # no caller may wait for ever
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        failure = error if isinstance(error, EngineError) else EngineError(f"decoding failed: {error!r}")
        failure.__cause__ = None if failure is error else error
        for row in self._waiting + self._running:
            if not row.answer.done():
                row.answer.set_exception(failure)
        self._waiting, self._running, self._cache = [], [], SlotCache()

    @torch.inference_mode()
    def _step(self) -> None:
        """Admit the waiting requests, then decode one token for every running row."""
        admitted, self._waiting = self._waiting, []
        self._running += admitted  # before anything that may fail, so that a failure reaches them
        for row in admitted:
            row.slot = self._cache.acquire(row.request.trajectory_id)
        self._prefill(admitted)
        self._compact_slots()
        logits = self._decode()
        params = [row.request.params for row in self._running]
        ids, logprobs = sample_tokens(
            logits,
            temperature=np.array([p.temperature for p in params]),
            top_p=np.array([p.top_p for p in params]),
            uniform=np.array([row.uniforms[len(row.token_ids)] for row in self._running]),
        )
        running = []
        for row, token_id, logprob in zip(self._running, ids.tolist(), logprobs.tolist(), strict=True):
            self._cache.token_ids[row.slot].append(row.next_input)
            reason = row.push(token_id, logprob, self._token_bytes[token_id], self._eos_ids)
            if reason is None:
                running.append(row)
            elif not row.answer.done():
                row.answer.set_result(
                    Generation(
                        token_ids=tuple(row.token_ids),
                        logprobs=tuple(row.logprobs),
                        finish_reason=reason,
                        policy_version=self.policy_version,
                    )
                )
        self._running = running

    def _prefill(self, rows: list[_Row]) -> None:
        """Compute keys and values of all new prompt tokens but the last, the input of the next decode step.

        Siblings that start together share the computation of their prompt.
        """
        prefills = []
        siblings: dict[tuple[int, ...], list[int]] = {}
        for row in rows:
            start = self._cache.keep_prefix(row.slot, row.request.prompt_ids)
            new_ids = row.request.prompt_ids[start:-1]
            if start == 0 and new_ids in siblings:
                siblings[new_ids].append(row.slot)
            elif new_ids:
                prefills.append((row.slot, start, new_ids))
                if start == 0:
                    siblings[new_ids] = []
        for part in _batch_prefills(prefills):
            width = max(len(ids) for _, _, ids in part)
            slots = self._tensor([slot for slot, _, _ in part])
            starts = self._tensor([start for _, start, _ in part])
            ids = self._tensor([[*ids, *[0] * (width - len(ids))] for _, _, ids in part])
            positions = starts[:, None] + torch.arange(width, device=starts.device)
            visible = self._cache.point_at(slots, slots[:, None], positions)
            self._forward(self._model.base_model, ids, positions, visible)
            for slot, start, new_ids in part:
                self._cache.token_ids[slot] += new_ids
                if start == 0:
                    self._cache.copy_prefix(slot, siblings[new_ids], len(new_ids))

    def _compact_slots(self) -> None:
        """Move running rows to the lowest slots if fewer than half of the rows that a step computes are running."""
        num_running = len(self._running)
        if max(row.slot for row in self._running) < 2 * num_running:
            return
        taken = {row.slot for row in self._running}
        holes = iter([slot for slot in range(num_running) if slot not in taken])
        for row in self._running:
            if row.slot >= num_running:
                hole = next(holes)
                self._cache.swap(row.slot, hole)
                row.slot = hole

    def _decode(self) -> Tensor:
        """Return [running, V] logits of each running row's next token.

        Computes all slots up to the highest running one: reading them in place is cheaper than gathering the running
        ones. Idle slots get an arbitrary token at their end, which is overwritten later.
        """
        span = max(row.slot for row in self._running) + 1
        ids = [0] * span
        for row in self._running:
            ids[row.slot] = row.next_input
        lengths = [len(held) for held in self._cache.token_ids[:span]]
        positions = self._tensor(lengths)[:, None]
        rows = torch.arange(span, device=positions.device)[:, None]
        visible = self._cache.point_at(slice(0, span), rows, positions)
        output = self._forward(self._model, self._tensor(ids)[:, None], positions, visible)
        logits: Tensor = output.logits[:, -1]
        slots = [row.slot for row in self._running]
        return logits if slots == list(range(span)) else logits[self._tensor(slots)]

    def _forward(self, module: torch.nn.Module, ids: Tensor, positions: Tensor, visible: int) -> Any:
        """Run ``module`` on [n, m] ids with causal attention."""
        mask = torch.arange(visible, device=positions.device) <= positions[:, None, :, None]
        return module(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=self._cache, use_cache=True
        )

    def _tensor(self, values: list[int] | list[list[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self._model.device)


def _batch_prefills(prefills: Sequence[_Prefill]) -> Iterator[list[_Prefill]]:
    """Group prefills of similar lengths, each group within the padded-token budget or a single row."""
    part: list[_Prefill] = []
    for prefill in sorted(prefills, key=lambda prefill: len(prefill[2])):
        if part and (len(part) + 1) * len(prefill[2]) > _MAX_PREFILL_TOKENS:
            yield part
            part = []
        part.append(prefill)
    if part:
        yield part
