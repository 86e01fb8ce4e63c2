"""Text encoders from Hugging Face folders: E5 (arXiv 2212.03533, section 3), or as the folder's module files define.

The only module of ``retrieval`` that needs torch; imported only for dense search.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import AutoModel, AutoTokenizer

from megatron_sdsearch.errors import ConfigError, cause_of
from megatron_sdsearch.retrieval.encoder import Vectors, read_encoder_settings

_log = logging.getLogger(__name__)

_BATCH = 32


class FolderEncoder:
    """A ``TextEncoder`` in fp32 on the CPU, so that all ranks compute the same vectors.

    Args:
        folder: of a Hugging Face model.
        field: setting of the folder, for errors.

    Raises:
        ConfigError: for ``field``: the model is missing or incomplete, or a setting is not supported.
    """

    def __init__(self, folder: Path, field: str = "retrieval.elasticsearch.encoder") -> None:
        settings = read_encoder_settings(folder, field)
        model_dir = settings.model_dir
        try:
            model, loading = AutoModel.from_pretrained(
                model_dir, dtype=torch.float32, local_files_only=True, output_loading_info=True
            )
            self._tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            problem = f"the model in {model_dir} cannot be loaded: {cause_of(error)}"
            raise ConfigError(field, problem, "give a Hugging Face folder") from error
        # Missing weights are initialized at random; only the pooler is not used.
        missing = sorted(name for name in loading["missing_keys"] if not name.startswith("pooler."))
        if missing:
            problem = f"the weights in {model_dir} lack {missing[0]} and {len(missing) - 1} more"
            raise ConfigError(field, problem, "download the encoder's folder again")
        num_positions = getattr(model.config, "max_position_embeddings", None) or 1 << 30
        self._max_tokens = int(min(num_positions, self._tokenizer.model_max_length))
        if settings.max_tokens is not None and not settings.has_modules:
            self._max_tokens = min(self._max_tokens, settings.max_tokens)
        elif settings.max_tokens is not None:  # the folder's own setting overrides its tokenizer's
            if settings.max_tokens > num_positions:
                problem = f"max_seq_length is {settings.max_tokens} in {model_dir}, the model's limit {num_positions}"
                raise ConfigError(field, problem, "lower max_seq_length in sentence_bert_config.json")
            self._max_tokens = settings.max_tokens
        _log.info("%s: %s, %d tokens", folder, settings, self._max_tokens)
        if not settings.are_prompts_known:
            _log.warning("%s defines no prompts: using E5's; config_sentence_transformers.json can define them", folder)
        self._model = model.eval()
        self._settings = settings
        self.num_dims = int(model.config.hidden_size)
        self.has_own_settings = settings.has_modules
        self.similarity = settings.similarity
        digest = hashlib.sha256()
        for file in sorted(p for p in model_dir.iterdir() if p.suffix in {".json", ".safetensors", ".bin"}):
            with file.open("rb") as stream:
                digest.update(file.name.encode() + hashlib.file_digest(stream, "sha256").digest())
        digest.update(settings.identity.encode())
        self.fingerprint = f"e5-{digest.hexdigest()[:16]}"

    def encode_queries(self, texts: Sequence[str]) -> Vectors:
        """[len(texts), num_dims]."""
        return self._encode([self._settings.query_prompt + text for text in texts])

    def encode_passages(self, texts: Sequence[str]) -> Vectors:
        """[len(texts), num_dims]."""
        return self._encode([self._settings.passage_prompt + text for text in texts])

    def _encode(self, texts: Sequence[str]) -> Vectors:
        batches = [self._encode_batch(texts[start : start + _BATCH]) for start in range(0, len(texts), _BATCH)]
        return np.concatenate(batches) if batches else np.zeros((0, self.num_dims), dtype=np.float32)

    @torch.inference_mode()
    def _encode_batch(self, texts: Sequence[str]) -> Vectors:
        settings = self._settings
        if settings.is_lower_cased:
            texts = [text.lower() for text in texts]
        if settings.has_modules:
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
