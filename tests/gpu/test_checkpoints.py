"""Checkpoints of both optimizers move between layouts. Those of the distributed one can be proven on GPUs alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.test_checkpoints import CHAIN, check_chain


@pytest.mark.parametrize("is_distributed", [False, True], ids=["plain", "distributed"])
def test_a_run_goes_on_across_layouts(tmp_path: Path, is_distributed: bool) -> None:
    chain: list[dict[str, object]] = [{**layout, "distributed_optimizer": is_distributed} for layout in CHAIN]
    check_chain(tmp_path, chain)
