"""A tiny Qwen2 with random weights: small enough for two CPU cores, the same format as the real thing."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

MAX_POSITIONS = 1024


def tiny_config(tokenizer: Qwen2Tokenizer) -> Qwen2Config:
    """3 layers, width 96, 4 heads, tied embeddings.

    The rotary base suits sequences of ~100 tokens: with the usual 10,000 half of the dimensions hardly turn, and heads
    that look at the previous token, of which copying is made, take much longer to form.
    """
    return Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        initializer_range=0.07,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )


def save_tiny_model(folder: Path, tokenizer: Qwen2Tokenizer, *, seed: int) -> int:
    """Write config, seeded random weights and tokenizer in Hugging Face's layout; return the number of parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(tiny_config(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())
