"""A tiny Qwen2 with random weights, and a tokenizer in which every name and word of the demo world is one token.

Small enough for two CPU cores, in the format of a real model. The tokenizer is a ``Qwen2Tokenizer`` with only its
vocabulary and merges replaced: ``AutoTokenizer`` creates this class for every ``qwen2`` model, so other rules (how to
split, ``ignore_merges``) would be lost silently. Any (NFC) text round-trips, because the byte alphabet is complete.
Tags and labels are added tokens but not special ones, so ``decode(skip_special_tokens=True)`` keeps them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from megatron_sdsearch.data.prompts import CORRECT, INCORRECT
from megatron_sdsearch.errors import DataError

PAD, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
TAGS = tuple(f"<{slash}{name}>" for name in ("search", "answer", "information", "think") for slash in ("", "/"))
# One token each, so that in a hindsight block a label is right before the words that it rates.
LABELS = (CORRECT.rstrip(), INCORRECT.rstrip())
# Never reached: training ends once every word is one token.
MAX_VOCAB_SIZE = 8192
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer(texts: Iterable[str], names: Iterable[str]) -> Qwen2Tokenizer:
    """Train a tokenizer on the world's text.

    Args:
        texts: samples of prompts, passages and responses; each of their words becomes a token.
        names: names that must be one token in running text, with their leading space.

    Raises:
        DataError: a name or a tag is more than one token.
    """
    spaced = [f" {name}" for name in names]
    vocab, merges = _train([*texts, *spaced])
    tokenizer = Qwen2Tokenizer(
        vocab=vocab,
        merges=merges,  # type: ignore[arg-type]  # annotated as list[str], but must be pairs
        eos_token=IM_END,
        pad_token=PAD,
        unk_token=PAD,
    )
    tokenizer.add_tokens([AddedToken(IM_START, special=True)], special_tokens=True)
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in (*TAGS, *LABELS)])
    tokenizer.chat_template = CHAT_TEMPLATE
    split = [text for text in (*spaced, *TAGS, *LABELS) if len(tokenizer.encode(text, add_special_tokens=False)) != 1]
    if split:
        raise DataError(f"{len(split)} name(s) of the demo world are not one token: {split[:5]}")
    return tokenizer


def _train(texts: Iterable[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Train byte-level BPE until every word is one token; returns vocabulary and merges.

    Each distinct word counts once, so that words share common pieces and the vocabulary stays small.
    """
    pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    tag = re.compile("|".join((*TAGS, *reversed(LABELS))))
    words = {word for text in texts for part in tag.split(text) for word, _ in pre_tokenizer.pre_tokenize_str(part)}
    tokenizer = Tokenizer(BPE())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCAB_SIZE, initial_alphabet=alphabet, special_tokens=[PAD], show_progress=False
    )
    tokenizer.train_from_iterator(sorted(words), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [(left, right) for left, right in model["merges"]]


def save_tiny_model(folder: Path, tokenizer: Qwen2Tokenizer, *, seed: int) -> int:
    """Write config, seeded random weights and tokenizer in Hugging Face's layout; returns the number of parameters.

    3 layers, width 96, 4 heads, tied embeddings. The rotary base fits sequences of ~100 tokens: with the usual 10,000
    half of the dimensions hardly rotate, and heads that attend to the previous token, which copying needs, form much
    later.
    """
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        initializer_range=0.07,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())
