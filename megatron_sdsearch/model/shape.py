"""The shape of a model: the sizes in its config.json, and the parameters and key-value bytes that follow from them.

Needs neither torch nor transformers. ``hf_config.py`` refuses unsupported config.json files; docs/adding-a-model.md
explains how to add a model family.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_sdsearch.config import ParallelConfig
from megatron_sdsearch.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """The differences between the supported model families. Source: their modeling files in transformers.

    Attributes:
        has_qkv_bias: query, key and value projections have biases; other projections never do.
        has_qk_norm: queries and keys are normalised per head.
        has_window_switch: ``sliding_window`` only applies if ``use_sliding_window`` is true.
    """

    has_qkv_bias: bool = False
    has_qk_norm: bool = False
    has_window_switch: bool = False


# By model_type. Qwen2.5 is a qwen2; Llama 3, 3.1, 3.2 (text) and 3.3 are llama.
ARCHITECTURES = {
    "llama": Architecture(),
    "mistral": Architecture(),
    "qwen2": Architecture(has_qkv_bias=True, has_window_switch=True),
    "qwen3": Architecture(has_qk_norm=True, has_window_switch=True),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes of a dense decoder.

    Attributes:
        num_layers: L.
        hidden: h, width of the residual stream.
        intermediate: f, width of the gated MLP.
        num_heads: query heads.
        num_groups: key-value heads.
        head_dim: width of a head.
        vocab: V, without padding.
        is_tied: embedding and output layer share one table.
        architecture: row of ``ARCHITECTURES``.
    """

    num_layers: int
    hidden: int
    intermediate: int
    num_heads: int
    num_groups: int
    head_dim: int
    vocab: int
    is_tied: bool
    architecture: Architecture

    @classmethod
    def from_hf_config(cls, config: PretrainedConfig) -> ModelShape:
        """Read the sizes of a model; ``hf_config.hf_config_problems`` must find no problem in its config."""
        return cls(
            num_layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            num_heads=config.num_attention_heads,
            num_groups=config.num_key_value_heads,
            head_dim=head_dim(config),
            vocab=config.vocab_size,
            is_tied=config.tie_word_embeddings,
            architecture=ARCHITECTURES[config.model_type],
        )

    @property
    def query_width(self) -> int:
        """Total width of the query heads."""
        return self.num_heads * self.head_dim

    @property
    def key_width(self) -> int:
        """Total width of the key heads, which is also that of the value heads."""
        return self.num_groups * self.head_dim

    @property
    def layer_matrix_params(self) -> int:
        """Number of weights in a layer's matrices: QKV and output projections, gate, up and down projections."""
        return self.hidden * (2 * self.query_width + 2 * self.key_width + 3 * self.intermediate)

    def key_width_on(self, tp: int) -> int:
        """Return the width of the key heads that a rank attends to; at least that of one head."""
        return max(1, self.num_groups // tp) * self.head_dim

    def vocab_columns(self, tp: int) -> int:
        """Return the number of vocabulary entries on a rank, padding included."""
        return padded_vocab_size(self.vocab, tp) // tp

    def layer_params(self, tp: int = 1) -> int:
        """Count the parameters of one layer on one rank: matrices and their biases are sharded, norms are not."""
        bias = (self.query_width + 2 * self.key_width) * self.architecture.has_qkv_bias
        norms = 2 * self.hidden + 2 * self.head_dim * self.architecture.has_qk_norm
        return (self.layer_matrix_params + bias) // tp + norms

    def stage_params(self, stage: int, *, tp: int, pp: int) -> int:
        """Count the parameters on one rank of a stage. A tied model has a copy of its embedding on the last stage."""
        is_first, is_last = stage == 0, stage == pp - 1
        num_tables = int(is_first) + int(is_last and not (self.is_tied and is_first))
        table = self.vocab_columns(tp) * self.hidden
        return self.num_layers // pp * self.layer_params(tp) + num_tables * table + self.hidden * is_last

    @property
    def num_params(self) -> int:
        """Number of parameters of the whole model, as Hugging Face counts them."""
        return self.stage_params(0, tp=1, pp=1)

    def kv_bytes_per_token(self, bytes_per_element: int, tp: int = 1) -> int:
        """Return the bytes of one token's keys and values in all layers, on one of ``tp`` ranks."""
        return 2 * self.num_layers * self.key_width_on(tp) * bytes_per_element


def head_dim(config: PretrainedConfig) -> int:
    """Return the width of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def padded_vocab_size(vocab_size: int, tp_size: int) -> int:
    """Return the smallest multiple of ``tp_size`` that holds the vocabulary."""
    return -(-vocab_size // tp_size) * tp_size


def layout_problems(shape: ModelShape, parallel: ParallelConfig) -> list[ConfigError]:
    """List parallel sizes that do not divide the model's sizes, with the possible ones.

    There may be fewer key-value heads than tensor-parallel ranks: megatron still splits their projection evenly and
    gathers it in the forward pass (attention.py, 0.16.1:1398). One number must divide the other.
    """
    problems, heads = [], shape.num_groups
    sizes = {"num_attention_heads": shape.num_heads, "intermediate_size": shape.intermediate}
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    divisors = [n for n in range(1, math.gcd(*sizes.values()) + 1) if not any(size % n for size in sizes.values())]
    choices = [n for n in divisors if heads % n == 0 or n % heads == 0]
    if tensor not in choices:
        wrong = ", ".join(f"{name} = {size}" for name, size in sizes.items() if size % tensor)
        problem = f"{tensor} does not divide the model's {wrong}"
        if not wrong:
            problem = f"{tensor} is neither a divisor nor a multiple of the model's num_key_value_heads = {heads}"
        fix = f"choose one of {', '.join(map(str, choices))}"
        problems.append(ConfigError("parallel.tensor_model_parallel_size", problem, fix))
    if shape.num_layers % pipeline:
        problem = f"{pipeline} does not divide the model's num_hidden_layers = {shape.num_layers}"
        fix = ", ".join(str(n) for n in range(1, shape.num_layers + 1) if shape.num_layers % n == 0)
        problems.append(ConfigError("parallel.pipeline_model_parallel_size", problem, f"choose one of {fix}"))
    return problems
