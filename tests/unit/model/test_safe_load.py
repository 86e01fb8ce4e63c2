"""Pickles that would leave a mark if any of their code ran."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_sdsearch.errors import CheckpointError
from megatron_sdsearch.model.background_write import describe_error
from megatron_sdsearch.model.checkpoint import CheckpointStore
from megatron_sdsearch.model.megatron_folder import forbid_pickles, read_metadata


class Poison:
    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.mkdir, (str(self._mark),)


def test_the_poison_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Poison(tmp_path / "mark")))
    assert (tmp_path / "mark").exists()


def test_a_poisoned_metadata_is_refused_and_not_run(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps({"state": Poison(tmp_path / "mark")}))
    with pytest.raises(CheckpointError, match=r"\.metadata cannot be read: .*posix\.mkdir, which no checkpoint needs"):
        read_metadata(tmp_path)
    assert not (tmp_path / "mark").exists()


def test_metadata_that_is_none_or_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no \.metadata"):
        read_metadata(tmp_path)
    for content in (b"no pickle", pickle.dumps({"state": 1})):
        (tmp_path / ".metadata").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"\.metadata cannot be read"):
            read_metadata(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_real_metadata_passes(dtype: torch.dtype, tmp_path: Path) -> None:
    chunk = ChunkStorageMetadata(torch.Size([0]), torch.Size([2]))
    tensor = TensorStorageMetadata(TensorProperties(dtype), torch.Size([2]), [chunk])
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata({"weight": tensor})))
    assert read_metadata(tmp_path).state_dict_metadata == {"weight": tensor}


def test_no_caller_can_ask_torch_for_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    stream = io.BytesIO()
    torch.save({"state": Poison(tmp_path / "mark")}, stream)
    forbid_pickles()
    stream.seek(0)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(stream, weights_only=False)
    assert not (tmp_path / "mark").exists()


def test_a_distributed_optimizer_with_torchs_adam_is_refused(tmp_path: Path) -> None:
    policy: Any = SimpleNamespace(optimizer=object.__new__(DistributedOptimizer))
    anything: Any = SimpleNamespace(tp_size=1, pp_size=1, dp_size=1)
    with pytest.raises(CheckpointError, match="wrong without an error"):
        CheckpointStore(tmp_path, policy, anything, anything)


def test_the_disk_is_blamed_and_not_what_torch_makes_of_it() -> None:
    def write() -> None:
        try:
            raise OSError(28, "No space left on device")
        finally:
            raise RuntimeError("unexpected pos 704 vs 598")

    with pytest.raises(RuntimeError) as caught:
        write()
    assert describe_error(caught.value) == "OSError: [Errno 28] No space left on device"
    assert describe_error(ValueError("x")) == "ValueError: x"
