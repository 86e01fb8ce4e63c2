"""Reads megatron's ``torch_dist`` checkpoints tensor by tensor, without process groups and without a model.

A checkpoint holds whole tensors (with layers stacked), however many ranks wrote it, so any layout can read it.
``.metadata`` lists the position of each piece in the ``__RANK_0.distcp`` files.

No content is trusted. ``.metadata`` is a pickle, which torch itself loads without restrictions; here only plain record
types are allowed. Pieces are loaded with ``weights_only=True``.
"""

from __future__ import annotations

import io
import math
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from transformers import PretrainedConfig

from megatron_sdsearch.errors import CheckpointError, DataError
from megatron_sdsearch.model.checkpoint_folder import CheckpointFolder, read_manifest
from megatron_sdsearch.model.weight_table import Placement, placements

METADATA = ".metadata"
HF_SUBFOLDER = "hf"
"""Subfolder of a converted checkpoint with config and tokenizer, without weights."""
_NO_WEIGHTS = ("optimizer.", "rng", "chained_")
# The types that megatron-core 0.16.1 and torch 2.13 write, each rank's plan for the next save included: plain data
# classes, and two functions that look up an enum.
_RECORDS = {
    "torch": {"Size", "device"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.metadata": {
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
        *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.planner": {
        *("BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"),
    },
    "pathlib": {"Path", "PosixPath"},
    "pathlib._local": {"Path", "PosixPath"},
    "collections": {"OrderedDict"},
}


def forbid_pickles() -> None:
    """Make every later ``torch.load`` of this process ``weights_only``, whatever its caller passes."""
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)  # torch refuses to run with both


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _RECORDS.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs")


def read_metadata(folder: Path) -> Metadata:
    """Read the index of a checkpoint's tensors without running any code that the file names.

    Raises:
        CheckpointError: it is not a torch_dist checkpoint, or its ``.metadata`` is damaged or would run code.
    """
    path = folder / METADATA
    try:
        with path.open("rb") as stream:
            metadata = _MetadataUnpickler(stream).load()
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} holds no {METADATA}: it is not a torch_dist checkpoint") from error
    except Exception as error:  # an unpickler may raise any exception on garbage
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(metadata, Metadata):
        raise CheckpointError(f"{path} cannot be read: it holds a {type(metadata).__name__}")
    return metadata


class TorchDistReader:
    """The tensors of one checkpoint folder.

    Args:
        folder: with ``.metadata``.

    Attributes:
        tensors: by name, the size of the whole tensor (all layers of a stack) and its pieces.

    Raises:
        CheckpointError: see ``read_metadata``.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        metadata = read_metadata(folder)
        self._storage: dict[MetadataIndex, Any] = metadata.storage_data or {}
        entries = metadata.state_dict_metadata.items()
        self.tensors = {key: entry for key, entry in entries if isinstance(entry, TensorStorageMetadata)}

    def read(self, key: str, layer: int | None = None) -> Tensor:
        """Assemble a whole tensor, or one layer of a stack, from its pieces.

        Raises:
            CheckpointError: a piece is missing or damaged.
        """
        entry = self.tensors[key]
        num_skipped = 0 if layer is None else 1
        target = torch.empty(tuple(entry.size)[num_skipped:], dtype=entry.properties.dtype)
        num_filled = 0
        for chunk in entry.chunks:
            offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
            if layer is not None and not offsets[0] <= layer < offsets[0] + sizes[0]:
                continue
            piece = self._read_piece(MetadataIndex(key, chunk.offsets), sizes)
            if layer is not None:
                piece, offsets, sizes = piece[layer - offsets[0]], offsets[1:], sizes[1:]
            part = tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))
            target[part].copy_(piece)
            num_filled += math.prod(sizes)
        if num_filled != target.numel():
            raise CheckpointError(
                f"{self._folder}: {key} is incomplete, it has {num_filled} of {target.numel()} numbers"
            )
        return target

    def _read_piece(self, index: MetadataIndex, sizes: tuple[int, ...]) -> Tensor:
        storage = self._storage[index]
        path = self._folder / Path(storage.relative_path).name  # never outside the folder
        try:
            with path.open("rb") as stream:
                stream.seek(storage.offset)
                blob = stream.read(storage.length)
            # torch.load copies the piece out of the blob, which is freed when this function returns.
            piece = torch.load(io.BytesIO(blob), map_location="cpu", weights_only=True)
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} is missing: it holds part of {index.fqn}") from error
        except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
            raise CheckpointError(
                f"{path} is damaged at {index.fqn} ({type(error).__name__}): restore it or convert the model again"
            ) from error
        if not isinstance(piece, Tensor) or tuple(piece.shape) != sizes:
            raise CheckpointError(f"{path} is damaged at {index.fqn}: it does not hold a tensor of shape {sizes}")
        return piece


class MegatronFolder:
    """A checkpoint's weights under their Hugging Face names, without optimizer and RNG.

    Args:
        folder: the checkpoint.
        config: of its model.

    Raises:
        CheckpointError: the checkpoint cannot be read.
    """

    def __init__(self, folder: Path, config: PretrainedConfig) -> None:
        self._folder = folder
        self._config = config
        self._reader = TorchDistReader(folder)
        # By Hugging Face name: the rule, the checkpoint's tensor, and the layer's index in it. megatron stacks layers
        # that are alike, and otherwise saves each under a name of its own (index None).
        self._sources: dict[str, tuple[Placement, str, int | None]] = {}
        # The head of a tied model is listed too, so that `check_weights` can compare it with the embedding.
        for placement in placements(config, pp_size=1, has_head=True):
            source = (placement, placement.key, placement.layer)
            own = [name for name in placement.megatron if name in self._reader.tensors]
            if own and placement.key not in self._reader.tensors:
                source = (placement, own[0], None)
            self._sources |= dict.fromkeys(placement.hf, source)
        self._joined: dict[str, Tensor] = {}

    def names(self) -> set[str]:
        """List the Hugging Face names of all tensors; a tensor without one keeps the checkpoint's name."""
        keys, known = self._reader.tensors.keys(), {key for _, key, _ in self._sources.values()}
        unknown = {key for key in keys - known if not key.startswith(_NO_WEIGHTS)}
        return unknown | {name for name, (_, key, _) in self._sources.items() if key in keys}

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor; tensors that share a megatron tensor (q, k and v) are read together, once.

        Raises:
            DataError: there is no such tensor, or it has another shape.
            CheckpointError: a part of it is missing or damaged.
        """
        if name not in self._joined:
            self.locate(name)
            _, key, layer = self._sources[name]
            self._joined = self._join(name, self._reader.read(key, layer))
        return self._joined.pop(name)  # read once each, so memory holds at most one megatron tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of one tensor without reading it.

        Raises:
            DataError: there is no such tensor, or it has another shape.
        """
        self.locate(name)
        _, key, layer = self._sources[name]
        size = self._reader.tensors[key].size
        return tuple(self._join(name, torch.empty(size if layer is None else size[1:], device="meta"))[name].shape)

    def locate(self, name: str) -> Path:
        """Return the checkpoint's folder, if it holds the tensor.

        Raises:
            DataError: there is no such tensor.
        """
        if name not in self._sources:
            raise DataError(f"{self._folder} has no tensor {name}")
        _, key, layer = self._sources[name]
        if key not in self._reader.tensors:
            raise DataError(f"{self._folder} has no tensor {key}, which holds {name}")
        found, wanted = self._reader.tensors[key].size[0], self._config.num_hidden_layers
        if layer is not None and found != wanted:
            raise DataError(f"{self._folder}: {key} has {found} layers, the model of config.json {wanted}")
        return self._folder

    def _join(self, name: str, whole: Tensor) -> dict[str, Tensor]:
        """Split ``whole``, the megatron tensor of ``name``, into the Hugging Face tensors that it holds."""
        placement, key, _ = self._sources[name]
        try:
            return dict(zip(placement.hf, placement.layout.join([whole], self._config), strict=True))
        except RuntimeError as error:
            shape = tuple(whole.shape)
            raise DataError(f"{self._folder}: {key} is {shape}, which does not fit config.json: {error}") from error


def find_checkpoint(path: Path) -> Path:
    """Find the checkpoint that ``path`` stands for: itself, or the newest in it or in its ``checkpoints``.

    Raises:
        CheckpointError: there is none.
    """
    if (path / METADATA).is_file():
        return path
    for root in (path, path / "checkpoints"):
        for newest in CheckpointFolder(root).candidates()[:1]:
            if not (newest / METADATA).is_file():
                raise CheckpointError(f"the newest in {root} is {newest.name}, which is not a complete checkpoint")
            return newest
    raise CheckpointError(f"{path} is not a checkpoint: give a step_* folder, a run's folder or a converted one")


def find_hf_dir(checkpoint: Path) -> Path:
    """Find the Hugging Face folder with config and tokenizer of a checkpoint's model.

    Raises:
        CheckpointError: the folder is unknown or has no config.json.
    """
    if (checkpoint / HF_SUBFOLDER / "config.json").is_file():
        return checkpoint / HF_SUBFOLDER
    try:
        folder = Path(read_manifest(checkpoint)["config"]["model"]["hf_dir"])
    except (CheckpointError, KeyError, TypeError) as error:
        raise CheckpointError(f"{checkpoint} does not name its model: give --hf-dir") from error
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{checkpoint} was trained from {folder}, which holds no config.json: give --hf-dir")
    return folder
