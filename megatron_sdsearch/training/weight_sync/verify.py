"""Proof that the servers hold what the trainer holds.

On CPU exactly: SGLang's hashes of all its tensors, computed here from the policy's. On GPUs its hash is a kernel's, so
there log-probabilities of a fixed sequence are compared instead.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from megatron_sdsearch.batching.packing import pack
from megatron_sdsearch.config import ObjectiveConfig
from megatron_sdsearch.errors import EngineError
from megatron_sdsearch.parallel.groups import ParallelState
from megatron_sdsearch.records import TrainingSample
from megatron_sdsearch.training.policy import Network
from megatron_sdsearch.training.weight_sync.fleet import ServerFleet

NUM_PROBE_TOKENS = 64
# Largest difference of one token's log-probability, nats: kernels sum in other orders.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5}
_VOCAB_MULTIPLE = 64  # rows that SGLang pads its vocabulary tables to, with zeros
_FUSED = ((re.compile(r"\.[qkv]_proj\."), ".qkv_proj."), (re.compile(r"\.(gate|up)_proj\."), ".gate_up_proj."))


def verify(
    policy: Network, fleet: ServerFleet, urls: Sequence[str], parallel: ParallelState, *, server_tp_size: int
) -> None:
    """Compare what every server holds with the policy, on all ranks together.

    Raises:
        EngineError: on the first rank: a server holds something else.
    """
    if parallel.device.type == "cpu" and server_tp_size == 1:
        verify_hashes(policy, fleet, urls, parallel)
    else:
        verify_logprobs(policy, fleet, urls, parallel)


def expected_hashes(weights: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """Hugging Face tensors -> name of SGLang's tensor, and its hash.

    SHA-256 of the bytes, its first 8 bytes in hexadecimal (sglang/srt/managers/mm_utils.py:899, 0.5.23). SGLang joins
    q, k, v and gate, up by rows, in this order, which is the order of the stream.
    """
    hashes: dict[str, hashlib._Hash] = {}
    for name, tensor in weights:
        fused = name
        for pattern, replacement in _FUSED:
            fused = pattern.sub(replacement, fused)
        digest = hashes.setdefault(fused, hashlib.sha256())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        if name in ("model.embed_tokens.weight", "lm_head.weight") and (extra := -len(tensor) % _VOCAB_MULTIPLE):
            digest.update(bytes(extra * tensor[0].nbytes))
    return {name: digest.hexdigest()[:16] for name, digest in hashes.items()}


def verify_hashes(policy: Network, fleet: ServerFleet, urls: Sequence[str], parallel: ParallelState) -> None:
    """By SGLang's own hashes of all its tensors: exact, for servers on a CPU and of one rank. Raises as ``verify``."""
    expected = expected_hashes(policy.hf_weights())
    if not parallel.is_main:
        return
    for url, answer in zip(urls, fleet.call(urls, lambda server: server.weights_checker("checksum")), strict=True):
        held = answer["ranks"][0]["checksums"]
        wrong = sorted(name for name in expected.keys() | held.keys() if expected.get(name) != held.get(name))
        if wrong:
            raise EngineError(
                f"{url} does not hold the published weights: {len(wrong)} of {len(expected)} tensors differ, "
                f"the first is {wrong[0]}"
            )


def verify_logprobs(policy: Network, fleet: ServerFleet, urls: Sequence[str], parallel: ParallelState) -> None:
    """By what they compute on a fixed sequence, within ``TOLERANCE``: for any server. Raises as ``verify``."""
    ids = probe_ids(policy.hf_config.vocab_size)
    expected = trainer_logprobs(policy, ids, parallel)
    if not parallel.is_main:
        return
    limit = TOLERANCE[next(policy.gpt.parameters()).dtype]
    request = {
        "input_ids": ids,
        "sampling_params": {"temperature": 0.0, "max_new_tokens": 0},
        "return_logprob": True,
        "logprob_start_len": 0,  # everything afresh: the prefix cache is not asked
    }
    for url, answer in zip(urls, fleet.call(urls, lambda server: server.generate(request)), strict=True):
        served = [entry[0] for entry in answer["meta_info"]["input_token_logprobs"][1:]]
        gap = float(np.abs(np.array(served) - np.array(expected)).max())
        if not gap <= limit:
            raise EngineError(
                f"{url} does not hold the published weights: log-probabilities differ by up to {gap:.4g} nats"
            )


def probe_ids(vocab_size: int) -> list[int]:
    """The fixed sequence."""
    return [int(i) for i in np.random.Generator(np.random.PCG64(0)).integers(0, vocab_size, NUM_PROBE_TOKENS)]


def trainer_logprobs(policy: Network, ids: Sequence[int], parallel: ParallelState) -> list[float]:
    """Log-probabilities (nats, temperature 1) of all ids but the first under the policy, on every rank."""
    array = np.array(ids)
    is_label = np.arange(len(ids)) < len(ids) - 1
    sample = TrainingSample(
        sample_id="probe",
        token_ids=array,
        labels=np.append(array[1:], 0),
        loss_mask=is_label,
        distill_mask=np.zeros(len(ids), dtype=np.bool_),
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
        lambda logits, part: replace(logits, temperature=1.0).logprobs(part),
    )
    own = values[0].tolist() if values else None
    return next(found for found in parallel.all_gather_object(own) if found is not None)
