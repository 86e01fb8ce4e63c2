"""Where test processes are forked from: a server that has imported once what every rank needs.

A rank that starts from nothing imports torch, megatron-core and transformers for 5 to 10 seconds, and on two cores all
ranks of a test do so at the same time. Forked, it starts in a tenth of a second and is as fresh: the server only
imports, and has neither threads nor a process group. Fork and CUDA do not go together, so GPU tests spawn.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from multiprocessing.context import ForkServerContext
from pathlib import Path

CONTEXT: ForkServerContext = multiprocessing.get_context("forkserver")
# The forkserver passes over a module that cannot be imported; `tests/unit/test_forkserver.py` checks that each can.
PRELOADED = [
    "megatron_sdsearch.cli",
    "megatron_sdsearch.training.loop",
    "megatron_sdsearch.report.page",
    "tensorboard",
    "tests.distributed.oracle",
    "transformers.models.llama.modeling_llama",
    "transformers.models.mistral.modeling_mistral",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.qwen3.modeling_qwen3",
]
CONTEXT.set_forkserver_preload(PRELOADED)


def run_program(
    command: list[str], *, environment: dict[str, str], cwd: Path, timeout_s: float
) -> subprocess.CompletedProcess[str]:
    """Run what ``python COMMAND`` would run, as a script or after ``-m``; its exit code and everything it said.

    Raises:
        TimeoutError: it has not ended in time, and has been killed.
    """
    with tempfile.TemporaryDirectory(prefix="run_program_") as name:
        out, err = Path(name, "stdout"), Path(name, "stderr")
        process = CONTEXT.Process(target=_run_program, args=(command, environment, cwd, out, err))
        process.start()
        process.join(timeout_s)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise TimeoutError(f"{command} did not end in {timeout_s} s: {out.read_text()}{err.read_text()}")
        return subprocess.CompletedProcess(command, process.exitcode, out.read_text(), err.read_text())


def _run_program(command: list[str], environment: dict[str, str], cwd: Path, out: Path, err: Path) -> None:
    become(environment, cwd, out, err)
    is_module = command[0] == "-m"
    sys.argv = command[1:] if is_module else command
    if is_module:
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(command[0], run_name="__main__")


def become(environment: dict[str, str], cwd: Path, out: Path, err: Path) -> None:
    """Take on environment, folder and streams of a process of its own; streams are appended to."""
    for number, path in ((1, out), (2, err)):
        with path.open("ab") as stream:
            os.dup2(stream.fileno(), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
