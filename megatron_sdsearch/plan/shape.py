"""A model as numbers: parameters, key-value bytes and FLOPs, whole and per rank.

Owns what follows from config.json alone; what a run makes of it is ``memory.py``'s and ``timing.py``'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class Biases(Protocol):
    """What distinguishes families; ``model/hf_config.py`` has the table."""

    @property
    def has_qkv_bias(self) -> bool:
        """Query, key and value projections have biases."""
        ...

    @property
    def has_qk_norm(self) -> bool:
        """Queries and keys are normalised per head."""
        ...


class TransformersConfig(Protocol):
    """The fields of a Hugging Face config that are read here."""

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    tie_word_embeddings: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A dense decoder of the families that are supported.

    Attributes:
        num_layers, hidden, intermediate, num_heads, num_groups, head_dim, vocab: megatron's sizes.
        is_tied: embedding and head are one tensor.
        has_qkv_bias, has_qk_norm: see ``model/hf_config.py``.
    """

    num_layers: int
    hidden: int
    intermediate: int
    num_heads: int
    num_groups: int
    head_dim: int
    vocab: int
    is_tied: bool
    has_qkv_bias: bool = False
    has_qk_norm: bool = False

    @classmethod
    def of(cls, config: TransformersConfig, family: Biases) -> ModelShape:
        """Of a Hugging Face config and its row of ``model.hf_config.ARCHITECTURES``."""
        return cls(
            num_layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            num_heads=config.num_attention_heads,
            num_groups=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            vocab=config.vocab_size,
            is_tied=config.tie_word_embeddings,
            has_qkv_bias=family.has_qkv_bias,
            has_qk_norm=family.has_qk_norm,
        )

    @property
    def query_width(self) -> int:
        """Of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def key_width(self) -> int:
        """Of all key heads together; values have the same."""
        return self.num_groups * self.head_dim

    def key_width_on(self, tp: int) -> int:
        """Of the key heads that one rank attends to: where there are fewer heads than ranks, one each."""
        return max(1, self.num_groups // tp) * self.head_dim

    def vocab_columns(self, tp: int) -> int:
        """Rows of the embedding on one rank, padding included."""
        return -(-self.vocab // tp)

    @property
    def matrix_params_of_layer(self) -> int:
        """Weights that every token is multiplied with."""
        attention = self.hidden * (2 * self.query_width + 2 * self.key_width)
        return attention + 3 * self.hidden * self.intermediate

    def layer_params(self, tp: int = 1) -> int:
        """Parameters of one layer on one rank: matrices and their biases are sharded, norms are not."""
        bias = (self.query_width + 2 * self.key_width) * self.has_qkv_bias
        norms = 2 * self.hidden + 2 * self.head_dim * self.has_qk_norm
        return (self.matrix_params_of_layer + bias) // tp + norms

    def stage_params(self, stage: int, *, tp: int, pp: int) -> int:
        """Parameters on one rank of a pipeline stage. A tied model has a copy of its embedding on the last stage."""
        is_first, is_last = stage == 0, stage == pp - 1
        num_tables = int(is_first) + int(is_last and not (self.is_tied and is_first))
        table = self.vocab_columns(tp) * self.hidden
        return self.num_layers // pp * self.layer_params(tp) + num_tables * table + self.hidden * is_last

    @property
    def num_params(self) -> int:
        """Of the whole model, as Hugging Face counts them."""
        return self.stage_params(0, tp=1, pp=1)

    def kv_bytes_per_token(self, bytes_per_element: int, tp: int = 1) -> int:
        """Keys and values of all layers on one of ``tp`` ranks."""
        return 2 * self.num_layers * self.key_width_on(tp) * bytes_per_element

    def forward_flops(self, num_tokens: float, mean_context: float) -> float:
        """Of all layers, without the head: two per weight and token, and causal attention over ``mean_context``."""
        attention = 4 * mean_context * self.query_width * self.num_layers
        return num_tokens * (2 * self.num_layers * self.matrix_params_of_layer + attention)

    def head_flops(self, num_rows: float) -> float:
        """Of the logits of ``num_rows`` tokens."""
        return 2.0 * num_rows * self.vocab * self.hidden
