"""E5 text encoders: ``query: `` and ``passage: `` prefixes, mean pooling, L2 norm (arXiv 2212.03533, section 3).

The one module of ``retrieval`` that needs torch: whoever wants dense retrieval imports it, nobody else does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from megatron_sdsearch.errors import ConfigError
from megatron_sdsearch.retrieval.encoder import Vectors

MAX_TOKENS = 256
"""Of a query or a passage, prefix and special tokens included; longer ones are cut (Search-R1's retriever)."""
_BATCH = 32


class E5Encoder:
    """A ``TextEncoder``; fp32 on the CPU, so that ranks agree whatever their GPUs are at."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, fingerprint: str) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._fingerprint = fingerprint

    @classmethod
    def from_folder(cls, folder: Path, field: str = "retrieval.elasticsearch.encoder") -> Self:
        """Load a Hugging Face folder.

        Raises:
            ConfigError: of ``field``: it holds no model.
        """
        try:
            model = AutoModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ConfigError(field, f"{folder} holds no model: {error}", "give a Hugging Face folder") from error
        digest = hashlib.sha256()
        for file in sorted(path for path in folder.iterdir() if path.suffix in {".json", ".safetensors", ".bin"}):
            with file.open("rb") as stream:
                digest.update(file.name.encode() + hashlib.file_digest(stream, "sha256").digest())
        return cls(model, tokenizer, f"e5-{digest.hexdigest()[:16]}")

    @property
    def num_dims(self) -> int:
        """Hidden size."""
        return int(self._model.config.hidden_size)

    @property
    def fingerprint(self) -> str:
        """Of the folder's files."""
        return self._fingerprint

    def encode_queries(self, texts: Sequence[str]) -> Vectors:
        """See ``TextEncoder``."""
        return self._encode([f"query: {text}" for text in texts])

    def encode_passages(self, texts: Sequence[str]) -> Vectors:
        """See ``TextEncoder``."""
        return self._encode([f"passage: {text}" for text in texts])

    def _encode(self, texts: Sequence[str]) -> Vectors:
        rows = [self._encode_batch(texts[start : start + _BATCH]) for start in range(0, len(texts), _BATCH)]
        return np.concatenate(rows) if rows else np.zeros((0, self.num_dims), dtype=np.float32)

    @torch.inference_mode()
    def _encode_batch(self, texts: Sequence[str]) -> Vectors:
        inputs = self._tokenizer(list(texts), max_length=MAX_TOKENS, truncation=True, padding=True, return_tensors="pt")
        hidden = self._model(**inputs).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1)
        mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
        vectors: Vectors = torch.nn.functional.normalize(mean, dim=-1).numpy()
        return vectors
