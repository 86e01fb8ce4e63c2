"""Writing a Hugging Face folder shard by shard, from a stream of whole tensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megatron_sdsearch.model.hf_weights import drain_collective

DEFAULT_SHARD_BYTES = 4 << 30
# In any format: Llama's and Mistral's own files lie beside transformers'.
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf")
_TEMPLATES = "additional_chat_templates"


def write_hf_folder(
    weights: Iterable[tuple[str, Tensor]],
    source: Path,
    target: Path,
    *,
    is_writer: bool,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    check: Callable[[Path], None] = lambda _: None,
) -> None:
    """Write new weights; everything else (config, tokenizer, template) is carried over from ``source``.

    Memory holds one shard. ``target`` is replaced as a whole once the new folder is complete.

    Args:
        weights: whole tensors; a collective, which every rank drains even when writing fails.
        source: the folder that the run started from.
        target: of the new one.
        is_writer: this rank writes.
        shard_bytes: of tensors in one file; a larger tensor gets a file of its own.
        check: called by the writer with the complete new folder, before it takes ``target``'s place.

    Raises:
        OSError: on the writer, when the disk is full or the folder may not be written; ``target`` is as before.
    """
    if not is_writer:
        drain_collective(weights)
        return
    writer = _ShardWriter(_partial(target), shard_bytes)
    with _whole_or_nothing(target):
        drain_collective(weights, writer.add, before=writer.start)
        writer.finish()
        carry_over(source, writer.folder, writer.dtype)
        check(writer.folder)


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """An empty folder to fill, which takes ``target``'s place at the end; nothing is left of it after an error."""
    partial = _partial(target)
    with _whole_or_nothing(target):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial


@contextmanager
def _whole_or_nothing(target: Path) -> Iterator[None]:
    try:
        yield
        _replace(target, _partial(target))
    except BaseException:
        shutil.rmtree(_partial(target), ignore_errors=True)
        raise


def _partial(target: Path) -> Path:
    return target.with_name(f".partial_{target.name}")


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
        file.chmod(self.folder.stat().st_mode & 0o666)  # safetensors makes it private, whatever the umask
        self._names.append(list(self._tensors))
        self._total_bytes += self._num_bytes
        self._tensors, self._num_bytes = {}, 0

    def _file(self, index: int) -> Path:
        return self.folder / f"shard-{index}"


def carry_over(source: Path, target: Path, dtype: str | None = None) -> None:
    """Copy everything but weights: configs, tokenizer, chat templates, licence.

    Args:
        source: an existing folder.
        target: another one.
        dtype: of the new weights, for config.json, which is copied as it is where it says so already.
    """
    for file in source.iterdir():
        if file.is_file() and not file.name.endswith(_WEIGHTS):
            shutil.copy2(file, target / file.name)
    if (source / _TEMPLATES).is_dir():
        shutil.copytree(source / _TEMPLATES, target / _TEMPLATES)
    hf_config = json.loads((target / "config.json").read_text())
    told = hf_config.pop("torch_dtype", None)  # the name of older versions
    if dtype is None or hf_config.get("dtype", told) == dtype:
        return
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
