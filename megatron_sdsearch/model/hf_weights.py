"""Loads Hugging Face weights into megatron's model and exports them, by the table in ``weight_table.py``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PretrainedConfig

from megatron_sdsearch.errors import DataError
from megatron_sdsearch.file_kinds import refuse_other_kind
from megatron_sdsearch.model.weight_table import EMBEDDING, HEAD, VOCAB, Placement, placements

if TYPE_CHECKING:  # commands that only inspect a folder's weights need not load megatron
    from megatron.core.models.gpt import GPTModel

    from megatron_sdsearch.model.megatron_folder import MegatronFolder
    from megatron_sdsearch.parallel.groups import ParallelState

_INDEX = "model.safetensors.index.json"
T = TypeVar("T")


HFTensors: TypeAlias = "SafetensorsFolder | MegatronFolder"
"""Whole tensors by their Hugging Face names, read one at a time."""


@torch.no_grad()
def load_weights(
    gpt: GPTModel, tensors: HFTensors, source: Path, config: PretrainedConfig, parallel: ParallelState
) -> None:
    """Load this rank's shards of all weights.

    Args:
        gpt: this rank's stage.
        tensors: the tensors of ``source``.
        source: named in messages.
        config: of the model.
        parallel: the layout of this run, which need not be the one that ``source`` was written with.

    Raises:
        DataError: names a tensor that is missing, unknown, not finite or of another shape; or config.json ties the
            head to the embedding, and the two differ.
    """
    parameters = dict(gpt.named_parameters())
    filled: set[int] = set()
    check_weights(tensors, config, source)

    def fill(target: Tensor, shards: Sequence[Tensor], sources: Sequence[str]) -> None:
        shard, joined = shards[parallel.tp_rank], ", ".join(sources)
        if target.shape != shard.shape:
            raise DataError(f"{joined}: {tuple(shard.shape)} per shard, the model expects {tuple(target.shape)}")
        if not shard.is_floating_point():
            raise DataError(f"{joined}: {shard.dtype} is not a weight type; give a model that is not quantised")
        target.copy_(shard)
        if not target.isfinite().all():  # checked after the copy, because a smaller dtype may overflow
            for name in sources:
                if count := int((~tensors[name].isfinite()).sum()):
                    raise DataError(
                        f"{tensors.locate(name)}: {name} holds {count} numbers that are NaN or infinite; "
                        "fetch the file again, or take an earlier checkpoint of the model"
                    )
            problem = f"{tensors.locate(sources[0])}: {joined}: numbers too large for {target.dtype}"
            raise DataError(f"{problem}; set model.dtype to a wider one")
        filled.add(id(target))

    for placement in placements(config, parallel.pp_size):
        if placement.stage == parallel.pp_rank:
            shards = split_shards(placement, tensors, parallel.tp_size, config)
            fill(_find_parameter(parameters, placement), shards, placement.hf)
    if config.tie_word_embeddings and parallel.is_last_stage and not parallel.is_first_stage:
        # The last stage has its own copy of a tied table; all-reduces of the embedding group keep both equal.
        shards = VOCAB.split([tensors[EMBEDDING]], parallel.tp_size, config)
        fill(parameters["output_layer.weight"], shards, (EMBEDDING,))
    missed = [name for name, parameter in parameters.items() if id(parameter) not in filled]
    if missed:
        raise DataError(f"no weight in {source} for {', '.join(missed)}: the weight table does not fit this model")


def _find_parameter(parameters: Mapping[str, Tensor], placement: Placement) -> Tensor:
    for name in placement.megatron:
        if name in parameters:
            return parameters[name]
    names = ", ".join(placement.megatron)
    raise DataError(f"the megatron model has none of {names}: the weight table does not fit this version")


def split_shards(placement: Placement, tensors: HFTensors, tp_size: int, config: PretrainedConfig) -> list[Tensor]:
    """Cut one megatron tensor into its shards, one per tensor-parallel rank.

    Raises:
        DataError: a source is missing or has the wrong shape.
    """
    sources = [tensors[name] for name in placement.hf]
    try:
        return placement.layout.split(sources, tp_size, config)
    except RuntimeError as error:
        raise DataError(f"{', '.join(placement.hf)}: do not divide as config.json says: {error}") from error


def check_weights(tensors: HFTensors, config: PretrainedConfig, source: Path) -> None:
    """Check the names of a folder's tensors against config.json's model; a tied head is compared with the embedding.

    Some files hold a tied table twice. The two are read only if both are present and tied.

    Raises:
        DataError: a tensor is missing or unknown (part of the model would be left out), or a tied head differs from the
            embedding (transformers would load another model).
    """
    names, table = tensors.names(), placements(config, pp_size=1, has_head=True)
    expected = [name for placement in table for name in placement.hf]
    unknown = sorted(name for name in names.difference(expected) if not name.endswith("rotary_emb.inv_freq"))
    if unknown:
        problem = f"{len(unknown)} tensors that a {config.model_type} does not have: {unknown[0]}, ..."
        raise DataError(f"{source} has {problem}")
    has_head = HEAD in names
    if config.tie_word_embeddings and has_head:
        head, embedding = tensors[HEAD], tensors[EMBEDDING]
        if head.dtype != embedding.dtype or not torch.equal(head, embedding):
            raise DataError(
                f"{source}: config.json ties {HEAD} to the embedding (tie_word_embeddings = true), and the two differ; "
                "set tie_word_embeddings to false in config.json"
            )
    if not config.tie_word_embeddings and not has_head:
        raise DataError(
            f"{source} has no tensor {HEAD}, and config.json does not tie it to the embedding; fetch the folder again, "
            "or set tie_word_embeddings to true if the model was trained with tied tables"
        )
    for name in expected:
        if name != HEAD or has_head:
            tensors.locate(name)


class SafetensorsFolder:
    """Tensors of a Hugging Face folder by name, read one at a time; single file or indexed shards.

    The file is reopened for every tensor, because pages read from an open file stay in resident memory. Every method
    raises DataError if a file is missing or not a safetensors file, or does not hold the tensor.
    """

    def __init__(self, hf_dir: Path) -> None:
        self._dir = hf_dir
        index = hf_dir / _INDEX
        refuse_other_kind(index, "JSON")
        try:
            self._file_of: dict[str, str] = dict(json.loads(index.read_text())["weight_map"]) if index.is_file() else {}
            if not all(isinstance(file, str) and Path(file).name == file for file in self._file_of.values()):
                raise ValueError("weight_map holds a value that is not the name of a file in this folder")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{index} is not an index of weights ({error!r}); fetch it again") from error
        self._names: dict[Path, set[str]] = {}

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._file_of) or self._names_in(self._dir / "model.safetensors")

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor, on the CPU."""
        with self._open(self.locate(name)) as file:
            return file.get_tensor(name)  # type: ignore[no-any-return]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of one tensor without reading it."""
        with self._open(self.locate(name)) as file:
            return tuple(file.get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Return the type of one tensor as the file spells it, e.g. ``BF16``."""
        with self._open(self.locate(name)) as file:
            return str(file.get_slice(name).get_dtype())

    def locate(self, name: str) -> Path:
        """Return the file that holds a tensor."""
        if self._file_of and name not in self._file_of:
            raise DataError(f"{self._dir / _INDEX} lists no tensor {name}")
        path = self._dir / self._file_of.get(name, "model.safetensors")
        if name not in self._names_in(path):
            raise DataError(f"{path} has no tensor {name}")
        return path

    def _names_in(self, path: Path) -> set[str]:
        if path not in self._names:
            with self._open(path) as file:
                self._names[path] = set(file.keys())
        return self._names[path]

    def _open(self, path: Path) -> Any:
        if not path.is_file():
            raise DataError(f"{path} does not exist: use a folder with safetensors weights")
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            refuse_other_kind(path, "safetensors")
            raise DataError(f"{path} is not a safetensors file ({error}): fetch it again") from error


@torch.no_grad()
def export_hf_weights(
    gpt: GPTModel, config: PretrainedConfig, parallel: ParallelState, *, own_stage_only: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Yield whole Hugging Face tensors one at a time: a collective, which all its ranks must drain.

    All ranks take part, and each gets every tensor. With ``own_stage_only`` the ranks of a tensor-parallel group take
    part and get the tensors of their pipeline stage.
    """
    parameters = dict(gpt.named_parameters())
    for placement in placements(config, parallel.pp_size):
        is_own = placement.stage == parallel.pp_rank
        if own_stage_only and not is_own:
            continue
        tensors = _gather(parameters, placement, config, parallel) if is_own else []
        if parallel.pp_size > 1 and not own_stage_only:
            box: list[Any] = [[(tensor.shape, tensor.dtype) for tensor in tensors]]
            dist.broadcast_object_list(box, group=parallel.pp_group, group_src=placement.stage)
            if not is_own:
                tensors = [torch.empty(shape, dtype=dtype, device=parallel.device) for shape, dtype in box[0]]
            for tensor in tensors:
                dist.broadcast(tensor.contiguous(), group=parallel.pp_group, group_src=placement.stage)
        yield from zip(placement.hf, tensors, strict=True)


def _gather(
    parameters: Mapping[str, Tensor], placement: Placement, config: PretrainedConfig, parallel: ParallelState
) -> list[Tensor]:
    """Gather the whole Hugging Face tensors of one placement; a collective over the tensor-parallel group."""
    shard = _find_parameter(parameters, placement).detach()
    shards = [shard]
    if parallel.tp_size > 1:
        shards = [torch.empty_like(shard) for _ in range(parallel.tp_size)]
        dist.all_gather(shards, shard.contiguous(), group=parallel.tp_group)
    return placement.layout.join(shards, config)


def drain_collective(
    stream: Iterable[T],
    take: Callable[[T], object] = lambda _: None,
    *,
    before: Callable[[], object] = lambda: None,
) -> None:
    """Consume a stream of collectives to its end even if ``take`` fails, because the peers wait in each of them.

    Args:
        stream: an export of weights.
        take: called with each item until it fails.
        before: called before the first item; its failure is treated like one of ``take``.

    Raises:
        Exception: the first error of ``before`` or ``take``, once the stream has ended.
    """
    failure: Exception | None = None
    try:
        before()
    except Exception as error:  # noqa: BLE001  # raised below
        failure = error
    for item in stream:
        if failure is None:
            try:
                take(item)
            except Exception as error:  # noqa: BLE001  # raised below
                failure = error
    if failure is not None:
        raise failure
