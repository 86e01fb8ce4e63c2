"""Hugging Face's config.json: the table of model families, and the refusal of what would be computed silently wrong.

How to add a family: docs/adding-a-model.md. Nothing here imports megatron, so that a command which only looks at a
model starts in seconds. The network itself is ``architecture.py``'s.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from megatron_sdsearch.config import ParallelConfig, RunConfig, no_model
from megatron_sdsearch.errors import ConfigError, raise_problems
from megatron_sdsearch.file_kinds import refuse_other_kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """What differs between the supported model families. Source: their modeling files in transformers.

    Attributes:
        has_qkv_bias: query, key and value projections have biases; the others never do.
        has_qk_norm: queries and keys are normalised per head.
        has_window_switch: ``sliding_window`` counts only where ``use_sliding_window`` is true.
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

_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps"),
)
# Those that change the frequencies alone: others scale the attention (yarn) or depend on the length (dynamic).
_ROPE_TYPES = ("default", "llama3")


def load_hf_config(hf_dir: Path) -> PretrainedConfig:
    """Read config.json.

    Raises:
        ConfigError: the family is not supported, or uses a feature that would be computed wrongly.
    """
    config = read_hf_config(hf_dir)
    raise_problems(refusals(config))
    return config


def read_hf_config(hf_dir: Path) -> PretrainedConfig:
    """Read config.json, of whatever model.

    Raises:
        ConfigError: there is none, it is no JSON object, or transformers does not know it.
        DataError: it is another kind of file, such as a git LFS pointer.
    """
    path = hf_dir / "config.json"
    if not path.is_file():
        raise no_model("model.hf_dir", hf_dir)
    refuse_other_kind(path, "JSON")
    _check_is_object(path)
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(hf_dir)
    except Exception as error:  # what a value of a wrong type comes to, transformers leaves to Python
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError("model.hf_dir", f"{path} cannot be read ({reason})", "fix it, or fetch it again") from error
    return config


def _check_is_object(path: Path) -> None:
    try:
        tree = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError("model.hf_dir", f"{path} cannot be read as JSON ({error})", "fetch it again") from error
    if not isinstance(tree, dict):
        raise ConfigError("model.hf_dir", f"{path} holds a {type(tree).__name__}, not an object", "fetch it again")


def refusals(config: PretrainedConfig) -> Iterator[ConfigError]:
    """What ``load_hf_config`` raises the first of."""
    if config.model_type not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        yield _refusal(f"model_type {config.model_type!r} is not supported", f"use one of {known}")
        return
    if wrong := [f"{name} = {value!r}" for name, value in _numbers(config).items() if not _is_positive(value)]:
        yield _refusal(f"config.json says {', '.join(wrong)}", "give positive numbers there, or fetch it again")
        return
    architecture = ARCHITECTURES[config.model_type]
    rope = config.rope_parameters
    if rope.get("rope_type", "default") not in _ROPE_TYPES:
        yield _refusal(f"rope_type {rope['rope_type']!r} is not supported", "use default RoPE or llama3's")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        yield _refusal("partial_rotary_factor is not 1", "use a model that rotates whole heads")
    if getattr(config, "attention_bias", False) and not architecture.has_qkv_bias:
        yield _refusal(f"attention_bias is true in a {config.model_type}", "use one without")
    if getattr(config, "mlp_bias", False):
        yield _refusal(f"mlp_bias is true in a {config.model_type}", "use one without")
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    if heads % shared:
        yield _refusal(
            f"num_key_value_heads = {shared} does not divide num_attention_heads = {heads}", "fix config.json"
        )
    if config.hidden_act != "silu":
        yield _refusal(f"hidden_act {config.hidden_act!r} is not supported", "use silu")
    is_full = all(kind == "full_attention" for kind in getattr(config, "layer_types", None) or ())
    if getattr(config, "use_sliding_window", False) or not is_full:
        yield _refusal("some layers use sliding windows", "set use_sliding_window to false")
    window = None if architecture.has_window_switch else getattr(config, "sliding_window", None)
    if window is not None:
        yield _refusal(
            f"sliding_window is {window}: attention would be computed without it", "use a model where it is null"
        )


def _numbers(config: PretrainedConfig) -> dict[str, Any]:
    """What the network's shape and its rotation are computed from; types and signs are as the file has them."""
    sizes = {name: getattr(config, name) for name in _SIZES}
    if getattr(config, "head_dim", None) is not None:
        sizes["head_dim"] = config.head_dim
    rope = config.rope_parameters
    names = ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return sizes | {f"rope_parameters.{name}": rope[name] for name in names if name in rope}


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _refusal(problem: str, fix: str) -> ConfigError:
    return ConfigError("model.hf_dir", problem, fix)


def check_layout(hf_config: PretrainedConfig, parallel: ParallelConfig) -> None:
    """Heads, layers and widths divide evenly. Key-value heads may also be fewer than the tensor-parallel ranks.

    megatron then cuts their projection all the same, and gathers it in the forward pass (attention.py, 0.16.1:1398).

    Raises:
        ConfigError: naming the parallel size and the model's figure that it does not divide.
    """
    raise_problems(layout_problems(hf_config, parallel))


def is_layout(hf_config: PretrainedConfig, tensor: int, pipeline: int) -> bool:
    """Whether ``check_layout`` has nothing against these sizes."""
    return not any(
        layout_problems(
            hf_config, ParallelConfig(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline)
        )
    )


def layout_problems(hf_config: PretrainedConfig, parallel: ParallelConfig) -> Iterator[ConfigError]:
    """What ``check_layout`` raises the first of."""
    figures = {
        "parallel.tensor_model_parallel_size": ("num_attention_heads", "intermediate_size"),
        "parallel.pipeline_model_parallel_size": ("num_hidden_layers",),
    }
    heads = hf_config.num_key_value_heads
    for field, names in figures.items():
        size = getattr(parallel, field.removeprefix("parallel."))
        sizes = {name: getattr(hf_config, name) for name in names}
        wrong = [f"{name} = {value}" for name, value in sizes.items() if value % size]
        choices = [n for n in range(1, math.gcd(*sizes.values()) + 1) if not any(v % n for v in sizes.values())]
        fix = f"choose one of {', '.join(map(str, choices))}"
        if field == "parallel.tensor_model_parallel_size":
            fix = f"choose one of {', '.join(str(n) for n in choices if _shares(heads, n))}"
            if not wrong and not _shares(heads, size):
                told = f"{size} is neither divisor nor multiple of the model's num_key_value_heads = {heads}"
                yield ConfigError(field, told, fix)
        if wrong:
            yield ConfigError(field, f"{size} does not divide the model's {', '.join(wrong)}", fix)


def _shares(num_key_value_heads: int, tensor: int) -> bool:
    """Each rank has whole heads, or each head whole ranks."""
    return num_key_value_heads % tensor == 0 or tensor % num_key_value_heads == 0


def length_problems(hf_config: PretrainedConfig, config: RunConfig) -> Iterator[ConfigError]:
    """List the one problem that the run's longest sequence has more tokens than the model has positions."""
    (longest, settings), num_positions = config.longest_sequence, hf_config.max_position_embeddings
    if config.train.mode == "rl" and longest > num_positions:
        yield ConfigError(
            "rollout.max_total_tokens",
            f"{settings} makes {longest} tokens, the model has {num_positions} positions",
            f"lower {settings.replace(' + ', ' or ')}",
        )


def head_dim(hf_config: PretrainedConfig) -> int:
    """Width of one attention head."""
    return int(getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads)


def padded_vocab_size(vocab_size: int, tp_size: int) -> int:
    """Smallest multiple of ``tp_size`` that holds the vocabulary."""
    return -(-vocab_size // tp_size) * tp_size
