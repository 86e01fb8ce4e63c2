"""The tiny run of each test."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.check.tiny_run import TinyRun, save_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def tiny(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> TinyRun:
    for name in ("SLURM_JOB_NUM_NODES", "SLURM_NNODES", "SLURM_GPUS_ON_NODE", "SLURM_GPUS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return TinyRun(tmp_path, model_folder)
