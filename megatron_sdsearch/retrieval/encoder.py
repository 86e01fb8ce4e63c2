"""What turns queries into vectors; ``e5.py`` has the implementation, which needs torch and is imported late."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]


class TextEncoder(Protocol):
    """Encodes queries and passages into one space. Called from one thread at a time, not always the same."""

    @property
    def num_dims(self) -> int:
        """Length of a vector."""
        ...

    @property
    def fingerprint(self) -> str:
        """Names the weights; equal fingerprints give equal vectors."""
        ...

    def encode_queries(self, texts: Sequence[str]) -> Vectors:
        """[len(texts), num_dims], each row of length 1."""
        ...

    def encode_passages(self, texts: Sequence[str]) -> Vectors:
        """[len(texts), num_dims], each row of length 1."""
        ...
