"""Writes a Hugging Face folder, one shard at a time, from a stream of whole tensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megatron_sdsearch.files import replacing_folder
from megatron_sdsearch.model.hf_weights import drain_collective

DEFAULT_SHARD_BYTES = 4 << 30
# Weights in any format: Llama's and Mistral's original files are in the same folder.
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf")
_TEMPLATES = "additional_chat_templates"


def write_hf_folder(
    weights: Iterable[tuple[str, Tensor]],
    source: Path,
    target: Path,
    *,
    is_writer: bool,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write new weights and copy everything else (config, tokenizer, template) from ``source``.

    Memory holds one shard. ``target`` is replaced as a whole once the new folder is complete.

    Args:
        weights: whole tensors; a collective, which every rank drains even if writing fails.
        source: the folder that the run started from.
        target: the new folder.
        is_writer: whether this rank writes.
        shard_bytes: maximum size of the tensors in one file; a larger tensor gets a file of its own.
        check: called by the writer with the complete new folder, before it replaces ``target``.

    Raises:
        OSError: on the writer, if the disk is full or the folder cannot be written; ``target`` is unchanged.
    """
    if not is_writer:
        drain_collective(weights)
        return
    with replacing_folder(target) as partial:
        writer = _ShardWriter(partial, shard_bytes)
        drain_collective(weights, writer.add, before=lambda: partial.mkdir(parents=True))
        writer.finish()
        carry_over(source, partial, writer.dtype)
        if check is not None:
            check(partial)


class _ShardWriter:
    """Writes files of about ``shard_bytes`` each; ``finish`` gives them their final names, which hold their number."""

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self._folder = folder
        self._shard_bytes = shard_bytes
        self._tensors: dict[str, Tensor] = {}
        self._num_bytes = 0
        self._total_bytes = 0
        self._files: list[tuple[Path, list[str]]] = []
        self.dtype = ""

    def add(self, named: tuple[str, Tensor]) -> None:
        name, tensor = named
        if self._tensors and self._num_bytes + tensor.nbytes > self._shard_bytes:
            self._flush()
        self._tensors[name] = tensor.detach().cpu().contiguous().clone()
        self._num_bytes += tensor.nbytes
        self.dtype = self.dtype or str(tensor.dtype).removeprefix("torch.")

    def finish(self) -> None:
        self._flush()
        if len(self._files) == 1:
            self._files[0][0].rename(self._folder / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for number, (file, names) in enumerate(self._files, start=1):
            final_name = f"model-{number:05d}-of-{len(self._files):05d}.safetensors"
            file.rename(self._folder / final_name)
            weight_map |= dict.fromkeys(names, final_name)
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
        (self._folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    def _flush(self) -> None:
        file = self._folder / f"shard-{len(self._files)}"
        try:
            save_file(self._tensors, file, metadata={"format": "pt"})
        except SafetensorError as error:  # the disk is full
            raise OSError(f"{file}: {error}") from error
        file.chmod(self._folder.stat().st_mode & 0o666)  # safetensors creates private files, whatever the umask
        self._files.append((file, list(self._tensors)))
        self._total_bytes += self._num_bytes
        self._tensors, self._num_bytes = {}, 0


def carry_over(source: Path, target: Path, dtype: str | None = None) -> None:
    """Copy everything except weights: configs, tokenizer, chat templates, licence.

    Args:
        source: an existing folder.
        target: another existing folder.
        dtype: of the new weights, written to config.json if it differs there; None leaves config.json unchanged.
    """
    for file in source.iterdir():
        if file.is_file() and not file.name.endswith(_WEIGHTS):
            shutil.copy2(file, target / file.name)
    if (source / _TEMPLATES).is_dir():
        shutil.copytree(source / _TEMPLATES, target / _TEMPLATES)
    config_file = target / "config.json"
    hf_config = json.loads(config_file.read_text())
    written = hf_config.pop("torch_dtype", None)  # its name in older versions
    if dtype is not None and hf_config.get("dtype", written) != dtype:
        config_file.write_text(json.dumps({**hf_config, "dtype": dtype}, indent=2) + "\n")
