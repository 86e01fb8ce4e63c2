"""A megatron checkpoint seen as Hugging Face tensors: the weight table on top of ``torch_dist.py``.

A checkpoint holds whole tensors (the layers of a kind stacked), however many ranks wrote it, so that the layout of the
run that reads it does not matter. Optimizer and RNG are passed over.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from megatron_sdsearch.errors import CheckpointError, DataError
from megatron_sdsearch.model.hf_weights import EMBEDDING, VOCAB, Placement, head_placement, placements
from megatron_sdsearch.model.torch_dist import METADATA, TorchDistReader

HF_SUBFOLDER = "hf"
"""Of a converted checkpoint: config and tokenizer, without weights."""
_NO_WEIGHTS = ("optimizer.", "rng", "chained_")


class MegatronFolder:
    """Implements ``HFTensors``.

    Args:
        folder: of the checkpoint.
        config: of its model.

    Raises:
        CheckpointError: it cannot be read.
    """

    def __init__(self, folder: Path, config: PretrainedConfig) -> None:
        self._folder = folder
        self._config = config
        self._reader = TorchDistReader(folder)
        self._keys = self._reader.keys()
        # A tied head, too: where the checkpoint holds one of its own, that is for `check_head` to judge.
        places = (*placements(config, pp_size=1), head_placement(pp_size=1))
        self._places = {name: place for place in places for name in place.hf}
        self._joined: dict[str, Tensor] = {}

    def names(self) -> set[str]:
        """Hugging Face names of what is there, and the checkpoint's own of what no table knows."""
        known = {name: self._key(place)[0] for name, place in self._places.items()}
        there = {name for name, key in known.items() if key in self._keys}
        return there | {key for key in self._keys - set(known.values()) if not key.startswith(_NO_WEIGHTS)}

    def __getitem__(self, name: str) -> Tensor:
        """One tensor; those that share a megatron tensor (q, k and v) are read together once.

        Raises:
            DataError: there is no such tensor, or it has another shape.
            CheckpointError: a part of it is missing or damaged.
        """
        if name not in self._joined:
            self.check(name)
            place = self._places[name]
            whole = self._reader.read(*self._key(place))
            self._joined = dict(zip(place.hf, place.layout.join([whole], self._config), strict=True))
        return self._joined.pop(name)  # each is asked for once: memory holds no more than one megatron tensor

    def check(self, name: str, sources: list[Tensor] | None = None) -> None:
        """Nothing is read.

        Args:
            name: of a tensor that must be there.
            sources: meta tensors of all that share its megatron tensor, whose shapes it must have.

        Raises:
            DataError: it is not there, or has another shape.
        """
        if name not in self._places:
            raise DataError(f"{self._folder} has no tensor {name}")
        place = self._places[name]
        key, layer = self._key(place)
        if key not in self._keys:
            raise DataError(f"{self._folder} has no tensor {key}, of which {name} is made")
        shape = self._reader.shape(key)
        num_layers = self._config.num_hidden_layers
        if layer is not None and shape[0] != num_layers:
            raise DataError(f"{self._folder}: {key} has {shape[0]} layers, the model of config.json {num_layers}")
        if sources is None:
            return
        (wanted,) = place.layout.split(sources, 1, self._config)
        found = shape if layer is None else shape[1:]
        if place.layout is VOCAB and found[0] > wanted.shape[0]:
            found = (wanted.shape[0], *found[1:])  # padded for some tensor-parallel size
        if found != tuple(wanted.shape):
            raise DataError(f"{self._folder}: {key} is {found}, the model of config.json wants {tuple(wanted.shape)}")

    def dtype(self) -> torch.dtype:
        """Of the embedding."""
        return self._reader.dtype(self._places[EMBEDDING].key)

    def place_of(self, name: str) -> Path:
        """The checkpoint's folder.

        Raises:
            DataError: there is no such tensor.
        """
        self.check(name)
        return self._folder

    def is_equal(self, name: str, other: str) -> bool:
        """Whether two tensors hold the same; reads both.

        Raises:
            DataError, CheckpointError: as of reading one.
        """
        one, two = self[name], self[other]
        return one.dtype == two.dtype and torch.equal(one, two)

    def _key(self, place: Placement) -> tuple[str, int | None]:
        """Stacked, as megatron saves layers that are alike; else under the layer's own name."""
        if place.key in self._keys:
            return place.key, place.layer
        own = [name for name in place.megatron if name in self._keys]
        return (own[0], None) if own else (place.key, place.layer)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that ``path`` stands for: itself, or what ``latest`` names in it or in its ``checkpoints``.

    Raises:
        CheckpointError: there is none.
    """
    if (path / METADATA).is_file():
        return path
    for root in (path, path / "checkpoints"):
        if (root / "latest").is_file():
            folder = root / (root / "latest").read_text().strip()
            if (folder / METADATA).is_file():
                return folder
            raise CheckpointError(f"{root / 'latest'} names {folder.name}, which is no complete checkpoint")
    raise CheckpointError(f"{path} is no checkpoint: give a step_* folder, a run's folder or a converted one")


def find_hf_dir(checkpoint: Path) -> Path:
    """The Hugging Face folder with config and tokenizer of a checkpoint's model.

    Raises:
        CheckpointError: it is not there.
    """
    if (checkpoint / HF_SUBFOLDER / "config.json").is_file():
        return checkpoint / HF_SUBFOLDER
    try:
        manifest: dict[str, Any] = json.loads((checkpoint / "manifest.json").read_text())
        folder = Path(manifest["config"]["model"]["hf_dir"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{checkpoint} does not say which model it is of: give --hf-dir") from error
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{checkpoint} was trained from {folder}, which holds no config.json: give --hf-dir")
    return folder
