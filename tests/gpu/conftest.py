"""What only GPUs can show. Each test here fails without one; what a failure means is told in docs/gpu-first-run.md.

Never run so far: no machine of this project has a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.distributed.launch import DEVICE_VARIABLE

# bf16 numbers carry 8 bits: two correct ways of summing them may differ by so much, relative, and by chance.
BF16 = 2.0**-7


@pytest.fixture(autouse=True, scope="module")
def on_gpus() -> Iterator[None]:
    """Ranks of these tests compute on GPUs and talk over NCCL."""
    if not torch.cuda.is_available():
        pytest.fail("tests/gpu needs GPUs, and torch finds none: see docs/gpu-first-run.md", pytrace=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(DEVICE_VARIABLE, "cuda")
        yield


@pytest.fixture(scope="session")
def root() -> Path:
    """Of the checkout."""
    return Path(__file__).parents[2]
