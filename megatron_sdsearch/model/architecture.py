"""Build a megatron-core GPTModel that returns hidden states from a Hugging Face config.

The layer spec is transformer-engine's with CUDA; without CUDA, or on request, it is our local spec with packed
attention. ``shape.py`` lists the supported models; ``hf_weights.py`` loads their weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_sdsearch.config import ModelConfig
from megatron_sdsearch.model.shape import ARCHITECTURES, head_dim, padded_vocab_size
from megatron_sdsearch.parallel.groups import ParallelState
from megatron_sdsearch.parallel.vocab import VocabShard


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with megatron's constructor; sequence parallelism reduces the gradient of its marked weight."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class PackedAttention(torch.nn.Module):
    """Causal attention within each packed sequence, for the local spec.

    megatron's own refuses packed sequences (dot_product_attention.py:153). The constructor and ``forward`` accept the
    arguments that megatron's SelfAttention passes.
    """

    def __init__(self, config: TransformerConfig, *_: Any, **__: Any) -> None:
        super().__init__()
        self.config = config

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        packed_seq_params: PackedSeqParams,
        **_: Any,
    ) -> Tensor:
        """Attend: query [T, heads, d], key and value [T, groups, d] -> [T, heads * d]."""
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        repeats = query.shape[1] // key.shape[1]
        # torch's fast CPU kernel does not accept grouped heads (enable_gqa falls back to one that is 1.7 times slower),
        # and one call per sequence has a much faster backward pass than one padded call.
        heads = (query, key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1))
        sequences = zip(*(tensor.transpose(0, 1).unsqueeze(0).split(lengths, dim=2) for tensor in heads), strict=True)
        outputs = [F.scaled_dot_product_attention(q, k, v, is_causal=True) for q, k, v in sequences]
        return torch.cat(outputs, dim=2).squeeze(0).transpose(0, 1).flatten(1)


class HiddenStates(ColumnParallelLinear):  # type: ignore[misc]
    """An LM head that holds its weight but returns its input: the loss projects the rows that it needs."""

    def forward(self, input_: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        """Return the hidden states unchanged."""
        return input_, None


def transformer_config(hf_config: PretrainedConfig, model: ModelConfig, parallel: ParallelState) -> TransformerConfig:
    """Build megatron's config for this model and parallel layout."""
    architecture = ARCHITECTURES[hf_config.model_type]
    dtype = getattr(torch, model.dtype)
    on_gpu = parallel.device.type == "cuda"
    recomputes = model.recompute == "full"
    return TransformerConfig(
        num_layers=hf_config.num_hidden_layers,
        hidden_size=hf_config.hidden_size,
        ffn_hidden_size=hf_config.intermediate_size,
        num_attention_heads=hf_config.num_attention_heads,
        num_query_groups=hf_config.num_key_value_heads,
        kv_channels=head_dim(hf_config),
        normalization="RMSNorm",
        layernorm_epsilon=hf_config.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=architecture.has_qkv_bias,
        qk_layernorm=architecture.has_qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=not on_gpu,
        # All weights are overwritten, but megatron marks them as tensor parallel only when it initialises them
        # (tensor_parallel/layers.py), and the gradient norm, hence clipping, leaves out unmarked ones.
        perform_initialization=True,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        attention_softmax_in_fp32=True,
        gradient_accumulation_fusion=False,  # the loss owns the head's matmul: its gradient comes through autograd
        tensor_model_parallel_size=parallel.tp_size,
        pipeline_model_parallel_size=parallel.pp_size,
        sequence_parallel=parallel.sequence_parallel,
        # Batched point-to-point calls are silently wrong on gloo with interleaving and hang with tied embeddings.
        batch_p2p_comm=on_gpu,
        recompute_granularity="full" if recomputes else None,
        recompute_method="uniform" if recomputes else None,
        recompute_num_layers=1 if recomputes else None,
    )


def build_model(hf_config: PretrainedConfig, model: ModelConfig, parallel: ParallelState) -> GPTModel:
    """Build this rank's GPTModel stage, weights not loaded; it returns hidden states [1, T, h].

    Under sequence parallelism they are [1, T/tp, h].
    """
    config = transformer_config(hf_config, model, parallel)
    gpt = GPTModel(
        config=config,
        transformer_layer_spec=_layer_spec(config, model, parallel),
        vocab_size=padded_vocab_size(hf_config.vocab_size, parallel.tp_size),
        max_sequence_length=hf_config.max_position_embeddings,
        pre_process=parallel.is_first_stage,
        post_process=parallel.is_last_stage,
        parallel_output=True,
        share_embeddings_and_output_weights=hf_config.tie_word_embeddings,
        position_embedding_type="rope",
        rotary_base=hf_config.rope_parameters["rope_theta"],
    )
    if parallel.is_last_stage:
        gpt.output_layer.__class__ = HiddenStates
    if hf_config.rope_parameters.get("rope_type", "default") != "default":
        # megatron's rope_scaling fixes all factors but one at Llama 3.1's (rotary_pos_embedding.py, _apply_scaling).
        rope_type = hf_config.rope_parameters["rope_type"]
        frequencies, attention_scaling = ROPE_INIT_FUNCTIONS[rope_type](hf_config, "cpu")
        assert attention_scaling == 1.0, "hf_config.py accepts RoPE types without attention scaling only"
        gpt.rotary_pos_emb.inv_freq = frequencies
    return gpt.to(parallel.device)


def _layer_spec(
    config: TransformerConfig, model: ModelConfig, parallel: ParallelState
) -> ModuleSpec | TransformerBlockSubmodules:
    if parallel.device.type == "cuda" and model.layer_spec != "local":
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    layer = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
    modules = layer.submodules
    modules.input_layernorm = modules.pre_mlp_layernorm = RMSNorm
    attention = modules.self_attention.submodules
    attention.core_attention = PackedAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    num_layers = config.num_layers // parallel.pp_size
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LMHead:
    """The output projection of the last stage, sharded by vocabulary.

    Attributes:
        weight: [V/tp, h], shared with the embedding if the model ties them.
        shard: this rank's part of the vocabulary.
        sequence_parallel: hidden states arrive sharded by sequence.
    """

    weight: Tensor
    shard: VocabShard
    sequence_parallel: bool

    @classmethod
    def from_model(cls, gpt: GPTModel, hf_config: PretrainedConfig, parallel: ParallelState) -> LMHead:
        """Create the head from a model of the last stage."""
        weight = gpt.shared_embedding_or_output_weight() if hf_config.tie_word_embeddings else gpt.output_layer.weight
        padded_size = padded_vocab_size(hf_config.vocab_size, parallel.tp_size)
        shard = VocabShard.split(hf_config.vocab_size, parallel.tp_group, padded_size)
        return cls(weight=weight, shard=shard, sequence_parallel=parallel.sequence_parallel)

    def gather(self, hidden: Tensor) -> Tensor:
        """Gather the hidden states of the whole sequence, [T, h]; sums their gradient over the vocabulary shards."""
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)  # type: ignore[no-any-return]
        return copy_to_tensor_model_parallel_region(hidden)  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """Project gathered hidden rows [N, h] -> [N, V/tp]."""
        return F.linear(hidden, self.weight)
