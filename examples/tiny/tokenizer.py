"""A small real Qwen2 tokenizer: byte-level BPE in which every name and word of the demo world is one token.

Owns vocabulary and chat template. Any (NFC) text round-trips: the byte alphabet is complete. It is a plain
``Qwen2Tokenizer`` with nothing but vocabulary and merges of its own: ``AutoTokenizer`` rebuilds exactly that class for
every ``qwen2`` model, and a rule that is not Qwen2's (how to split, ``ignore_merges``) would be lost without a word.

Tags and labels are added tokens but not special ones: ``decode(skip_special_tokens=True)`` keeps them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

from tokenizers import AddedToken, Tokenizer, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import Qwen2Tokenizer

from megatron_sdsearch.errors import DataError

PAD, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
TAGS = tuple(f"<{slash}{name}>" for name in ("search", "answer", "information", "think") for slash in ("", "/"))
# One token each, so that in a hindsight block a label stands right before the words it judges.
LABELS = ("CORRECT:", "INCORRECT:")
# Never reached: training ends when all words are one token.
MAX_VOCAB_SIZE = 8192
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer(texts: Iterable[str], names: Iterable[str]) -> Qwen2Tokenizer:
    """Train on the world's text.

    Args:
        texts: whatever prompts, passages and responses look like; each of their words becomes a token.
        names: what must be one token where it stands in running text, that is with its leading space.

    Raises:
        DataError: a name or a tag is more than one token.
    """
    spaced = [f" {name}" for name in names]
    vocab, merges = _train([*texts, *spaced])
    tokenizer = Qwen2Tokenizer(
        vocab=vocab,
        merges=merges,  # type: ignore[arg-type]  # annotated list[str]; what it hands on to must be pairs
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
    """Byte-level BPE until every word is one token: vocabulary and merges.

    Each distinct word counts once, so that common pieces are shared and the vocabulary stays small.
    """
    pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    tag = re.compile("|".join((*TAGS, *reversed(LABELS))))
    words = {word for text in texts for part in tag.split(text) for word, _ in pre_tokenizer.pre_tokenize_str(part)}
    tokenizer = Tokenizer(BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCAB_SIZE,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[PAD],
        show_progress=False,
    )
    tokenizer.train_from_iterator(sorted(words), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [(left, right) for left, right in model["merges"]]
