"""Converts models between Hugging Face folders and megatron checkpoints, tensor by tensor, in one process.

Names and shapes are checked before the first byte is written; a later failure leaves nothing behind. Memory use: one
megatron tensor when converting to megatron, one shard when converting to Hugging Face.
"""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

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
from transformers import AutoModelForCausalLM, PretrainedConfig

from megatron_sdsearch import __version__
from megatron_sdsearch.config import ParallelConfig
from megatron_sdsearch.errors import CheckpointError, DataError, raise_problems
from megatron_sdsearch.files import replacing_folder
from megatron_sdsearch.model.hf_config import load_hf_config
from megatron_sdsearch.model.hf_folder import DEFAULT_SHARD_BYTES, carry_over, write_hf_folder
from megatron_sdsearch.model.hf_weights import HFTensors, SafetensorsFolder, check_weights, split_shards
from megatron_sdsearch.model.megatron_folder import HF_SUBFOLDER, METADATA, MegatronFolder
from megatron_sdsearch.model.shape import ModelShape, layout_problems
from megatron_sdsearch.model.weight_table import HEAD, VOCAB, placements

Progress = Callable[[int, int], None]
"""Called with (bytes of tensors converted, bytes of all tensors)."""
Check = Callable[[Path], None]
"""Called with the complete result before it gets its final name; raises to refuse it."""
_SHARDED = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
_COMMON = {"common_backend": "torch", "common_backend_version": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """The size of a converted model.

    Attributes:
        num_tensors: number of Hugging Face tensors.
        num_bytes: their total size, without padding.
    """

    num_tensors: int
    num_bytes: int


def to_megatron(
    hf_dir: Path,
    out: Path,
    *,
    tensor: int = 1,
    pipeline: int = 1,
    check: Check | None = None,
    progress: Progress = lambda done, total: None,
) -> Conversion:
    """Write a checkpoint of weights only, from which ``model.megatron_dir`` starts a run in any layout.

    Args:
        hf_dir: folder with safetensors, single or indexed.
        out: the new folder; config and tokenizer are written to ``out/hf``.
        tensor: number of tensor-parallel ranks that the vocabulary is padded for.
        pipeline: number of pipeline stages; each gets a file.
        check: called with the result.
        progress: called after every tensor.

    Raises:
        ConfigError: the architecture or the layout is not supported.
        DataError: a tensor is missing, unknown or has another shape, or a tied head differs from the embedding.
    """
    config = load_hf_config(hf_dir)
    sizes = ParallelConfig(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline)
    raise_problems(layout_problems(ModelShape.from_hf_config(config), sizes))
    tensors = SafetensorsFolder(hf_dir)
    counts = _check_tensors(tensors, config, hf_dir)
    # q, k and v become one tensor, and all layers one stack, with the dtype of the first piece.
    first: dict[str, str] = {}
    for placement in placements(config, pp_size=1):
        for name in placement.hf:
            other = first.setdefault(placement.key, name)
            dtype, other_dtype = tensors.dtype(name), tensors.dtype(other)
            if dtype != other_dtype:
                message = f"{name} is {dtype} and {other} {other_dtype}"
                raise DataError(f"{hf_dir}: {message}: they become one tensor and must have one dtype")
    num_done, num_bytes = 0, 0
    with replacing_folder(out) as partial:
        partial.mkdir(parents=True)
        writer = TorchDistWriter(partial)
        for placement in placements(config, pipeline):
            is_padded = placement.layout is VOCAB  # other tensors do not depend on the tensor-parallel size
            whole = torch.cat(split_shards(placement, tensors, tensor if is_padded else 1, config))
            if placement.layer is None:
                writer.add(placement.stage, placement.key, whole.shape, (0,) * whole.dim(), whole)
            else:
                size, offsets = (config.num_hidden_layers, *whole.shape), (placement.layer, *(0,) * whole.dim())
                writer.add(placement.stage, placement.key, size, offsets, whole.unsqueeze(0))
            num_numbers = sum(counts[name] for name in placement.hf)
            num_done += num_numbers
            num_bytes += num_numbers * whole.itemsize
            progress(num_done * whole.itemsize, sum(counts.values()) * whole.itemsize)
        writer.finish({"step": 0})
        (partial / HF_SUBFOLDER).mkdir()
        carry_over(hf_dir, partial / HF_SUBFOLDER)
        manifest = {
            "step": 0,
            "layout": {"tp": tensor, "pp": pipeline, "dp": 1},
            "versions": {"megatron_sdsearch": __version__, "torch": version("torch")},
        }
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
        if check is not None:
            check(partial)
    return Conversion(num_tensors=len(counts), num_bytes=num_bytes)


def to_hf(
    checkpoint: Path,
    out: Path,
    *,
    hf_dir: Path,
    dtype: torch.dtype | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    check: Check | None = None,
    progress: Progress = lambda done, total: None,
) -> Conversion:
    """Write a checkpoint's weights as a Hugging Face folder.

    Args:
        checkpoint: written by training or by ``to_megatron``.
        out: the new folder.
        hf_dir: folder from which config, tokenizer and all other files except weights are copied.
        dtype: of the new weights; None keeps the checkpoint's.
        shard_bytes: maximum size of one safetensors file.
        check: called with the result.
        progress: called after every tensor.

    Raises:
        ConfigError: the architecture is not supported.
        DataError: a tensor is missing, unknown or has another shape.
        CheckpointError: the checkpoint is damaged.
    """
    config = load_hf_config(hf_dir)
    tensors = MegatronFolder(checkpoint, config)
    counts = _check_tensors(tensors, config, checkpoint)
    num_done, num_bytes = 0, 0

    def stream() -> Iterator[tuple[str, Tensor]]:
        nonlocal num_done, num_bytes
        for name in (name for placement in placements(config, pp_size=1) for name in placement.hf):
            whole = tensors[name] if dtype is None else tensors[name].to(dtype)
            yield name, whole
            num_done += whole.numel()
            num_bytes += whole.nbytes
            progress(num_done * whole.itemsize, sum(counts.values()) * whole.itemsize)

    write_hf_folder(stream(), hf_dir, out, is_writer=True, shard_bytes=shard_bytes, check=check)
    return Conversion(num_tensors=len(counts), num_bytes=num_bytes)


def _check_tensors(tensors: HFTensors, config: PretrainedConfig, source: Path) -> dict[str, int]:
    """Check names and shapes against the model that transformers builds; returns the number of elements by tensor."""
    check_weights(tensors, config, source)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        expected.pop(HEAD, None)  # it is the embedding
    for name, wanted in expected.items():
        shape = tensors.shape(name)
        if shape != wanted:
            raise DataError(f"{source}: {name} is {shape}, the model of config.json expects {wanted}")
    return {name: math.prod(shape) for name, shape in expected.items()}


class TorchDistWriter:
    """Writes a ``torch_dist`` checkpoint one piece at a time, in the format that dist_checkpointing.load reads.

    Args:
        folder: an empty folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tensors: dict[str, TensorStorageMetadata] = {}
        self._storage: dict[MetadataIndex, _StorageInfo] = {}

    def add(self, rank: int, key: str, size: Sequence[int], offsets: Sequence[int], piece: Tensor) -> None:
        """Append one piece of a tensor to a file.

        Args:
            rank: number in the file's name.
            key: name of the whole tensor.
            size: of the whole tensor.
            offsets: of the piece in the whole tensor.
            piece: a tensor with as many dimensions as ``size``.

        Raises:
            CheckpointError: pieces of one tensor differ in dtype.
        """
        properties = TensorProperties(dtype=piece.dtype)
        entry = self._tensors.setdefault(key, TensorStorageMetadata(properties, torch.Size(size), []))
        if entry.properties.dtype != piece.dtype:
            raise CheckpointError(f"{key} is {entry.properties.dtype} in one piece and {piece.dtype} in another")
        entry.chunks.append(ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=piece.shape))
        file = f"__{rank}_0.distcp"
        with (self._folder / file).open("ab") as stream:
            start = stream.tell()
            # A view would be saved with its whole storage.
            torch.save(piece if piece.untyped_storage().nbytes() == piece.nbytes else piece.clone(), stream)
            self._storage[MetadataIndex(key, offsets)] = _StorageInfo(file, start, stream.tell() - start)

    def finish(self, common: dict[str, Any]) -> None:
        """Write the metadata, which completes the checkpoint.

        Args:
            common: values that are not sharded; plain numbers and strings.
        """
        torch.save(common, self._folder / "common.pt")
        (self._folder / "metadata.json").write_text(json.dumps(_SHARDED | _COMMON))
        metadata = Metadata(state_dict_metadata=dict(self._tensors), storage_data=self._storage)
        with (self._folder / METADATA).open("wb") as stream:
            pickle.dump(metadata, stream)
