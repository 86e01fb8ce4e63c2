"""Writing a Hugging Face folder shard by shard, from a stream of whole tensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megatron_sdsearch.model.hf_weights import exhaust

DEFAULT_SHARD_BYTES = 4 << 30
_WEIGHTS = ("model.safetensors", "model-", "pytorch_model")


def write_hf_folder(
    weights: Iterable[tuple[str, Tensor]],
    source: Path,
    target: Path,
    *,
    is_writer: bool,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Write new weights; everything else (config, tokenizer, template) is carried over from ``source``.

    Memory holds one shard. ``target`` is replaced as a whole once the new folder is complete.

    Args:
        weights: whole tensors; a collective, which every rank exhausts even when writing fails.
        source: the folder that the run started from.
        target: of the new one.
        is_writer: this rank writes.
        shard_bytes: of tensors in one file; a larger tensor gets a file of its own.

    Raises:
        OSError: on the writer, when the disk is full or the folder may not be written; ``target`` is as before.
    """
    writer = _ShardWriter(target.with_name(f".partial_{target.name}"), shard_bytes)
    if not is_writer:
        exhaust(weights, lambda _: None)
        return
    try:
        exhaust(weights, writer.add, before=writer.start)
        writer.finish()
        _carry_over(source, writer.folder, writer.dtype)
        _replace(target, writer.folder)
    except BaseException:
        shutil.rmtree(writer.folder, ignore_errors=True)
        raise


class _ShardWriter:
    """Files of about ``shard_bytes`` each; their final names are known at the end only."""

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self.folder = folder
        self.dtype = ""
        self._shard_bytes = shard_bytes
        self._tensors: dict[str, Tensor] = {}
        self._num_bytes = 0
        self._names: list[list[str]] = []
        self._total_bytes = 0

    def start(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)

    def add(self, named: tuple[str, Tensor]) -> None:
        name, tensor = named
        if self._tensors and self._num_bytes + tensor.nbytes > self._shard_bytes:
            self._flush()
        self._tensors[name] = tensor.detach().cpu().contiguous().clone()
        self._num_bytes += tensor.nbytes
        self.dtype = self.dtype or str(tensor.dtype).removeprefix("torch.")

    def finish(self) -> None:
        self._flush()
        if len(self._names) == 1:
            self._file(0).rename(self.folder / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for index, names in enumerate(self._names):
            file = f"model-{index + 1:05d}-of-{len(self._names):05d}.safetensors"
            self._file(index).rename(self.folder / file)
            weight_map |= dict.fromkeys(names, file)
        index_file = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index_file, indent=2) + "\n")

    def _flush(self) -> None:
        file = self._file(len(self._names))
        try:
            save_file(self._tensors, file, metadata={"format": "pt"})
        except SafetensorError as error:  # what a full disk is to it
            raise OSError(f"{file}: {error}") from error
        self._names.append(list(self._tensors))
        self._total_bytes += self._num_bytes
        self._tensors, self._num_bytes = {}, 0

    def _file(self, index: int) -> Path:
        return self.folder / f"shard-{index}"


def _carry_over(source: Path, target: Path, dtype: str) -> None:
    for file in source.iterdir():
        if file.is_file() and not file.name.startswith(_WEIGHTS):
            shutil.copy2(file, target / file.name)
    hf_config = json.loads((target / "config.json").read_text())
    hf_config.pop("torch_dtype", None)  # the name of older versions
    hf_config["dtype"] = dtype
    (target / "config.json").write_text(json.dumps(hf_config, indent=2) + "\n")


def _replace(target: Path, complete: Path) -> None:
    """Put ``complete`` where ``target`` is; the old folder goes once the new one stands."""
    old = target.with_name(f".old_{target.name}")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    try:
        complete.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
