"""Reads Hugging Face's config.json and lists features that would silently be computed wrongly.

Does not import megatron, so commands that only inspect a model start quickly. The supported families are in
``shape.py``, the network is in ``architecture.py``.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from megatron_sdsearch.config import RunConfig, no_model
from megatron_sdsearch.errors import ConfigError, raise_problems
from megatron_sdsearch.file_kinds import refuse_other_kind
from megatron_sdsearch.model.shape import ARCHITECTURES

_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps"),
)
_ROPE_NUMBERS = ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
# Types that only change the frequencies: others scale the attention (yarn) or depend on the length (dynamic).
_ROPE_TYPES = ("default", "llama3")


def load_hf_config(hf_dir: Path) -> PretrainedConfig:
    """Read the config.json of a supported model.

    Raises:
        ConfigError: the family is not supported, or the model uses a feature that would be computed wrongly.
    """
    config = read_hf_config(hf_dir)
    raise_problems(hf_config_problems(config))
    return config


def read_hf_config(hf_dir: Path) -> PretrainedConfig:
    """Read the config.json of any model.

    Raises:
        ConfigError: the file is missing or not a JSON object, or transformers cannot read it.
        DataError: the file has another format, such as a git LFS pointer.
    """
    path = hf_dir / "config.json"
    if not path.is_file():
        raise no_model("model.hf_dir", hf_dir)
    refuse_other_kind(path, "JSON")
    try:
        tree = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError("model.hf_dir", f"{path} cannot be read as JSON ({error})", "fetch it again") from error
    if not isinstance(tree, dict):
        raise ConfigError("model.hf_dir", f"{path} holds a {type(tree).__name__}, not an object", "fetch it again")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(hf_dir)
    except Exception as error:  # for a value of a wrong type, transformers raises whatever Python does
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError("model.hf_dir", f"{path} cannot be read ({reason})", "fix it, or fetch it again") from error
    return config


def hf_config_problems(config: PretrainedConfig) -> list[ConfigError]:
    """List settings of a model's config that are not supported or contradict each other."""
    family = config.model_type
    if family not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        return [ConfigError("model.hf_dir", f"model_type {family!r} is not supported", f"use one of {known}")]
    architecture, rope = ARCHITECTURES[family], config.rope_parameters
    numbers = {name: getattr(config, name) for name in _SIZES}
    if getattr(config, "head_dim", None) is not None:
        numbers["head_dim"] = config.head_dim
    numbers |= {f"rope_parameters.{name}": rope[name] for name in _ROPE_NUMBERS if name in rope}
    if wrong := [
        f"{name} = {value!r}"
        for name, value in numbers.items()
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf
    ]:
        fix = "use positive numbers, or fetch the file again"
        return [ConfigError("model.hf_dir", f"config.json says {', '.join(wrong)}", fix)]
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    window = None if architecture.has_window_switch else getattr(config, "sliding_window", None)
    is_full = all(layer == "full_attention" for layer in getattr(config, "layer_types", None) or ())
    rope_type, rotated = rope.get("rope_type", "default"), rope.get("partial_rotary_factor", 1.0)
    has_bias = getattr(config, "attention_bias", False) and not architecture.has_qkv_bias
    has_window = getattr(config, "use_sliding_window", False) or not is_full
    uneven = f"num_key_value_heads = {shared} does not divide num_attention_heads = {heads}"
    ignored = f"sliding_window is {window}: attention would be computed without it"
    rules = [
        (rope_type not in _ROPE_TYPES, f"rope_type {rope_type!r} is not supported", "use default RoPE or llama3's"),
        (rotated != 1.0, "partial_rotary_factor is not 1", "use a model that rotates whole heads"),
        (has_bias, f"attention_bias is true in a {family}", "use one without"),
        (getattr(config, "mlp_bias", False), f"mlp_bias is true in a {family}", "use one without"),
        (heads % shared, uneven, "fix config.json"),
        (config.hidden_act != "silu", f"hidden_act {config.hidden_act!r} is not supported", "use silu"),
        (has_window, "some layers use sliding windows", "set use_sliding_window to false"),
        (window is not None, ignored, "use a model where it is null"),
    ]
    return [ConfigError("model.hf_dir", problem, fix) for is_broken, problem, fix in rules if is_broken]


def length_problems(hf_config: PretrainedConfig, config: RunConfig) -> list[ConfigError]:
    """Report the longest sequence of a run (``RunConfig.longest_sequence``) if the model has too few positions."""
    longest, max_positions = config.longest_sequence, hf_config.max_position_embeddings
    if config.train.mode != "rl" or longest.num_tokens <= max_positions:
        return []
    problem = f"{longest.settings} makes {longest.num_tokens} tokens, the model has {max_positions} positions"
    fix = f"lower {longest.settings.replace(' + ', ' or ')}"
    return [ConfigError("rollout.max_total_tokens", problem, fix)]
