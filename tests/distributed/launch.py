"""Run a function on several real processes that share a process group: gloo, or NCCL with one GPU for each.

Owns the processes: their rendezvous, their end, and which of them is to blame. Leaves to the worker what the processes
do, and to `tests/forkserver.py` where they come from.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils._pytree import tree_map_only

from tests.forkserver import CONTEXT

# "cuda": as tests/gpu sets it. Else ranks compute on the CPU, and see no GPU even where there is one.
DEVICE_VARIABLE = "SDSEARCH_TEST_DEVICE"
_CHILD_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # the ranks share a few cores, and threads of many pools would fight for them
    "MKL_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",  # the host's name may resolve to an interface that a container does not have
}


class WorkerFailed(RuntimeError):
    """A rank raised or died; the text names the rank that did so first, with its traceback."""


def compute_device() -> torch.device:
    """Where this rank computes."""
    if os.environ.get(DEVICE_VARIABLE) == "cuda":
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return torch.device("cpu")


def run_distributed(worker: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 240.0) -> list[Any]:
    """Call ``worker(rank, world_size, *args)`` on ``world_size`` processes inside an initialised group.

    Args:
        worker: a module-level function, for it is found by name in processes that start from nothing.
        world_size: number of processes.
        args: picklable; the same for all ranks.
        timeout_s: for everything, imports included. The collectives of the group have the same limit.

    Returns:
        What the ranks returned, in rank order, tensors on the CPU. It has to be picklable.

    Raises:
        WorkerFailed: a rank raised or died; the others are ended. Or there are fewer GPUs than ranks.
        TimeoutError: time is up; the text shows where each rank stood.
    """
    with tempfile.TemporaryDirectory(prefix="run_distributed_") as directory:
        folder = Path(directory)
        deadline = time.monotonic() + timeout_s  # one clock for all processes of a machine
        processes = _start(worker, world_size, args, deadline, folder)
        try:
            _wait_for_all(processes, folder, deadline)
            return [pickle.loads(_file(folder, rank, "result").read_bytes()) for rank in range(world_size)]
        finally:
            _end(processes)


def _start(
    worker: Callable[..., Any], world_size: int, args: tuple[Any, ...], deadline: float, folder: Path
) -> list[BaseProcess]:
    is_on_gpus = os.environ.get(DEVICE_VARIABLE) == "cuda"
    if is_on_gpus and torch.cuda.device_count() < world_size:
        raise WorkerFailed(f"{world_size} ranks need as many GPUs; here are {torch.cuda.device_count()}")
    context: Any = mp.get_context("spawn") if is_on_gpus else CONTEXT
    with _environment(_CHILD_ENVIRONMENT | ({} if is_on_gpus else {"CUDA_VISIBLE_DEVICES": ""})):
        processes: list[BaseProcess] = [
            context.Process(target=_run_rank, args=(worker, rank, world_size, args, deadline, folder))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
    return processes


def _run_rank(
    worker: Callable[..., Any], rank: int, world_size: int, args: tuple[Any, ...], deadline: float, folder: Path
) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    with _file(folder, rank, "stack").open("w") as stack:
        remaining_s = max(deadline - time.monotonic(), 1.0)
        faulthandler.dump_traceback_later(max(remaining_s - 1.0, 0.1), file=stack)
        try:
            # A file cannot be taken by somebody else in the meantime; a free port can.
            rendezvous = (folder / "rendezvous").as_uri()
            limit = timedelta(seconds=remaining_s)
            device, backend = compute_device(), "gloo"
            if device.type == "cuda":
                torch.cuda.set_device(device)
                backend = "cpu:gloo,cuda:nccl"  # as ParallelState does
            dist.init_process_group(backend, init_method=rendezvous, rank=rank, world_size=world_size, timeout=limit)
            result = tree_map_only(torch.Tensor, torch.Tensor.cpu, worker(rank, world_size, *args))
            dist.barrier()  # a rank that leaves early would look like a failure to those still talking
            dist.destroy_process_group()
            _file(folder, rank, "result").write_bytes(pickle.dumps(result))
        except BaseException:  # noqa: BLE001 - whatever it is, the parent raises it
            _file(folder, rank, "error").write_text(f"{time.time_ns()}\n{traceback.format_exc()}")
            sys.exit(1)
        finally:
            faulthandler.cancel_dump_traceback_later()


def _wait_for_all(processes: list[BaseProcess], folder: Path, deadline: float) -> None:
    running = list(range(len(processes)))
    while running:
        if not wait([processes[rank].sentinel for rank in running], timeout=max(deadline - time.monotonic(), 0)):
            raise TimeoutError(f"time is up for ranks {running}\n{_stacks(folder, running)}")
        exit_codes = {rank: processes[rank].exitcode for rank in running}
        failed = {rank: code for rank, code in exit_codes.items() if code}
        if failed:
            time.sleep(0.2)  # ranks fail in each other's wake: let the one to blame finish writing
            raise WorkerFailed(_first_error(folder) or f"exit codes by rank, without an exception: {failed}")
        running = [rank for rank, code in exit_codes.items() if code is None]


def _first_error(folder: Path) -> str | None:
    """The earliest exception: the others usually only report that their peer has gone."""
    errors = []
    for path in folder.glob("*.error"):
        raised_at, _, text = path.read_text().partition("\n")
        errors.append((int(raised_at or 0), f"{path.stem}:\n{text}"))
    return min(errors)[1] if errors else None


def _stacks(folder: Path, ranks: list[int]) -> str:
    paths = [_file(folder, rank, "stack") for rank in ranks]
    texts = [path.read_text() if path.exists() else "still importing" for path in paths]
    return "\n".join(f"rank{rank}:\n{text}" for rank, text in zip(ranks, texts, strict=True))


def _end(processes: list[BaseProcess]) -> None:
    for process in processes:
        if process.is_alive():
            process.kill()
    for process in processes:
        process.join()
        process.close()


def _file(folder: Path, rank: int, kind: str) -> Path:
    return folder / f"rank{rank}.{kind}"


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Spawned children, and the server that others are forked from, read these while they import torch."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
