"""Convert models between Hugging Face folders and megatron checkpoints: one process, no GPU, no torchrun.

    python tools/convert_checkpoint.py to-megatron HF_DIR OUT --tensor 2 --pipeline 2
    python tools/convert_checkpoint.py to-hf runs/mine OUT --dtype bfloat16

Exit codes: 0 success; 1 failure (disk full, --verify found a difference); 2 wrong command or input. OUT is created
complete or not at all.
"""

from __future__ import annotations

import argparse
import logging
import os
import resource
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import Progress

from megatron_sdsearch.config import path_argument
from megatron_sdsearch.errors import ConfigError, SDSearchError, VerificationError

if TYPE_CHECKING:
    from megatron_sdsearch.model.convert import Conversion

# Files that a model's folder may hold; a folder with any other file is not replaced.
_MODEL_FILES = {"merges.txt", "vocab.txt", "README.md", "LICENSE", ".gitattributes", "additional_chat_templates"}
_MODEL_SUFFIXES = {".json", ".safetensors", ".jinja", ".model"}


def main() -> None:
    start = time.monotonic()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # leaves a login node's driver and other jobs' GPUs alone
    os.environ.pop("RANK", None)  # a single process, even inside a job
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    warnings.filterwarnings("ignore", message="Please use DTensor")  # torch warns about a call of megatron's
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    arguments = parse_arguments()
    console = Console(stderr=True)
    try:
        with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
            done = convert(arguments, bar)
    except (SDSearchError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1 if isinstance(error, (VerificationError, OSError)) else 2)
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # mapped files included
    size, seconds = f"{done.num_bytes / 1e9:.3f} GB", f"{time.monotonic() - start:.1f} s"
    print(f"{arguments.out}: {done.num_tensors} tensors, {size}, {seconds}, peak memory {peak_mb:,.0f} MB")
    if arguments.command == "to-megatron":
        print(f"start from it with model.hf_dir={arguments.out / 'hf'} model.megatron_dir={arguments.out}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    to_megatron = commands.add_parser("to-megatron", help="weights for model.megatron_dir, for any layout")
    to_megatron.add_argument("source", metavar="HF_DIR", type=path_argument, help="folder with safetensors")
    to_megatron.add_argument("--tensor", type=int, default=1, help="ranks that the vocabulary is padded for")
    to_megatron.add_argument("--pipeline", type=int, default=1, help="stages, with a file for each")
    to_hf = commands.add_parser("to-hf", help="a Hugging Face folder that transformers and SGLang load")
    to_hf.add_argument("source", metavar="CHECKPOINT", type=path_argument, help="step_*, a run's or converted folder")
    to_hf.add_argument("--hf-dir", type=path_argument, help="config and tokenizer (default: the run's model.hf_dir)")
    dtypes = ("float32", "bfloat16", "float16")
    to_hf.add_argument("--dtype", choices=dtypes, help="of the new weights (default: the checkpoint's)")
    to_hf.add_argument("--shard-mb", type=int, default=4096, help="MiB of one safetensors file, and of memory")
    for command in (to_megatron, to_hf):
        command.add_argument("out", metavar="OUT", type=path_argument, help="the new folder")
        command.add_argument("--verify", action="store_true", help="compare the logits of both sides on random ids")
        command.add_argument("--overwrite", action="store_true", help="replace OUT if it is there")
    arguments = parser.parse_args()
    for name in ("tensor", "pipeline", "shard_mb"):
        if getattr(arguments, name, 1) < 1:
            parser.error(f"--{name.replace('_', '-')} is at least 1")
    return arguments


def convert(arguments: argparse.Namespace, bar: Progress) -> Conversion:
    """Run the command; raises as ``to_megatron`` and ``to_hf`` do, and ConfigError if OUT must not be replaced."""
    import torch

    from megatron_sdsearch.model.convert import to_hf, to_megatron
    from megatron_sdsearch.model.megatron_folder import find_checkpoint, find_hf_dir

    task = bar.add_task("converting", total=None)

    def progress(done: int, total: int) -> None:
        bar.update(task, completed=done, total=total)

    def check(partial: Path) -> None:
        if arguments.verify:
            from megatron_sdsearch.model.logits_check import check_same_logits

            sides = (source, partial) if arguments.command == "to-megatron" else (partial, source)
            largest, scale = check_same_logits(*sides)
            print(f"verified: logits differ by at most {largest:.1e}, the largest is {scale:.1e}")

    source, out = arguments.source, arguments.out
    if arguments.command == "to-megatron":
        check_out(out, arguments.overwrite, source)
        layout = {"tensor": arguments.tensor, "pipeline": arguments.pipeline}
        return to_megatron(source, out, **layout, check=check, progress=progress)
    source = find_checkpoint(source)
    hf_dir = arguments.hf_dir or find_hf_dir(source)
    check_out(out, arguments.overwrite, source, hf_dir)
    return to_hf(
        source,
        out,
        hf_dir=hf_dir,
        dtype=getattr(torch, arguments.dtype) if arguments.dtype else None,
        shard_bytes=arguments.shard_mb << 20,
        check=check,
        progress=progress,
    )


def check_out(out: Path, overwrite: bool, *sources: Path) -> None:
    """Check that OUT is new or may be replaced.

    Raises:
        ConfigError: OUT holds a source or files that do not belong to a model, or exists without ``--overwrite``.
    """
    target = out.resolve()
    for source in (path.resolve() for path in sources):
        if target == source or target in source.parents:
            raise ConfigError("OUT", f"{out} holds the model to convert", "give another folder")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (overwrite and out.is_dir()):
        raise ConfigError("OUT", f"{out} already exists", "give another folder, or --overwrite for a model's folder")
    others = sorted(
        path.name
        for path in out.iterdir()
        if path.name not in _MODEL_FILES and not (path.is_file() and path.suffix in _MODEL_SUFFIXES)
    )
    if others and not (out / ".metadata").is_file():  # neither a Hugging Face folder nor a megatron checkpoint
        problem = f"{out} holds other things than a model, such as {others[0]}"
        raise ConfigError("OUT", problem, "give another folder, because it would be replaced")


if __name__ == "__main__":
    main()
