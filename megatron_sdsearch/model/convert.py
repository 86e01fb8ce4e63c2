"""Whole models between Hugging Face folders and megatron checkpoints, tensor by tensor, in one process.

Everything that can be wrong with names and shapes is found before the first byte is written; whatever fails later
leaves nothing behind. Memory: one megatron tensor to megatron, one shard to Hugging Face.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from megatron_sdsearch import __version__
from megatron_sdsearch.config import ParallelConfig
from megatron_sdsearch.errors import DataError, raise_first
from megatron_sdsearch.model.hf_config import load_hf_config
from megatron_sdsearch.model.hf_folder import DEFAULT_SHARD_BYTES, carry_over, write_hf_folder, written_whole
from megatron_sdsearch.model.hf_weights import (
    Placement,
    SafetensorsFolder,
    check_weights,
    placements,
    split_shards,
)
from megatron_sdsearch.model.megatron_folder import HF_SUBFOLDER, MegatronFolder
from megatron_sdsearch.model.shape import ModelShape, layout_problems
from megatron_sdsearch.model.torch_dist import TorchDistWriter

Progress = Callable[[int, int], None]
"""(bytes of tensors done, bytes of all)."""
Check = Callable[[Path], None]
"""Called with the complete result before it takes its place; raises to refuse it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """What was written.

    Attributes:
        num_tensors: Hugging Face tensors.
        num_bytes: of them, padding not counted.
    """

    num_tensors: int
    num_bytes: int


class _Tally:
    def __init__(self, shapes: dict[str, Tensor], progress: Progress) -> None:
        self._progress = progress
        self._num_numbers, self._all_numbers = 0, sum(tensor.numel() for tensor in shapes.values())
        self.num_tensors, self.num_bytes = 0, 0

    def add(self, num_tensors: int, num_numbers: int, itemsize: int) -> None:
        self.num_tensors += num_tensors
        self.num_bytes += num_numbers * itemsize
        self._num_numbers += num_numbers
        self._progress(self._num_numbers * itemsize, self._all_numbers * itemsize)

    def result(self) -> Conversion:
        return Conversion(num_tensors=self.num_tensors, num_bytes=self.num_bytes)


def to_megatron(
    hf_dir: Path,
    out: Path,
    *,
    tensor: int = 1,
    pipeline: int = 1,
    check: Check = lambda _: None,
    progress: Progress = lambda done, total: None,
) -> Conversion:
    """Write a checkpoint of weights alone that ``model.megatron_dir`` starts from, on this layout or another.

    Args:
        hf_dir: safetensors, single or indexed.
        out: the new folder; config and tokenizer go to ``out/hf``.
        tensor: it is sharded and padded for so many tensor-parallel ranks,
        pipeline: and so many stages: one file for each rank.
        check: of the result.
        progress: told after every tensor.

    Raises:
        ConfigError: an architecture or a layout that is not supported.
        DataError: a tensor is missing, unknown, of another shape, or tied in name only.
    """
    config = load_hf_config(hf_dir)
    sizes = ParallelConfig(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline)
    raise_first(layout_problems(ModelShape.from_hf_config(config), sizes))
    tensors, shapes = SafetensorsFolder(hf_dir), expected_tensors(config)
    _check_hf(tensors, shapes, config, hf_dir)
    tally = _Tally(shapes, progress)
    with written_whole(out) as partial:
        with TorchDistWriter(partial) as writer:
            for place in placements(config, pipeline):
                shards = split_shards(place, tensors, tensor, config)
                _write(writer, place, shards, config.num_hidden_layers)
                count = sum(shapes[name].numel() for name in place.hf)
                tally.add(len(place.hf), count, shards[0].itemsize)
            writer.finish({"step": 0})
        (partial / HF_SUBFOLDER).mkdir()
        carry_over(hf_dir, partial / HF_SUBFOLDER)
        manifest = {
            "step": 0,
            "layout": {"tp": tensor, "pp": pipeline, "dp": 1},
            "versions": {"megatron_sdsearch": __version__, "torch": version("torch")},
        }
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
        check(partial)
    return tally.result()


def to_hf(
    checkpoint: Path,
    out: Path,
    *,
    hf_dir: Path,
    dtype: torch.dtype | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    check: Check = lambda _: None,
    progress: Progress = lambda done, total: None,
) -> Conversion:
    """Write a checkpoint's weights as a Hugging Face folder.

    Args:
        checkpoint: of training or of ``to_megatron``.
        out: the new folder.
        hf_dir: config, tokenizer and the rest are carried over from it.
        dtype: of the new weights; None keeps the checkpoint's.
        shard_bytes: of one safetensors file.
        check: of the result.
        progress: told after every tensor.

    Raises:
        ConfigError: an architecture that is not supported.
        DataError: a tensor is missing, unknown or of another shape.
        CheckpointError: the checkpoint is damaged.
    """
    config = load_hf_config(hf_dir)
    tensors, shapes = MegatronFolder(checkpoint, config), expected_tensors(config)
    _check_megatron(tensors, shapes, config, checkpoint)
    tally = _Tally(shapes, progress)

    def stream() -> Iterator[tuple[str, Tensor]]:
        for place in placements(config, pp_size=1):
            for name in place.hf:
                whole = tensors[name]
                whole = whole if dtype is None else whole.to(dtype)
                yield name, whole
                tally.add(1, whole.numel(), whole.itemsize)

    write_hf_folder(stream(), hf_dir, out, is_writer=True, shard_bytes=shard_bytes, check=check)
    return tally.result()


def expected_tensors(config: PretrainedConfig) -> dict[str, Tensor]:
    """Meta tensors by name, of the model that transformers builds from this config. A tied head is not among them."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tensors: dict[str, Tensor] = model.state_dict()
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    return tensors


def _check_hf(tensors: SafetensorsFolder, shapes: dict[str, Tensor], config: PretrainedConfig, hf_dir: Path) -> None:
    check_weights(tensors, config, hf_dir)
    for name, wanted in shapes.items():
        shape = tensors.shape(name)
        if shape != tuple(wanted.shape):
            raise DataError(f"{hf_dir}: {name} is {shape}, the model of config.json wants {tuple(wanted.shape)}")
    first: dict[str, str] = {}
    for place in placements(config, pp_size=1):
        for name in place.hf:
            other = first.setdefault(place.key, name)
            if tensors.dtype(name) != tensors.dtype(other):
                told = f"{name} is {tensors.dtype(name)} and {other} {tensors.dtype(other)}"
                raise DataError(f"{hf_dir}: {told}: they become one tensor and must have one dtype")


def _check_megatron(
    tensors: MegatronFolder, shapes: dict[str, Tensor], config: PretrainedConfig, checkpoint: Path
) -> None:
    for place in placements(config, pp_size=1):
        tensors.check(place.hf[0], [shapes[name] for name in place.hf])
    check_weights(tensors, config, checkpoint)


def _write(writer: TorchDistWriter, place: Placement, shards: list[Tensor], num_layers: int) -> None:
    """The pieces of one tensor as megatron's ranks would save them (data-parallel size 1, tensor ranks fastest)."""
    layout, tp_size = place.layout, len(shards)
    size = list(shards[0].shape)
    if layout.dim is not None:
        size[layout.dim] *= tp_size
    stack = () if place.layer is None else (num_layers,)
    first = () if place.layer is None else (place.layer,)
    for tp_rank, shard in enumerate(shards if layout.dim is not None else shards[:1]):
        for block, piece in enumerate(shard.chunk(layout.blocks, layout.dim or 0)):
            offsets = [0] * piece.dim()
            if layout.dim is not None:
                offsets[layout.dim] = (block * tp_size + tp_rank) * piece.shape[layout.dim]
            whole = piece.contiguous() if place.layer is None else piece.contiguous().unsqueeze(0)
            writer.add(place.stage * tp_size + tp_rank, place.key, (*stack, *size), (*first, *offsets), whole)
