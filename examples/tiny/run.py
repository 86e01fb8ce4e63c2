"""The main job, from nothing to a summary: world, warm start, SD-Search at TP=2, export, evaluation.

``python -m examples.tiny.run --out runs/demo --seed 1``. Every part is a command that also works by itself; each is
shown before it runs.
"""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from megatron_sdsearch.cli import home_path
from megatron_sdsearch.config import load_config
from megatron_sdsearch.errors import ConfigError, SDSearchError
from megatron_sdsearch.logging import final_table
from megatron_sdsearch.report.page import write_page

HERE = Path(__file__).parent
NUM_PROCESSES = 2
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={NUM_PROCESSES}"]
console = Console()


def main(
    out: Annotated[
        Path, typer.Option(callback=home_path, help="Folder of everything that is made; must not hold another run")
    ] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(min=0, help="Of the world, the weights and the sampling")] = 1,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="e.g. objective.alpha=0")
    ] = None,
) -> None:
    """Run the demo, or go on with an interrupted one of the same seed."""
    start = time.monotonic()
    try:
        summary = _run(out, seed, overrides or [])
    except SDSearchError as error:
        console.print(f"{type(error).__name__}: {error}", style="red", markup=False)
        raise typer.Exit(2) from error
    summary["wall_s"] = round(time.monotonic() - start, 1)
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    page = write_page(out)
    console.print(final_table(summary))
    console.print(f"summary: {out / 'summary.json'}   page: {page}", soft_wrap=True)


def _run(out: Path, seed: int, overrides: list[str]) -> dict[str, Any]:
    common = [f"seed={seed}"]
    reinforce = [str(HERE / "config.yaml"), f"run_dir={out}", *common, *overrides]
    load_config(Path(reinforce[0]), reinforce[1:])  # a wrong override is said now, not after the warm start
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("--out", f"{out} cannot be made: {error.strerror}", "give a folder to write to") from error
    facts = out / "world" / "facts.json"
    if facts.is_file() and json.loads(facts.read_text())["seed"] != seed:
        raise ConfigError(
            "--out", f"{out} holds a world of another seed than {seed}", "take another folder or its seed"
        )
    if not facts.is_file():
        _call(
            "world",
            [sys.executable, "-m", "examples.tiny.build_world", "--out", f"{out / 'world'}", "--seed", f"{seed}"],
        )
    if not (out / "warm_start" / "hf").is_dir():
        world = [f"model.hf_dir={out}/world/model", f"train.demonstrations={out}/world/demonstrations.jsonl"]
        warm_start = [str(HERE / "warm_start.yaml"), f"run_dir={out / 'warm_start'}", *common, *world]
        _call("warm start", [*TORCHRUN, "-m", "megatron_sdsearch", "train", *warm_start])
    _call("SD-Search", [*TORCHRUN, "-m", "megatron_sdsearch", "train", *reinforce])
    if not (out / "summary.json").is_file():
        console.print("saved and stopped, as a signal asked; the same command goes on from here")
        raise typer.Exit(1)
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    hf_dir = out / "hf"
    command = [sys.executable, "-m", "megatron_sdsearch", "evaluate", "--model", str(hf_dir), *reinforce]
    evaluation = json.loads(_call("evaluation by stock transformers", command, is_captured=True))
    return summary | {"hf_dir": str(hf_dir), "hf_em_end": evaluation["overall"]["em"]}


def _call(name: str, command: list[str], *, is_captured: bool = False) -> str:
    console.rule(name)
    console.print(shlex.join(command), style="dim", markup=False, highlight=False, soft_wrap=True)
    # Ctrl-C goes to the command as well: it saves and ends by itself, where `run` would kill it after a moment.
    interrupts: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: interrupts.append(number))
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE if is_captured else None, text=True, check=False)
    finally:
        signal.signal(signal.SIGINT, handler)
    if interrupts:
        console.print("interrupted; the same command goes on from here")
        raise typer.Exit(130)
    if done.returncode:
        console.print(f"{name} failed with exit code {done.returncode}; the cause is above", style="red")
        raise typer.Exit(1)
    return done.stdout or ""


if __name__ == "__main__":
    typer.run(main)
