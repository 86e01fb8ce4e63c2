from __future__ import annotations

import pytest
import torch

from megatron_sdsearch.config import SGLangConfig
from megatron_sdsearch.sglang.serve import gpus_beside_trainer


def node(monkeypatch: pytest.MonkeyPatch, *, gpus: int, trainers: int) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(trainers))


def test_servers_get_what_the_trainers_leave_or_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    node(monkeypatch, gpus=4, trainers=3)
    assert gpus_beside_trainer(SGLangConfig()) == ("3",)
    assert gpus_beside_trainer(SGLangConfig(colocated=True)) == ("0", "1", "2")
    node(monkeypatch, gpus=0, trainers=4)
    assert gpus_beside_trainer(SGLangConfig()) == ()
