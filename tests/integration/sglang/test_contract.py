"""A real server keeps the contract that the fake is held to."""

from __future__ import annotations

import asyncio

import pytest

from tests.contract.sglang_contract import CHECKS, Check, run_check
from tests.integration.sglang.conftest import PROMPTS, Servers, tiny_config
from tests.unit.conftest import train_tokenizer

pytestmark = pytest.mark.timeout(600)  # the first test waits for the servers
NUM_LONG = 3000


@pytest.fixture(scope="module")
def vocab_size() -> int:
    return len(train_tokenizer()) + 8


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check: Check, servers: Servers, vocab_size: int) -> None:
    about = {"prompt_ids": tuple(PROMPTS[0]), "vocab_size": vocab_size, "num_long_tokens": NUM_LONG, "start_s": 0.5}
    assert len(PROMPTS[0]) + NUM_LONG <= tiny_config(vocab_size).max_position_embeddings
    asyncio.run(run_check(check, servers.urls[0], timeout_s=120.0, **about))
