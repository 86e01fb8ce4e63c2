"""Weights between Hugging Face and megatron names, shapes and shards: one table, read in both directions.

The same rules serve the initial load, the export, the conversion of checkpoints (``convert.py``), and the publishing of
weights to rollout engines. docs/adding-a-model.md says how to add an architecture.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PretrainedConfig

from megatron_sdsearch.errors import DataError
from megatron_sdsearch.file_kinds import refuse_other_kind
from megatron_sdsearch.model.hf_config import ARCHITECTURES, head_dim, padded_vocab_size

if TYPE_CHECKING:  # whoever only looks at a folder's weights does not wait for megatron
    from megatron.core.models.gpt import GPTModel

    from megatron_sdsearch.parallel.groups import ParallelState

Pieces = list[Tensor]
_INDEX = "model.safetensors.index.json"
HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
_COMPARED_ROWS = 4096
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How Hugging Face tensors become the shards of one megatron tensor, and back.

    Attributes:
        split: (HF tensors, tp_size, config) -> one tensor per tensor-parallel rank.
        join: its inverse, padding removed.
        dim: that shards are cut along, None when every rank holds all of it.
        blocks: a shard holds its part of so many tensors one after another; in a checkpoint each of them is whole.
    """

    split: Callable[[Sequence[Tensor], int, PretrainedConfig], Pieces]
    join: Callable[[Sequence[Tensor], PretrainedConfig], Pieces]
    dim: int | None = 0
    blocks: int = 1


def _chunks(tensor: Tensor, size: int, dim: int) -> Pieces:
    return list(tensor.chunk(size, dim=dim))


def _split_vocab(tensors: Sequence[Tensor], size: int, config: PretrainedConfig) -> Pieces:
    (table,) = tensors
    padding = padded_vocab_size(config.vocab_size, size) - config.vocab_size
    return _chunks(torch.nn.functional.pad(table, (0, 0, 0, padding)), size, 0)


def _split_qkv(tensors: Sequence[Tensor], size: int, config: PretrainedConfig) -> Pieces:
    # megatron keeps each query group's heads together: [q of the group, k, v] for every group in turn.
    groups = config.num_key_value_heads
    grouped = [tensor.unflatten(0, (groups, -1)) for tensor in tensors]
    return _chunks(torch.cat(grouped, dim=1).flatten(0, 1), size, 0)


def _join_qkv(shards: Sequence[Tensor], config: PretrainedConfig) -> Pieces:
    groups, width = config.num_key_value_heads, head_dim(config)
    grouped = torch.cat(list(shards)).unflatten(0, (groups, -1))
    sizes = [width * (config.num_attention_heads // groups), width, width]
    return [part.flatten(0, 1).contiguous() for part in grouped.split(sizes, dim=1)]


def _split_gate_up(tensors: Sequence[Tensor], size: int, config: PretrainedConfig) -> Pieces:
    gate, up = (_chunks(tensor, size, 0) for tensor in tensors)
    return [torch.cat(pair) for pair in zip(gate, up, strict=True)]


def _join_gate_up(shards: Sequence[Tensor], config: PretrainedConfig) -> Pieces:
    halves = [shard.chunk(2) for shard in shards]
    return [torch.cat([half[part] for half in halves]) for part in (0, 1)]


REPLICATED = Layout(split=lambda t, size, _: [t[0]] * size, join=lambda shards, _: [shards[0]], dim=None)
ROW = Layout(
    split=lambda t, size, _: _chunks(t[0], size, 1), join=lambda shards, _: [torch.cat(list(shards), dim=1)], dim=1
)
VOCAB = Layout(split=_split_vocab, join=lambda shards, config: [torch.cat(list(shards))[: config.vocab_size]])
QKV = Layout(split=_split_qkv, join=_join_qkv)
GATE_UP = Layout(split=_split_gate_up, join=_join_gate_up, blocks=2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One megatron tensor and its Hugging Face sources.

    Attributes:
        megatron: its name inside a layer (or the model), under the local spec and under transformer-engine's; the last
            one is its name in checkpoints, whatever the spec.
        hf: names of the sources inside a layer (or the model), in the order the layout expects.
        layout: how they are joined and sharded.
    """

    megatron: tuple[str, ...]
    hf: tuple[str, ...]
    layout: Layout


def layer_rules(config: PretrainedConfig) -> list[Rule]:
    """The tensors of one decoder layer."""
    architecture = ARCHITECTURES[config.model_type]
    attention, mlp = "self_attention.", "mlp."

    def qkv(kind: str) -> tuple[str, ...]:
        return tuple(f"self_attn.{name}_proj.{kind}" for name in "qkv")

    rules = [
        Rule(
            megatron=("input_layernorm.weight", attention + "linear_qkv.layer_norm_weight"),
            hf=("input_layernorm.weight",),
            layout=REPLICATED,
        ),
        Rule(megatron=(attention + "linear_qkv.weight",), hf=qkv("weight"), layout=QKV),
        Rule(megatron=(attention + "linear_proj.weight",), hf=("self_attn.o_proj.weight",), layout=ROW),
        Rule(
            megatron=("pre_mlp_layernorm.weight", mlp + "linear_fc1.layer_norm_weight"),
            hf=("post_attention_layernorm.weight",),
            layout=REPLICATED,
        ),
        Rule(megatron=(mlp + "linear_fc1.weight",), hf=("mlp.gate_proj.weight", "mlp.up_proj.weight"), layout=GATE_UP),
        Rule(megatron=(mlp + "linear_fc2.weight",), hf=("mlp.down_proj.weight",), layout=ROW),
    ]
    if architecture.has_qkv_bias:
        rules.append(Rule(megatron=(attention + "linear_qkv.bias",), hf=qkv("bias"), layout=QKV))
    if architecture.has_qk_norm:
        rules += [
            Rule(megatron=(f"{attention}{n}_layernorm.weight",), hf=(f"self_attn.{n}_norm.weight",), layout=REPLICATED)
            for n in "qk"
        ]
    return rules


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """A rule applied at one place of the model.

    Attributes:
        stage: the pipeline stage that owns it.
        key: of the megatron checkpoint's tensor; those of all layers are stacked under one.
        layer: its place in that stack; None outside of layers.
        megatron, hf: full names on the stage, and in the folder.
        layout: see ``Rule``.
    """

    stage: int
    key: str
    layer: int | None
    megatron: tuple[str, ...]
    hf: tuple[str, ...]
    layout: Layout


def placements(config: PretrainedConfig, pp_size: int) -> Iterator[Placement]:
    """Every tensor of the model in Hugging Face order. A tied head is the embedding's tensor and has no entry."""

    def at(stage: int, prefixes: tuple[str, str], rule: Rule, layer: int | None = None) -> Placement:
        names = tuple(prefixes[0] + name for name in rule.megatron)
        sources = tuple(prefixes[1] + name for name in rule.hf)
        key = names[-1] if layer is None else "decoder.layers." + rule.megatron[-1]
        return Placement(stage=stage, key=key, layer=layer, megatron=names, hf=sources, layout=rule.layout)

    table = Rule(megatron=("word_embeddings.weight",), hf=("embed_tokens.weight",), layout=VOCAB)
    yield at(0, ("embedding.", "model."), table)
    per_stage = config.num_hidden_layers // pp_size
    for layer in range(config.num_hidden_layers):
        stage, local = divmod(layer, per_stage)
        for rule in layer_rules(config):
            yield at(stage, (f"decoder.layers.{local}.", f"model.layers.{layer}."), rule, layer)
    norm = Rule(megatron=("final_layernorm.weight",), hf=("norm.weight",), layout=REPLICATED)
    yield at(pp_size - 1, ("decoder.", "model."), norm)
    if not config.tie_word_embeddings:
        yield head_placement(pp_size)


def head_placement(pp_size: int) -> Placement:
    """Of a head of its own."""
    name = "output_layer.weight"
    return Placement(stage=pp_size - 1, key=name, layer=None, megatron=(name,), hf=(HEAD,), layout=VOCAB)


def _parameter(parameters: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    for name in names:
        if name in parameters:
            return parameters[name]
    raise DataError(f"the megatron model has none of {', '.join(names)}: the weight table does not fit this version")


class HFTensors(Protocol):
    """Whole tensors by their Hugging Face names, read one at a time."""

    def names(self) -> set[str]:
        """Of all tensors, those included that no table knows."""
        ...

    def __getitem__(self, name: str) -> Tensor:
        """One tensor on CPU; DataError when there is none."""
        ...

    def place_of(self, name: str) -> Path:
        """The file or folder that holds it; DataError when there is none."""
        ...

    def is_equal(self, name: str, other: str) -> bool:
        """Whether two tensors that are there hold the same."""
        ...


@torch.no_grad()
def load_weights(
    gpt: GPTModel, tensors: HFTensors, source: Path, config: PretrainedConfig, parallel: ParallelState
) -> None:
    """Fill this rank's shards.

    Args:
        gpt: this rank's stage.
        tensors: of ``source``.
        source: named in messages.
        config: of the model.
        parallel: the layout, whatever the one that ``source`` was written with.

    Raises:
        DataError: a tensor is missing, unknown, has another shape or holds what is not finite, naming it; or
            config.json ties a head that is another one.
    """
    parameters = dict(gpt.named_parameters())
    filled: set[int] = set()
    check_weights(tensors, config, source)
    for place in placements(config, parallel.pp_size):
        if place.stage != parallel.pp_rank:
            continue
        target = _parameter(parameters, place.megatron)
        _copy(target, split_shards(place, tensors, parallel.tp_size, config)[parallel.tp_rank], place.hf)
        if not target.isfinite().all():
            raise _not_finite(place.hf, tensors, target.dtype)
        filled.add(id(target))
    if config.tie_word_embeddings and parallel.is_last_stage and not parallel.is_first_stage:
        # The last stage keeps its own copy of a tied table, kept equal by the embedding group's all-reduce.
        table = VOCAB.split([tensors[EMBEDDING]], parallel.tp_size, config)[parallel.tp_rank]
        _copy(parameters["output_layer.weight"], table, (EMBEDDING,))
        filled.add(id(parameters["output_layer.weight"]))
    missed = [name for name, parameter in parameters.items() if id(parameter) not in filled]
    if missed:
        raise DataError(f"no weight in {source} for {', '.join(missed)}: the weight table does not fit this model")


def split_shards(place: Placement, tensors: HFTensors, tp_size: int, config: PretrainedConfig) -> Pieces:
    """The megatron shards of one place, one per tensor-parallel rank.

    Raises:
        DataError: a source is missing or has the wrong shape.
    """
    sources = [tensors[name] for name in place.hf]
    try:
        return place.layout.split(sources, tp_size, config)
    except RuntimeError as error:
        raise DataError(f"{', '.join(place.hf)}: do not divide as config.json says: {error}") from error


def check_weights(tensors: HFTensors, config: PretrainedConfig, source: Path) -> None:
    """A folder's weights are those of config.json's model, as far as names tell; a tied head is compared.

    Raises:
        DataError: a tensor is unknown or missing, or config.json ties a head that is another one.
    """
    names = tensors.names()
    refuse_unknown(names, config, source)
    check_head(tensors, config, source)
    for place in placements(config, pp_size=1):
        for name in place.hf:
            tensors.place_of(name)


def check_head(tensors: HFTensors, config: PretrainedConfig, source: Path) -> None:
    """The head is where config.json says: the embedding, or a tensor of its own. Some files hold a tied table twice.

    Reads the two, and only where both are there and tied.

    Raises:
        DataError: another model than transformers loads would be trained, for the two differ; or there is no head.
    """
    has_head = HEAD in tensors.names()
    if config.tie_word_embeddings and has_head and not tensors.is_equal(HEAD, EMBEDDING):
        raise DataError(
            f"{source}: config.json ties {HEAD} to the embedding (tie_word_embeddings = true), and the two differ; "
            "set tie_word_embeddings to false in config.json"
        )
    if not config.tie_word_embeddings and not has_head:
        raise DataError(
            f"{source} has no tensor {HEAD}, and config.json does not tie it to the embedding; fetch the folder again, "
            "or set tie_word_embeddings to true where the model was trained so"
        )


def refuse_unknown(names: set[str], config: PretrainedConfig, source: Path) -> None:
    """A tensor that nobody reads is a part of the model that would be left out of the computation."""
    expected = {name for place in placements(config, pp_size=1) for name in place.hf} | {HEAD}
    unknown = sorted(name for name in names - expected if not name.endswith("rotary_emb.inv_freq"))
    if unknown:
        raise DataError(f"{source} has {len(unknown)} tensors that a {config.model_type} has not: {unknown[0]}, ...")


def _copy(target: Tensor, source: Tensor, names: Sequence[str]) -> None:
    if target.shape != source.shape:
        raise DataError(f"{', '.join(names)}: {tuple(source.shape)} per shard, the model wants {tuple(target.shape)}")
    if not source.is_floating_point():
        raise DataError(f"{', '.join(names)}: {source.dtype} is no type of weights; give a model that is not quantised")
    target.copy_(source)


def _not_finite(names: Sequence[str], tensors: HFTensors, dtype: torch.dtype) -> DataError:
    """Which of the sources it is; finite ones are too large for the model's dtype."""
    for name in names:
        count = int((~tensors[name].isfinite()).sum())
        if count:
            words = f"{tensors.place_of(name)}: {name} holds {count} numbers that are NaN or infinite"
            return DataError(f"{words}; fetch the file again, or take an earlier checkpoint of the model")
    words = f"{', '.join(names)}: numbers too large for {dtype}"
    return DataError(f"{tensors.place_of(names[0])}: {words}; set model.dtype to a wider one")


class SafetensorsFolder:
    """Tensors of a Hugging Face folder by name, read one at a time; single file or indexed shards.

    A file is opened anew for every tensor: what has been read of an open one stays in the process's resident memory.
    """

    def __init__(self, hf_dir: Path) -> None:
        self._dir = hf_dir
        index = hf_dir / _INDEX
        refuse_other_kind(index, "JSON")
        try:
            self._file_of: dict[str, str] = dict(json.loads(index.read_text())["weight_map"]) if index.is_file() else {}
            if not all(isinstance(file, str) and Path(file).name == file for file in self._file_of.values()):
                raise ValueError("weight_map holds what is no name of a file in this folder")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{index} is no index of weights ({error!r}); fetch it again") from error
        self._names: dict[str, set[str]] = {}

    def names(self) -> set[str]:
        """Of all tensors."""
        return set(self._file_of) or self._names_in("model.safetensors")

    def __getitem__(self, name: str) -> Tensor:
        """One tensor on CPU.

        Raises:
            DataError: no such file or tensor.
        """
        with self._open(self._file_with(name)) as file:
            return file.get_tensor(name)  # type: ignore[no-any-return]

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor, which is not read.

        Raises:
            DataError: no such file or tensor.
        """
        with self._open(self._file_with(name)) as file:
            return tuple(file.get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Of one tensor, as the file spells it, e.g. ``BF16``.

        Raises:
            DataError: no such file or tensor.
        """
        with self._open(self._file_with(name)) as file:
            return str(file.get_slice(name).get_dtype())

    @property
    def num_parameters(self) -> int:
        """Of all tensors, by the files' headers.

        Raises:
            DataError: a file is missing, or is none of weights.
        """
        return sum(math.prod(self.shape(name)) for name in self.names())

    def place_of(self, name: str) -> Path:
        """The file that holds it.

        Raises:
            DataError: no such file or tensor.
        """
        return self._dir / self._file_with(name)

    def is_equal(self, name: str, other: str) -> bool:
        """Whether two tensors hold the same, read a part at a time.

        Raises:
            DataError: no such file or tensor.
        """
        if (self.shape(name), self.dtype(name)) != (self.shape(other), self.dtype(other)):
            return False
        with self._open(self._file_with(name)) as file, self._open(self._file_with(other)) as other_file:
            rows, other_rows = file.get_slice(name), other_file.get_slice(other)
            starts = range(0, self.shape(name)[0], _COMPARED_ROWS)
            return all(torch.equal(rows[s : s + _COMPARED_ROWS], other_rows[s : s + _COMPARED_ROWS]) for s in starts)

    def _file_with(self, name: str) -> str:
        if self._file_of and name not in self._file_of:
            raise DataError(f"{self._dir / _INDEX} lists no tensor {name}")
        file = self._file_of.get(name, "model.safetensors")
        if name not in self._names_in(file):
            raise DataError(f"{self._dir / file} has no tensor {name}")
        return file

    def _names_in(self, file: str) -> set[str]:
        if file not in self._names:
            with self._open(file) as stream:
                self._names[file] = set(stream.keys())
        return self._names[file]

    def _open(self, file: str) -> Any:
        if not (self._dir / file).is_file():
            raise DataError(f"{self._dir / file} does not exist: give a folder with safetensors weights")
        try:
            return safe_open(self._dir / file, framework="pt")
        except (SafetensorError, OSError) as error:
            refuse_other_kind(self._dir / file, "safetensors")
            raise DataError(f"{self._dir / file} is no safetensors file ({error}): fetch it again") from error


@torch.no_grad()
def export_hf_weights(gpt: GPTModel, config: PretrainedConfig, parallel: ParallelState) -> Iterator[tuple[str, Tensor]]:
    """Whole Hugging Face tensors one at a time, the same on every rank. A collective: all ranks must drain it."""
    parameters = dict(gpt.named_parameters())
    for place in placements(config, parallel.pp_size):
        pieces: Pieces = []
        if place.stage == parallel.pp_rank:
            pieces = place.layout.join(_all_gather(_parameter(parameters, place.megatron), parallel), config)
        yield from zip(place.hf, _broadcast(pieces, place.stage, parallel), strict=True)


def drain_collective(
    stream: Iterable[T],
    take: Callable[[T], object] = lambda _: None,
    *,
    before: Callable[[], object] = lambda: None,
) -> None:
    """``take`` everything of a stream that is a collective.

    When that fails, drain the stream without it, for peers wait in the collectives; then raise.

    Args:
        stream: one of the exports.
        take: called with each item.
        before: called first, as if it were the first ``take``.
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


@torch.no_grad()
def export_stage_weights(
    gpt: GPTModel, config: PretrainedConfig, parallel: ParallelState
) -> Iterator[tuple[str, Tensor]]:
    """Whole Hugging Face tensors of this rank's pipeline stage; a collective over its tensor-parallel group."""
    parameters = dict(gpt.named_parameters())
    for place in placements(config, parallel.pp_size):
        if place.stage == parallel.pp_rank:
            shards = _all_gather(_parameter(parameters, place.megatron), parallel)
            yield from zip(place.hf, place.layout.join(shards, config), strict=True)


def _all_gather(shard: Tensor, parallel: ParallelState) -> Pieces:
    if parallel.tp_size == 1:
        return [shard.detach()]
    shards = [torch.empty_like(shard) for _ in range(parallel.tp_size)]
    dist.all_gather(shards, shard.detach().contiguous(), group=parallel.tp_group)
    return shards


def _broadcast(pieces: Pieces, stage: int, parallel: ParallelState) -> Pieces:
    if parallel.pp_size == 1:
        return pieces
    box: list[Any] = [[(piece.shape, piece.dtype) for piece in pieces]]
    dist.broadcast_object_list(box, group=parallel.pp_group, group_src=stage)
    if stage != parallel.pp_rank:
        pieces = [torch.empty(shape, dtype=dtype, device=parallel.device) for shape, dtype in box[0]]
    for piece in pieces:
        dist.broadcast(piece.contiguous(), group=parallel.pp_group, group_src=stage)
    return pieces
