"""Seconds, peak memory and bytes of both conversions of a synthetic model, as one JSON object.

    python tools/bench_convert.py --megabytes 1000 --tensor 2 --pipeline 2

The model is a bfloat16 Qwen2 of random bits in shards of ``--shard-mb``. Every part runs in a process of its own, for a
process's peak resident memory (VmHWM, files that it has mapped included) never falls; ``imports`` is what such a
process takes before it has converted anything. ``copy`` is the time of copying the folder's files, before and after.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_sdsearch.config import path_argument

HIDDEN, INTERMEDIATE, VOCAB = 1024, 2816, 32000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=256, help="of weights, at least 200")
    parser.add_argument("--shard-mb", type=int, default=64)
    parser.add_argument("--tensor", type=int, default=2)
    parser.add_argument("--pipeline", type=int, default=1)
    parser.add_argument("--folder", type=path_argument, help="where to work; a temporary folder by default")
    arguments = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        print(json.dumps(_bench(Path(name), arguments)))


def _bench(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    shard_bytes = arguments.shard_mb << 20
    hf_dir = folder / "hf"
    _apart(_make_model, hf_dir, arguments.megabytes, arguments.pipeline, shard_bytes)
    first_copy = _copy(hf_dir, folder / "copy")
    there = _apart(_to_megatron, hf_dir, folder / "mg", arguments.tensor, arguments.pipeline)
    back = _apart(_to_hf, folder / "mg", folder / "back", shard_bytes)
    second_copy = _copy(hf_dir, folder / "copy")
    is_same = all((folder / "back" / f.name).read_bytes() == f.read_bytes() for f in hf_dir.glob("*.safetensors"))
    assert is_same, "the round trip is not bit-exact"
    return {
        "tensor": arguments.tensor,
        "pipeline": arguments.pipeline,
        "shard_mb": arguments.shard_mb,
        "imports_peak_mb": _apart(_imports)["peak_mb"],
        "copy_s": round(min(first_copy, second_copy), 2),
        "model_bytes": _bytes(hf_dir),
        "checkpoint_bytes": _bytes(folder / "mg"),
        "to_megatron": there,
        "to_hf": back,
    }


def _apart(work: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Call in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, arguments)


def _imports() -> dict[str, Any]:
    import megatron_sdsearch.model.convert  # noqa: F401

    return {"peak_mb": _peak_mb()}


def _to_megatron(hf_dir: Path, out: Path, tensor: int, pipeline: int) -> dict[str, Any]:
    from megatron_sdsearch.model.convert import to_megatron

    start = time.monotonic()
    done = to_megatron(hf_dir, out, tensor=tensor, pipeline=pipeline)
    return {"s": round(time.monotonic() - start, 2), "peak_mb": _peak_mb(), "tensor_bytes": done.num_bytes}


def _to_hf(checkpoint: Path, out: Path, shard_bytes: int) -> dict[str, Any]:
    from megatron_sdsearch.model.convert import to_hf

    start = time.monotonic()
    done = to_hf(checkpoint, out, hf_dir=checkpoint / "hf", shard_bytes=shard_bytes)
    return {"s": round(time.monotonic() - start, 2), "peak_mb": _peak_mb(), "tensor_bytes": done.num_bytes}


def _make_model(folder: Path, megabytes: int, pipeline: int, shard_bytes: int) -> dict[str, Any]:
    import torch
    from transformers import Qwen2Config

    from megatron_sdsearch.model.convert import expected_tensors
    from megatron_sdsearch.model.hf_folder import write_hf_folder
    from megatron_sdsearch.model.hf_weights import placements

    per_layer = 2 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INTERMEDIATE)
    num_layers = max(1, ((megabytes << 20) - 4 * VOCAB * HIDDEN) // per_layer)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=-(-num_layers // pipeline) * pipeline,
        num_attention_heads=16,
        num_key_value_heads=16,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    shapes = expected_tensors(config)
    random = torch.Generator().manual_seed(0)
    stream = (
        (
            name,
            torch.randint(-(2**14), 2**14, shapes[name].shape, generator=random, dtype=torch.int16).view(
                torch.bfloat16
            ),
        )
        for place in placements(config, 1)
        for name in place.hf
    )
    source = folder.with_name("config")
    config.save_pretrained(source)
    write_hf_folder(stream, source, folder, is_writer=True, shard_bytes=shard_bytes)
    return {}


def _copy(source: Path, target: Path) -> float:
    shutil.rmtree(target, ignore_errors=True)
    start = time.monotonic()
    shutil.copytree(source, target)
    return time.monotonic() - start


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _peak_mb() -> float:
    status = Path("/proc/self/status").read_text().splitlines()
    return round(next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024, 1)


if __name__ == "__main__":
    main()
