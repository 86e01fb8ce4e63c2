"""A byte-level BPE tokenizer trained on the spot and a tiny random Qwen2: no network, no files of other people."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import settings
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from megatron_sdsearch.tokenization.renderer import Renderer

# On a shared machine one example may take any time; a hang is what the test timeout is for.
settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "the quick brown fox jumps over the lazy dog ? 0123456789",
    "<think> who wrote it </think>\n<search> author of the book </search>\n\n<answer> Lisbon </answer>",
    '<information>Doc 1(Title: "Lisbon") Lisbon is the capital of Portugal.\n</information>\n\nQuestion: where is it?',
] * 20


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def wrap(backend: Tokenizer, **settings: Any) -> PreTrainedTokenizerFast:
    """The transformers face of a tokenizer; the one place that calls its untyped constructor."""
    return PreTrainedTokenizerFast(tokenizer_object=backend, **settings)


def train_tokenizer(*, has_tag_tokens: bool = False, has_template: bool = True) -> PreTrainedTokenizerFast:
    """Vocabulary of about 400; specials ``<|endoftext|>``, ``<|im_start|>`` and, ending sequences, ``<|im_end|>``."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    )
    backend.train_from_iterator(CORPUS, trainer)
    if has_tag_tokens:
        tags = ["<search>", "</search>", "<answer>", "</answer>"]
        backend.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
    tokenizer = wrap(backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=4096)
    tokenizer.chat_template = CHAT_TEMPLATE if has_template else None
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer()


@pytest.fixture(scope="session")
def tagged_tokenizer() -> PreTrainedTokenizerFast:
    """The four action tags are added tokens of their own, not special ones."""
    return train_tokenizer(has_tag_tokens=True)


@pytest.fixture(scope="session")
def renderer(tokenizer: PreTrainedTokenizerFast) -> Renderer:
    return Renderer(tokenizer)


ModelFactory = Callable[..., Qwen2ForCausalLM]


@pytest.fixture(scope="session")
def make_model(tokenizer: PreTrainedTokenizerFast) -> ModelFactory:
    def make(seed: int = 0, *, is_tied: bool = True, attn_implementation: str = "sdpa") -> Qwen2ForCausalLM:
        torch.manual_seed(seed)
        config = Qwen2Config(
            vocab_size=len(tokenizer) + 8,  # padded, as real embeddings are
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=is_tied,
            initializer_range=0.3,  # sharp enough that greedy choices are not ties
        )
        config._attn_implementation = attn_implementation
        return Qwen2ForCausalLM(config)

    return make
