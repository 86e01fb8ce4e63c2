"""Convert models between Hugging Face folders and megatron checkpoints: one process, no GPU, no torchrun.

    python tools/convert_checkpoint.py to-megatron HF_DIR OUT --tensor 2 --pipeline 2
    python tools/convert_checkpoint.py to-hf runs/mine OUT --dtype bfloat16

Exit codes: 0 done; 1 it failed (disk full, --verify found a difference); 2 the command or its input is wrong. OUT
appears when it is complete, and not at all otherwise.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from megatron_sdsearch.cli import home_path
from megatron_sdsearch.errors import ConfigError, SDSearchError, VerificationError

if TYPE_CHECKING:
    from megatron_sdsearch.model.convert import Conversion

_START = time.monotonic()
# All that a model's folder holds; a folder with anything else is not replaced.
_MODEL_FILES = {"merges.txt", "vocab.txt", "README.md", "LICENSE", ".gitattributes", "additional_chat_templates"}
_MODEL_SUFFIXES = {".json", ".safetensors", ".jinja", ".model"}

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)


class Dtype(StrEnum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


OutArgument = Annotated[Path, typer.Argument(metavar="OUT", callback=home_path, help="The new folder.")]
VerifyOption = Annotated[
    bool, typer.Option(help="Compare the logits of both sides on random ids (float32; needs the memory of a model).")
]
OverwriteOption = Annotated[bool, typer.Option(help="Replace OUT if it is there.")]


@app.command("to-megatron")
def to_megatron(
    hf_dir: Annotated[
        Path, typer.Argument(metavar="HF_DIR", callback=home_path, help="Hugging Face folder with safetensors.")
    ],
    out: OutArgument,
    tensor: Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks it is sharded for.")] = 1,
    pipeline: Annotated[int, typer.Option(min=1, help="Pipeline stages it is sharded for.")] = 1,
    verify: VerifyOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Weights for model.megatron_dir, which any layout can start from."""
    _check_out(out, overwrite, hf_dir)
    from megatron_sdsearch.model import convert

    with _progress() as progress:
        done = convert.to_megatron(
            hf_dir,
            out,
            tensor=tensor,
            pipeline=pipeline,
            check=(lambda partial: _verify(hf_dir, partial)) if verify else None,
            progress=progress,
        )
    _report(out, done)
    print(f"start from it with model.hf_dir={out / 'hf'} model.megatron_dir={out}")


@app.command("to-hf")
def to_hf(
    checkpoint: Annotated[
        Path,
        typer.Argument(metavar="CHECKPOINT", callback=home_path, help="step_*, a run's folder, or a converted one."),
    ],
    out: OutArgument,
    hf_dir: Annotated[
        Path | None, typer.Option(callback=home_path, help="Config and tokenizer; the run's model.hf_dir by default.")
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Of the new weights; the checkpoint's by default.")] = None,
    shard_mb: Annotated[int, typer.Option(min=1, help="MiB of one safetensors file, and of memory.")] = 4096,
    verify: VerifyOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """A Hugging Face folder that transformers and SGLang load."""
    import torch

    from megatron_sdsearch.model import convert
    from megatron_sdsearch.model.megatron_folder import find_checkpoint, find_hf_dir

    folder = find_checkpoint(checkpoint)
    source = hf_dir or find_hf_dir(folder)
    _check_out(out, overwrite, folder, source)
    with _progress() as progress:
        done = convert.to_hf(
            folder,
            out,
            hf_dir=source,
            dtype=getattr(torch, dtype) if dtype else None,
            shard_bytes=shard_mb << 20,
            check=(lambda partial: _verify(partial, folder)) if verify else None,
            progress=progress,
        )
    _report(out, done)


def _check_out(out: Path, overwrite: bool, *sources: Path) -> None:
    target = out.resolve()
    for source in (path.resolve() for path in sources):
        if target == source or target in source.parents:
            raise ConfigError("OUT", f"{out} holds what is converted", "give another folder")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (overwrite and out.is_dir()):
        raise ConfigError("OUT", f"{out} is there already", "give another folder, or --overwrite for a model's folder")
    others = sorted(
        path.name
        for path in out.iterdir()
        if path.name not in _MODEL_FILES and not (path.is_file() and path.suffix in _MODEL_SUFFIXES)
    )
    if others and not (out / ".metadata").is_file():  # neither a Hugging Face folder nor a checkpoint of megatron
        problem = f"{out} holds other things than a model, such as {others[0]}"
        raise ConfigError("OUT", problem, "give another folder: it is replaced")


def _verify(hf_dir: Path, checkpoint: Path) -> None:
    from megatron_sdsearch.model.logits_check import check_same_logits

    gap = check_same_logits(hf_dir, checkpoint)
    print(f"verified: logits differ by {gap.largest:.1e} at most, the largest is {gap.scale:.1e}")


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, nothing elsewhere."""
    columns = (TextColumn("converting"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("converting", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _report(out: Path, done: Conversion) -> None:
    seconds = time.monotonic() - _START
    print(f"{out}: {done.num_tensors} tensors, {done.num_bytes / 1e9:.3f} GB, {seconds:.1f} s")


def main() -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a login node's driver, or another job's GPU, is not to be touched
    os.environ.pop("RANK", None)  # one process, inside of a job as well
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    warnings.filterwarnings("ignore", message="Please use DTensor")  # torch, of what megatron's checkpoints call
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    try:
        app()
    except (SDSearchError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1 if isinstance(error, (VerificationError, OSError)) else 2)


if __name__ == "__main__":
    main()
