"""Verifies a conversion by comparing the logits of a megatron checkpoint and a Hugging Face folder.

transformers loads the folder and megatron-core's dist_checkpointing the checkpoint; no conversion code is involved.
"""

from __future__ import annotations

from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_sdsearch.config import ModelConfig, ParallelConfig
from megatron_sdsearch.errors import VerificationError
from megatron_sdsearch.model.architecture import LMHead, build_model
from megatron_sdsearch.model.hf_config import load_hf_config
from megatron_sdsearch.model.megatron_folder import read_metadata
from megatron_sdsearch.parallel.groups import ParallelState

# Relative. Another order of summation in float32 changes logits by about 1e-6, a wrong tensor by about 1.
TOLERANCE = 1e-3
_NUM_TOKENS = 64


@torch.no_grad()
def check_same_logits(hf_dir: Path, checkpoint: Path) -> tuple[float, float]:
    """Compare the logits of both sides on random ids, in float32, one model after the other.

    Needs memory for one whole model, and this process's default process group.

    Returns:
        The largest absolute difference of two logits, and the largest absolute logit of the Hugging Face model.

    Raises:
        VerificationError: the logits differ, or are not finite.
    """
    parallel = ParallelState.initialize(ParallelConfig(), seed=1)
    try:
        config = load_hf_config(hf_dir)
        length = min(_NUM_TOKENS, config.max_position_embeddings)
        ids = torch.randint(config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
        expected = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32)(ids).logits[0]
        largest = float((megatron_logits(hf_dir, checkpoint, ids, parallel) - expected).abs().max())
    finally:
        parallel.shutdown()
    scale = float(expected.abs().max())
    if not largest <= TOLERANCE * scale:  # also true for NaN
        difference = f"logits differ by {largest:.2e} of {scale:.2e}"
        raise VerificationError(f"{checkpoint} does not compute what {hf_dir} does: {difference}")
    return largest, scale


@torch.no_grad()
def megatron_logits(hf_dir: Path, checkpoint: Path, ids: Tensor, parallel: ParallelState) -> Tensor:
    """Compute the logits [T, V] of a checkpoint at ids [1, T], loaded by megatron-core in a single process."""
    read_metadata(checkpoint)  # refuses a pickle that megatron would execute
    config = load_hf_config(hf_dir)
    gpt = build_model(config, ModelConfig(hf_dir=hf_dir), parallel)
    # States of transformer-engine's fp8 recipes are not weights.
    wanted = {k: v for k, v in gpt.sharded_state_dict().items() if not k.endswith("_extra_state")}
    loaded = dist_checkpointing.load({"model": wanted}, str(checkpoint))
    gpt.load_state_dict(loaded["model"], strict=False)
    gpt.eval()
    length = ids.shape[1]
    bounds = torch.tensor([0, length], dtype=torch.int32)
    packed = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=length, max_seqlen_kv=length
    )
    hidden = gpt(ids, torch.arange(length).unsqueeze(0), None, packed_seq_params=packed)
    return LMHead.from_model(gpt, config, parallel).logits(hidden.squeeze(0))[:, : config.vocab_size]
