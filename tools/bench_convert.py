"""Seconds, peak memory and bytes of both conversions of a synthetic model, as one JSON object.

    python tools/bench_convert.py --megabytes 1000 --tensor 2 --pipeline 2

The model is a bfloat16 Qwen2 of random bits in shards of ``--shard-mb``. Every conversion is a process of its own,
whose start and imports are measured apart (``imports``); ``copy_s`` is the time of copying the folder's files.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from megatron_sdsearch.config import path_argument

HIDDEN, INTERMEDIATE, VOCAB = 1024, 2816, 32000
TOOL = str(Path(__file__).with_name("convert_checkpoint.py"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=256, help="of weights, at least 200")
    parser.add_argument("--shard-mb", type=int, default=64)
    parser.add_argument("--tensor", type=int, default=2)
    parser.add_argument("--pipeline", type=int, default=1)
    parser.add_argument("--folder", type=path_argument, help="where to work; a temporary folder by default")
    arguments = parser.parse_args()
    layout = {"tensor": arguments.tensor, "pipeline": arguments.pipeline}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        source, there, back = (Path(name) / part for part in ("hf", "mg", "back"))
        # In a process of its own: a child's peak memory is never below what this one takes when it starts the child.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            pool.apply(make_model, (source, arguments.megabytes, arguments.pipeline, arguments.shard_mb << 20))
        options = [f"--{option}={value}" for option, value in layout.items()]
        results = {
            "imports": measure("-c", "import megatron_sdsearch.model.convert"),
            "to_megatron": measure(TOOL, "to-megatron", source, there, *options),
            "to_hf": measure(TOOL, "to-hf", there, back, f"--shard-mb={arguments.shard_mb}"),
        }
        start = time.monotonic()
        shutil.copytree(source, Path(name) / "copy")
        results["copy_s"] = round(time.monotonic() - start, 2)
        for file in source.glob("*.safetensors"):
            assert (back / file.name).read_bytes() == file.read_bytes(), "the round trip is not bit-exact"
        sizes = {
            f"{part.name}_bytes": sum(path.stat().st_size for path in part.rglob("*") if path.is_file())
            for part in (source, there)
        }
    print(json.dumps({**layout, "shard_mb": arguments.shard_mb, **sizes, **results}))


def measure(*arguments: object) -> dict[str, Any]:
    """Run a Python program: its seconds, and its peak resident memory, files that it has mapped included."""
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, *map(str, arguments)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{arguments[0]} ended with exit code {process.returncode}")
    return {"s": round(time.monotonic() - start, 2), "peak_mb": round(usage.ru_maxrss / 1024, 1)}


def make_model(folder: Path, megabytes: int, pipeline: int, shard_bytes: int) -> None:
    """Write random bits in the shapes of a Qwen2 with about ``megabytes`` of weights."""
    import torch
    from transformers import Qwen2Config

    from megatron_sdsearch.model.convert import expected_tensors
    from megatron_sdsearch.model.hf_folder import write_hf_folder
    from megatron_sdsearch.model.weight_table import placements

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
    random = torch.Generator().manual_seed(0)
    shapes = {name: tensor.shape for name, tensor in expected_tensors(config).items()}
    stream = (
        (name, torch.randint(-(2**14), 2**14, shapes[name], generator=random, dtype=torch.int16).view(torch.bfloat16))
        for placement in placements(config, 1)
        for name in placement.hf
    )
    source = folder.with_name("config")
    config.save_pretrained(source)
    write_hf_folder(stream, source, folder, is_writer=True, shard_bytes=shard_bytes)


if __name__ == "__main__":
    main()
