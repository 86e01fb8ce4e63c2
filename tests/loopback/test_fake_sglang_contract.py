"""The fake keeps the contract that the real server is held to."""

from __future__ import annotations

import asyncio

import pytest

from tests.contract.sglang_contract import CHECKS, Check, run_check
from tests.loopback.fake_sglang import VOCAB_SIZE, FakeSGLang


@pytest.mark.parametrize("is_old", [False, True], ids=["new", "old"])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check: Check, is_old: bool) -> None:
    async def run() -> None:
        async with FakeSGLang(is_old=is_old, token_delay_s=0.001) as fake:
            about = {"prompt_ids": (5, 6, 7), "vocab_size": VOCAB_SIZE, "num_long_tokens": 800, "start_s": 0.1}
            await run_check(check, fake.url, timeout_s=10.0, has_sessions=not is_old, **about)

    asyncio.run(run())
