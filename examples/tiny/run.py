"""Run the whole demo: world, warm start, SD-Search at TP=2, export, evaluation, summary.

``python -m examples.tiny.run --out runs/demo --seed 1``. Each part is a separate command, printed before it runs.
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
from megatron_sdsearch.files import write_file
from megatron_sdsearch.logging import final_table
from megatron_sdsearch.report.page import write_page

HERE = Path(__file__).parent
NUM_PROCESSES = 2
PYTHON = [sys.executable, "-m"]
TORCHRUN = [*PYTHON, "torch.distributed.run", "--standalone", f"--nproc-per-node={NUM_PROCESSES}"]
console = Console()


def main(
    out: Annotated[
        Path, typer.Option(callback=home_path, help="Folder for all results; must not hold another run")
    ] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of the world, the weights and the sampling")] = 1,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="e.g. objective.alpha=0")
    ] = None,
) -> None:
    """Run the demo, or continue an interrupted one with the same seed."""
    start = time.monotonic()
    try:
        summary = _run(out, seed, overrides or [])
    except SDSearchError as error:
        console.print(f"{type(error).__name__}: {error}", style="red", markup=False)
        raise typer.Exit(2) from error
    summary["wall_s"] = round(time.monotonic() - start, 1)
    write_file(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    page = write_page(out)
    console.print(final_table(summary))
    console.print(f"summary: {out / 'summary.json'}   page: {page}", soft_wrap=True)


def _run(out: Path, seed: int, overrides: list[str]) -> dict[str, Any]:
    settings = [str(HERE / "config.yaml"), f"run_dir={out}", f"seed={seed}", *overrides]
    load_config(Path(settings[0]), settings[1:])  # a wrong override is refused now, not after the warm start
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = f"{out} cannot be created: {error.strerror}"
        raise ConfigError("--out", problem, "give a folder that can be written") from error
    world = out / "world"
    facts = world / "facts.json"
    if not facts.is_file():
        _call("world", [*PYTHON, "examples.tiny.build_world", "--out", f"{world}", "--seed", f"{seed}"])
    elif json.loads(facts.read_text())["seed"] != seed:
        raise ConfigError(
            "--out", f"{out} holds the world of another seed than {seed}", "give its seed or a new folder"
        )
    if not (out / "warm_start" / "hf").is_dir():
        paths = [f"model.hf_dir={world}/model", f"train.demonstrations={world}/demonstrations.jsonl"]
        warm_start = [str(HERE / "warm_start.yaml"), f"run_dir={out / 'warm_start'}", f"seed={seed}", *paths]
        _call("warm start", [*TORCHRUN, "-m", "megatron_sdsearch", "train", *warm_start])
    _call("SD-Search", [*TORCHRUN, "-m", "megatron_sdsearch", "train", *settings])
    if not (out / "summary.json").is_file():
        console.print("saved and stopped by a signal; run the same command to continue")
        raise typer.Exit(1)
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    hf_dir = str(out / "hf")
    command = [*PYTHON, "megatron_sdsearch", "evaluate", "--model", hf_dir, *settings]
    evaluation = json.loads(_call("evaluation by stock transformers", command, is_captured=True))
    return summary | {"hf_dir": hf_dir, "hf_em_end": evaluation["overall"]["em"]}


def _call(name: str, command: list[str], *, is_captured: bool = False) -> str:
    console.rule(name)
    console.print(shlex.join(command), style="dim", markup=False, highlight=False, soft_wrap=True)
    # Ctrl-C also reaches the command, which saves and exits by itself; `subprocess.run` would soon kill it.
    interrupts: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: interrupts.append(number))
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE if is_captured else None, text=True, check=False)
    finally:
        signal.signal(signal.SIGINT, handler)
    if interrupts:
        console.print("interrupted; run the same command to continue")
        raise typer.Exit(130)
    if done.returncode:
        console.print(f"{name} failed with exit code {done.returncode}; the cause is above", style="red")
        raise typer.Exit(1)
    return done.stdout or ""


if __name__ == "__main__":
    typer.run(main)
