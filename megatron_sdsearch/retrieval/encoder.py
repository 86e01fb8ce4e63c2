"""What turns queries into vectors; ``folder_encoder.py`` implements it, needs torch, and is imported late."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_sdsearch.retrieval.encoder_folder import Similarity

Vectors = NDArray[np.float32]


class TextEncoder(Protocol):
    """Encodes queries and passages into one space. Called from one thread at a time, not always the same."""

    @property
    def num_dims(self) -> int:
        """Length of a vector."""
        ...

    @property
    def fingerprint(self) -> str:
        """Names the weights and how they are used; equal fingerprints give equal vectors."""
        ...

    @property
    def has_own_settings(self) -> bool:
        """Its folder says how it pools and prompts."""
        ...

    @property
    def similarity(self) -> Similarity:
        """By which vectors are compared; ``dot`` where their lengths count."""
        ...

    def encode_queries(self, texts: Sequence[str]) -> Vectors:
        """[len(texts), num_dims]."""
        ...

    def encode_passages(self, texts: Sequence[str]) -> Vectors:
        """[len(texts), num_dims]."""
        ...
