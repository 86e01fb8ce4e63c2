"""megatron's ``torch_dist`` checkpoint folders, tensor by tensor: without process groups and without a model.

Owns the files: ``.metadata`` (where every piece lies), ``__RANK_0.distcp`` (the pieces), ``common.pt`` and
``metadata.json``. megatron-core reads what is written here (dist_checkpointing.load), and what it saves is read here.
Names and shapes of a model are ``hf_weights.py``'s.

What is trusted: nothing. ``.metadata`` is a pickle, which torch itself loads without any limit; here only the record
types below are let through. Pieces are loaded with ``weights_only=True``.
"""

from __future__ import annotations

import io
import json
import math
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_sdsearch.errors import CheckpointError

METADATA = ".metadata"
_FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
_COMMON = {"common_backend": "torch", "common_backend_version": 1}

_RECORDS = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    # megatron keeps every rank's plan for the next save.
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"Path", "PosixPath"},
    "pathlib._local": {"Path", "PosixPath"},
    "collections": {"OrderedDict"},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_plain = module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype))
        if is_plain or name in _RECORDS.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs")


class TorchDistReader:
    """The tensors of one checkpoint folder.

    Args:
        folder: with ``.metadata``.

    Raises:
        CheckpointError: it is no such folder, is damaged, or asks for code to be run.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            with (folder / METADATA).open("rb") as stream:
                metadata = _Unpickler(stream).load()
            self._storage: dict[MetadataIndex, Any] = metadata.storage_data
            entries: dict[str, Any] = metadata.state_dict_metadata
        except FileNotFoundError as error:
            raise CheckpointError(f"{folder} holds no {METADATA}: it is no torch_dist checkpoint") from error
        except (pickle.UnpicklingError, EOFError, AttributeError, ValueError, IndexError, KeyError, TypeError) as error:
            raise CheckpointError(f"{folder / METADATA} cannot be read: {error}") from error
        self._tensors = {k: entry for k, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}

    def keys(self) -> set[str]:
        """Of all tensors."""
        return set(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        """Of a whole tensor, all layers of a stack included."""
        return tuple(self._tensors[key].size)

    def dtype(self, key: str) -> torch.dtype:
        """Of a tensor."""
        return self._tensors[key].properties.dtype

    def read(self, key: str, layer: int | None = None) -> Tensor:
        """A whole tensor, or one layer of a stack, put together from its pieces.

        Raises:
            CheckpointError: a piece is missing or damaged.
        """
        entry = self._tensors[key]
        first = () if layer is None else (layer,)
        target = torch.empty(tuple(entry.size)[len(first) :], dtype=entry.properties.dtype)
        filled = 0
        for chunk in entry.chunks:
            if first and not chunk.offsets[0] <= first[0] < chunk.offsets[0] + chunk.sizes[0]:
                continue
            piece = self._read_piece(MetadataIndex(key, chunk.offsets), tuple(chunk.sizes))
            offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
            if first:
                piece, offsets, sizes = piece[first[0] - offsets[0]], offsets[1:], sizes[1:]
            part = tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))
            target[part].copy_(piece)
            filled += math.prod(sizes)
        if filled != target.numel():
            told = f"{filled} of {target.numel()} numbers are there"
            raise CheckpointError(f"{self._folder}: {key} is incomplete, {told}")
        return target

    def _read_piece(self, index: MetadataIndex, sizes: tuple[int, ...]) -> Tensor:
        place = self._storage[index]
        path = self._folder / Path(place.relative_path).name  # never outside of the folder
        try:
            with path.open("rb") as stream:
                stream.seek(place.offset)
                blob = stream.read(place.length)
            # torch.load takes a copy of its own out of the blob, which goes with this frame.
            piece = torch.load(io.BytesIO(blob), map_location="cpu", weights_only=True)
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} is missing: it holds part of {index.fqn}") from error
        except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
            raise CheckpointError(
                f"{path} is damaged at {index.fqn} ({type(error).__name__}): write it again"
            ) from error
        if not isinstance(piece, Tensor) or tuple(piece.shape) != sizes:
            raise CheckpointError(f"{path} is damaged at {index.fqn}: no tensor of shape {sizes}")
        return piece


class TorchDistWriter:
    """Writes a checkpoint piece by piece; memory holds the piece at hand. ``finish`` makes it complete.

    Args:
        folder: an empty one.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tensors: dict[str, TensorStorageMetadata] = {}
        self._storage: dict[MetadataIndex, _StorageInfo] = {}
        self._streams: dict[int, IO[bytes]] = {}

    def __enter__(self) -> TorchDistWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in self._streams.values():
            stream.close()

    def add(self, rank: int, key: str, size: Sequence[int], offsets: Sequence[int], piece: Tensor) -> None:
        """Append one piece to the file of ``rank``.

        Args:
            rank: that would have saved it; one file each.
            key: of the whole tensor.
            size: of the whole tensor.
            offsets: of the piece in it.
            piece: of as many dimensions.

        Raises:
            CheckpointError: pieces of one tensor differ in dtype.
        """
        properties = TensorProperties(dtype=piece.dtype)
        entry = self._tensors.setdefault(key, TensorStorageMetadata(properties, torch.Size(size), []))
        if entry.properties.dtype != piece.dtype:
            raise CheckpointError(f"{key} is {entry.properties.dtype} in one place and {piece.dtype} in another")
        entry.chunks.append(ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=piece.shape))
        stream = self._stream(rank)
        start = stream.tell()
        # A view would be saved with all of the storage behind it.
        torch.save(piece if piece.untyped_storage().nbytes() == piece.nbytes else piece.clone(), stream)
        info = _StorageInfo(self._file(rank), start, stream.tell() - start)
        self._storage[MetadataIndex(key, offsets)] = info

    def finish(self, common: dict[str, Any]) -> None:
        """Write what makes a folder of files a checkpoint.

        Args:
            common: what is not sharded; plain numbers and texts.
        """
        for stream in self._streams.values():
            stream.close()
        torch.save(common, self._folder / "common.pt")
        (self._folder / "metadata.json").write_text(json.dumps(_FORMAT | _COMMON))
        metadata = Metadata(state_dict_metadata=dict(self._tensors), storage_data=self._storage)
        with (self._folder / METADATA).open("wb") as stream:
            pickle.dump(metadata, stream)

    def _file(self, rank: int) -> str:
        return f"__{rank}_0.distcp"

    def _stream(self, rank: int) -> IO[bytes]:
        if rank not in self._streams:
            self._streams[rank] = (self._folder / self._file(rank)).open("wb")
        return self._streams[rank]
