"""``check`` before the real SGLang: its flags are found in its source, its servers are in order."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_sdsearch.check.sglang_program import known_flags
from tests.integration.sglang.conftest import COMMAND, Servers
from tests.unit.check.tiny_run import TinyRun

OURS = "--model-path --host --port --random-seed --tp-size --dtype --enable-memory-saver"
DOCUMENTED = "--enable-deterministic-inference --enable-fp32-lm-head --mem-fraction-static --context-length"


@pytest.fixture
def tiny(tmp_path: Path, models: tuple[Path, Path]) -> TinyRun:
    """Of a copy of the model that the servers start from."""
    return TinyRun(tmp_path, models[0])


def test_flags_that_we_use_and_document_are_known(tiny: TinyRun) -> None:
    (srt,) = Path(COMMAND[0]).parents[1].glob("lib/*/site-packages/sglang/srt")
    launched = re.findall(r'"(--[a-z-]+)=?', Path(COMMAND[1]).read_text())  # by text: the script is for another Python
    wanted = {*OURS.split(), *DOCUMENTED.split(), *launched}
    assert wanted <= known_flags(srt)
    assert "--mem-fracton-static" not in known_flags(srt)
    own = ("rollout.engine=sglang", f"rollout.sglang.command={list(COMMAND)}")
    assert tiny.found(*own, "rollout.sglang.arguments=[--mem-fraction-static,'0.5']") == []
    assert "SGLang 0.5" in tiny.notes(*own)


def test_running_servers_are_in_order(tiny: TinyRun, servers: Servers) -> None:
    attached = ("rollout.engine=sglang", f"rollout.sglang.urls={list(servers.urls)}")
    assert tiny.found(*attached, is_online=True) == []
    fields = {finding.field for finding in tiny.found(*attached, "rollout.sglang.tp_size=4", is_online=True)}
    assert "rollout.sglang.tp_size" in fields
