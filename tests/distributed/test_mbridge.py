"""mbridge, another project's converter, reads and writes the same tensors as our weight table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from safetensors.torch import load_file

from megatron_sdsearch.config import ParallelConfig
from megatron_sdsearch.model.hf_config import load_hf_config
from megatron_sdsearch.model.shape import padded_vocab_size
from megatron_sdsearch.parallel.groups import ParallelState
from megatron_sdsearch.training.policy import Network
from tests.distributed.launch import run_distributed
from tests.distributed.oracle import VOCAB_SIZE, make_config, make_model

MODELS = [("qwen2", True), ("qwen2", False), ("qwen3", True), ("qwen3", False)]
# It knows the names of the transformer-engine spec alone.
LOCAL_NORMS = {
    "input_layernorm.weight": ["model.layers.{layer_number}.input_layernorm.weight"],
    "pre_mlp_layernorm.weight": ["model.layers.{layer_number}.post_attention_layernorm.weight"],
}


def make_bridge(hf_dir: Path) -> Any:
    from mbridge.models.qwen2 import Qwen2Bridge
    from mbridge.models.qwen3 import Qwen3Bridge

    config = load_hf_config(hf_dir)
    base = {"qwen2": Qwen2Bridge, "qwen3": Qwen3Bridge}[config.model_type]
    mappings = {name: {**getattr(base, name), **LOCAL_NORMS} for name in ("_MLP_MAPPING", "_OTHER_MAPPING")}
    # A copy: a tied model's bridge writes into the mapping that all bridges share.
    own = type("Local", (base,), {**mappings, "_DIRECT_MAPPING": dict(base._DIRECT_MAPPING)})
    return own(config, dtype=torch.float32)


def compare(rank: int, world_size: int, folder: Path) -> dict[str, list[str]]:
    """What differs, by model and direction."""
    different = {}
    for family, is_tied in MODELS:
        hf_dir = folder / f"{family}-{is_tied}"
        config = make_config(hf_dir, folder / "run", {}, parallel={"tensor_model_parallel_size": world_size})
        parallel = ParallelState.initialize(ParallelConfig(tensor_model_parallel_size=world_size), seed=1)
        gpt, bridge = Network(config, parallel).gpt, make_bridge(hf_dir)
        # As its get_model would set them, which builds with transformer-engine.
        bridge.vocab_size, bridge.make_vocab_size_divisible_by = VOCAB_SIZE, world_size
        bridge.padded_vocab_size = padded_vocab_size(VOCAB_SIZE, world_size)
        expected = load_file(hf_dir / "model.safetensors")
        written = {name: tensor.clone() for name, tensor in bridge.export_weights([gpt])}
        different[f"{hf_dir.name} written"] = sorted(written.keys() ^ expected.keys()) + [
            name for name in written if not torch.equal(written[name], expected[name])
        ]
        ours = {name: parameter.detach().clone() for name, parameter in gpt.named_parameters()}
        with torch.no_grad():
            for parameter in gpt.parameters():
                parameter.fill_(torch.nan)
        bridge.load_weights([gpt], str(hf_dir))
        different[f"{hf_dir.name} read"] = [n for n, p in gpt.named_parameters() if not torch.equal(p, ours[n])]
        parallel_state.destroy_model_parallel()
    return different


@pytest.mark.parametrize("world_size", [1, 2])
def test_mbridge_reads_and_writes_the_same_tensors(tmp_path: Path, world_size: int) -> None:
    for family, is_tied in MODELS:
        make_model(tmp_path / f"{family}-{is_tied}", family, is_tied=is_tied)
    for different in run_distributed(compare, world_size, tmp_path):
        assert len(different) == 2 * len(MODELS)
        assert {name: names for name, names in different.items() if names} == {}
