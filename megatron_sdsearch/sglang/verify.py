"""Proof that the servers hold what the trainer holds.

On CPU exactly: SGLang's hashes of all its tensors, computed here while the tensors are sent. On GPUs its hash is a
kernel's, so there log-probabilities of a fixed sequence are compared instead.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from megatron_sdsearch.batching.packing import pack
from megatron_sdsearch.config import ObjectiveConfig
from megatron_sdsearch.errors import EngineError
from megatron_sdsearch.loss.objective import policy_logprobs
from megatron_sdsearch.parallel.groups import ParallelState
from megatron_sdsearch.records import TrainingSample
from megatron_sdsearch.sglang.api import SGLangServer, call_servers

if TYPE_CHECKING:
    from megatron_sdsearch.training.policy import Network

NUM_PROBE_TOKENS = 64
# Largest difference of one token's log-probability, nats: kernels sum in other orders.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5}
_VOCAB_MULTIPLE = 64  # rows that SGLang pads its vocabulary tables to, with zeros
_FUSED = ((re.compile(r"\.[qkv]_proj\."), ".qkv_proj."), (re.compile(r"\.(gate|up)_proj\."), ".gate_up_proj."))


class WeightHashes:
    """Hashes of SGLang's tensors, taken from Hugging Face tensors that pass by.

    SHA-256 of the bytes, its first 8 bytes in hexadecimal (sglang/srt/managers/mm_utils.py:899, 0.5.23). SGLang joins
    q, k, v and gate, up by rows, in this order, which is the order of the stream.

    Attributes:
        is_needed: else streams pass by untouched.
    """

    def __init__(self, *, is_needed: bool) -> None:
        self.is_needed = is_needed
        self._hashes: dict[str, hashlib._Hash] = {}

    def watch(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Pass a stream on, and add its tensors."""
        for name, tensor in weights:
            if self.is_needed:
                fused = name
                for pattern, replacement in _FUSED:
                    fused = pattern.sub(replacement, fused)
                digest = self._hashes.setdefault(fused, hashlib.sha256())
                digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
                if name in ("model.embed_tokens.weight", "lm_head.weight"):
                    digest.update(bytes(-len(tensor) % _VOCAB_MULTIPLE * tensor[0].nbytes))
            yield name, tensor

    def by_name(self) -> dict[str, str]:
        """Return the hash of each of SGLang's tensors."""
        return {name: digest.hexdigest()[:16] for name, digest in self._hashes.items()}


def verify_hashes(servers: Sequence[SGLangServer], parallel: ParallelState, hashes: WeightHashes) -> None:
    """Compare SGLang's own hashes of all its tensors with those of what was sent: exact; a collective.

    Args:
        servers: to ask; those of the first rank count.
        parallel: ranks of the trainer.
        hashes: of what this rank has gathered.

    Raises:
        EngineError: on the first rank: a server holds something else.
    """
    expected: dict[str, str] = {}
    for of_rank in parallel.all_gather_object(hashes.by_name()):  # each pipeline stage may have sent its own
        expected |= of_rank
    answers = call_servers(servers, lambda server: server.call("/weights_checker", {"action": "checksum"}))
    for server, answer in zip(servers, answers, strict=True):
        held = answer["ranks"][0]["checksums"]
        wrong = sorted(name for name in expected.keys() | held.keys() if expected.get(name) != held.get(name))
        if wrong:
            raise EngineError(
                f"{server.url} does not hold the published weights: {len(wrong)} of {len(expected)} tensors differ, "
                f"the first is {wrong[0]}"
            )


def verify_logprobs(policy: Network, servers: Sequence[SGLangServer], parallel: ParallelState) -> None:
    """Compare what servers compute on a fixed sequence, within ``TOLERANCE``. Raises as ``verify_hashes``."""
    ids = probe_ids(policy.hf_config.vocab_size)
    expected = trainer_logprobs(policy, ids, parallel)
    limit = TOLERANCE[next(policy.gpt.parameters()).dtype]
    request = {
        "input_ids": ids,
        "sampling_params": {"temperature": 0.0, "max_new_tokens": 0},
        "return_logprob": True,
        "logprob_start_len": 0,  # everything afresh: the prefix cache is not asked
    }
    answers = call_servers(servers, lambda server: server.call("/generate", request))
    for server, answer in zip(servers, answers, strict=True):
        served = [entry[0] for entry in answer["meta_info"]["input_token_logprobs"][1:]]
        gap = float(np.abs(np.array(served) - np.array(expected)).max())
        if not gap <= limit:
            raise EngineError(
                f"{server.url} does not hold the published weights: log-probabilities differ by up to {gap:.4g} nats"
            )


def probe_ids(vocab_size: int) -> list[int]:
    """Return the fixed sequence."""
    return [int(i) for i in np.random.Generator(np.random.PCG64(0)).integers(0, vocab_size, NUM_PROBE_TOKENS)]


def trainer_logprobs(policy: Network, ids: Sequence[int], parallel: ParallelState) -> list[float]:
    """Return log-probabilities (nats, temperature 1) of all ids but the first under the policy, on every rank."""
    array = np.array(ids)
    is_label = np.arange(len(ids)) < len(ids) - 1
    sample = TrainingSample(
        sample_id="probe",
        token_ids=array,
        labels=np.append(array[1:], 0),
        loss_mask=is_label,
        query_mask=np.zeros(len(ids), dtype=np.bool_),
        rollout_logprobs=np.zeros(len(ids)),
        advantage=1.0,
        prompt_length=1,
    )
    batch = pack(
        [sample],
        num_ranks=1,  # every replica reads it
        rank=0,
        num_minibatches=1,
        max_tokens=len(ids) + parallel.alignment,
        alignment=parallel.alignment,
        equal_lengths=parallel.pp_size > 1,
        objective=ObjectiveConfig(),
    )
    values = policy.collect(
        batch.minibatches[0].student,
        lambda logits, part: policy_logprobs(replace(logits, temperature=1.0), part.policy_rows, part.policy_labels),
    )
    own = values[0].tolist() if values else None
    return next(found for found in parallel.all_gather_object(own) if found is not None)
