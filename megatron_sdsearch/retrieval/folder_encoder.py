"""Text encoders of Hugging Face folders: E5 (arXiv 2212.03533, section 3), or what a folder's module files ask for.

The one module of ``retrieval`` that needs torch: imported for dense search alone. What a folder asks for is read by
``encoder_folder.py``.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from megatron_sdsearch.errors import ConfigError, cause_of
from megatron_sdsearch.retrieval.encoder import Vectors
from megatron_sdsearch.retrieval.encoder_folder import EncoderSettings, Similarity, read_encoder_settings

_log = logging.getLogger(__name__)

_BATCH = 32


class FolderEncoder:
    """A ``TextEncoder``; fp32 on the CPU, so that ranks agree whatever their GPUs are at."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: EncoderSettings,
        max_tokens: int,
        fingerprint: str,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._settings = settings
        self._max_tokens = max_tokens
        self._fingerprint = fingerprint

    @classmethod
    def from_folder(cls, folder: Path, field: str = "retrieval.elasticsearch.encoder") -> Self:
        """Load a Hugging Face folder.

        Raises:
            ConfigError: of ``field``: it holds no whole model, or asks for what is not supported.
        """
        settings = read_encoder_settings(folder, field)
        try:
            model, loading = AutoModel.from_pretrained(
                settings.model_dir, dtype=torch.float32, local_files_only=True, output_loading_info=True
            )
            tokenizer = AutoTokenizer.from_pretrained(settings.model_dir, local_files_only=True)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            problem = f"{settings.model_dir} holds no model: {cause_of(error)}"
            raise ConfigError(field, problem, "give a Hugging Face folder") from error
        # What is missing was drawn at random; the pooler alone is not used.
        missing = sorted(name for name in loading["missing_keys"] if not name.startswith("pooler."))
        if missing:
            problem = f"the weights in {settings.model_dir} lack {missing[0]} and {len(missing) - 1} more"
            raise ConfigError(field, problem, "fetch the encoder's folder again")
        max_tokens = _max_tokens(settings, model, tokenizer, field)
        _log.info("%s: %s, %d tokens", folder, settings, max_tokens)
        if not settings.are_prompts_known:
            _log.warning(
                "%s names no prompts: E5's are used; config_sentence_transformers.json may name its own", folder
            )
        return cls(model.eval(), tokenizer, settings, max_tokens, _fingerprint(settings))

    @property
    def num_dims(self) -> int:
        """Hidden size."""
        return int(self._model.config.hidden_size)

    @property
    def fingerprint(self) -> str:
        """Of the folder's files, and of how they are used."""
        return self._fingerprint

    @property
    def has_own_settings(self) -> bool:
        """See ``TextEncoder``."""
        return self._settings.has_modules

    @property
    def similarity(self) -> Similarity:
        """See ``TextEncoder``."""
        return self._settings.similarity

    def encode_queries(self, texts: Sequence[str]) -> Vectors:
        """See ``TextEncoder``."""
        return self._encode([self._settings.query_prompt + text for text in texts])

    def encode_passages(self, texts: Sequence[str]) -> Vectors:
        """See ``TextEncoder``."""
        return self._encode([self._settings.passage_prompt + text for text in texts])

    def _encode(self, texts: Sequence[str]) -> Vectors:
        rows = [self._encode_batch(texts[start : start + _BATCH]) for start in range(0, len(texts), _BATCH)]
        return np.concatenate(rows) if rows else np.zeros((0, self.num_dims), dtype=np.float32)

    @torch.inference_mode()
    def _encode_batch(self, texts: Sequence[str]) -> Vectors:
        settings = self._settings
        if settings.is_lower_cased:
            texts = [text.lower() for text in texts]
        if settings.is_stripped:
            texts = [text.strip() for text in texts]
        limit = self._max_tokens
        inputs = self._tokenizer(list(texts), max_length=limit, truncation=True, padding=True, return_tensors="pt")
        hidden = self._model(**inputs).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1)
        if settings.pooling == "cls":
            first = mask.squeeze(-1).argmax(dim=1)  # a tokenizer may pad on the left
            pooled = hidden[torch.arange(len(texts)), first]
        else:
            pooled = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
        vectors: Vectors = (torch.nn.functional.normalize(pooled, dim=-1) if settings.is_normalized else pooled).numpy()
        return vectors


def _max_tokens(
    settings: EncoderSettings, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, field: str
) -> int:
    """What the settings say, as far as the model has positions; what model and tokenizer take where they do not."""
    wanted, num_positions = settings.max_tokens, getattr(model.config, "max_position_embeddings", None) or 1 << 30
    if wanted is None or not settings.has_modules:
        longest = int(min(num_positions, tokenizer.model_max_length))
        return longest if wanted is None else min(longest, wanted)
    if wanted > num_positions:
        problem = f"max_seq_length {wanted} in {settings.model_dir}, whose model has {num_positions} positions"
        raise ConfigError(field, problem, "lower max_seq_length in sentence_bert_config.json")
    return wanted


def _fingerprint(settings: EncoderSettings) -> str:
    digest = hashlib.sha256()
    files = (path for path in settings.model_dir.iterdir() if path.suffix in {".json", ".safetensors", ".bin"})
    for file in sorted(files):
        with file.open("rb") as stream:
            digest.update(file.name.encode() + hashlib.file_digest(stream, "sha256").digest())
    digest.update(settings.identity.encode())
    return f"e5-{digest.hexdigest()[:16]}"
