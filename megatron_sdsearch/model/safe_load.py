"""No pickle of a checkpoint or a download runs code.

torch reads all tensors and objects with ``weights_only`` once ``forbid_pickles`` was called. One file is beyond it:
torch.distributed.checkpoint reads ``.metadata`` by ``pickle.load`` (filesystem.py:930). ``check_metadata`` looks at
what such a file would import before torch sees it.
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any, Final

_DCP: Final = "torch.distributed.checkpoint"
# What megatron-core 0.16.1 and torch 2.13 write; classes of plain data, and two functions that look up an enum.
_ALLOWED: Final = frozenset(
    {("torch", "Size"), ("torch", "device"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict")}
    | {("torch", name) for name in ("float64", "float32", "bfloat16", "float16", "int64", "int32", "uint8", "bool")}
    | {(f"{_DCP}.filesystem", "_StorageInfo")}
    | {
        (f"{_DCP}.metadata", name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    }
    | {(f"{_DCP}.planner", name) for name in ("BytesIOWriteData", "SavePlan", "TensorWriteData")}
    | {(f"{_DCP}.planner", name) for name in ("WriteItem", "WriteItemType")}
)


def forbid_pickles() -> None:
    """From here on every ``torch.load`` of this process is ``weights_only``, whatever its caller asks for."""
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)  # torch refuses both at once


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"names {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


def check_metadata(path: Path) -> str:
    """What is wrong with a ``.metadata`` file: no pickle, or imports what it has no need of; "" if nothing."""
    try:
        with path.open("rb") as stream:
            _MetadataUnpickler(stream).load()
    except OSError as error:
        return f"cannot be read ({error})"
    except Exception as error:  # noqa: BLE001  # garbage makes an unpickler raise anything
        return f"is refused: {error}"
    return ""
