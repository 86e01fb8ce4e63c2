"""``check`` before the real SGLang: its servers are in order."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.sglang.conftest import Servers
from tests.unit.check.tiny_run import TinyRun


@pytest.fixture
def tiny(tmp_path: Path, models: tuple[Path, Path]) -> TinyRun:
    """Of a copy of the model that the servers start from."""
    return TinyRun(tmp_path, models[0])


def test_running_servers_are_in_order(tiny: TinyRun, servers: Servers) -> None:
    attached = ("rollout.engine=sglang", f"rollout.sglang.urls={list(servers.urls)}")
    assert tiny.found(*attached, is_online=True) == []
    fields = {finding.field for finding in tiny.found(*attached, "rollout.sglang.tp_size=4", is_online=True)}
    assert "rollout.sglang.tp_size" in fields
