"""Ranks of a run that start in a second, for tests that kill many of them.

Owns processes of one run (torchrun and imports take 10 s and more each time), and ways to die at a chosen moment. What
they run is ``sdsearch train`` as a user calls it, from ``cli.main`` on.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from tests.forkserver import CONTEXT

ROOT = Path(__file__).parents[2]


class Ranks:
    """The processes of one start of a run; a context manager that leaves none behind.

    Args:
        arguments: of ``sdsearch train``.
        log: where they say what they say; appended to.
        dies_at: (rank, n): that rank kills itself before its nth call that moves or flushes a file.
        max_file_bytes: no file may grow beyond it, as on a disk that is full.
    """

    def __init__(
        self,
        arguments: list[str],
        log: Path,
        *,
        world_size: int = 2,
        dies_at: tuple[int, int] | None = None,
        max_file_bytes: int | None = None,
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._log = log
        self.processes: list[ForkServerProcess] = [
            CONTEXT.Process(target=_run_rank, args=(rank, world_size, port, arguments, log, dies_at, max_file_bytes))
            for rank in range(world_size)
        ]

    def __enter__(self) -> Ranks:
        for process in self.processes:
            process.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill(range(len(self.processes)))
        for process in self.processes:
            process.join()

    @property
    def output(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    @property
    def is_running(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    @property
    def exit_codes(self) -> list[int | None]:
        """By rank; minus the signal of one that was killed, None of one that still runs."""
        return [process.exitcode for process in self.processes]

    def kill(self, ranks: Any, number: int = signal.SIGKILL) -> None:
        for rank in ranks:
            process = self.processes[rank]
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, number)

    def wait(self, limit_s: float) -> list[int | None]:
        """Exit codes; fails with the output when the limit is over."""
        deadline = time.monotonic() + limit_s
        for process in self.processes:
            process.join(max(deadline - time.monotonic(), 0.0))
        assert None not in self.exit_codes, f"no end after {limit_s} s: {self.exit_codes}\n{self.output[-4000:]}"
        return self.exit_codes

    def end_like_torchrun(self, grace_s: float = 5.0) -> None:
        """One has gone: the others end by themselves, or are ended."""
        deadline = time.monotonic() + grace_s
        for process in self.processes:
            process.join(max(deadline - time.monotonic(), 0.0))
        self.kill(range(len(self.processes)))
        for process in self.processes:
            process.join()

    def wait_until(self, is_reached: Callable[[], bool], limit_s: float = 120.0) -> bool:
        """True when it is reached, False when a rank has ended before."""
        deadline = time.monotonic() + limit_s
        while not is_reached():
            if not self.is_running:
                return False
            assert time.monotonic() < deadline, f"not reached after {limit_s} s:\n{self.output[-4000:]}"
            time.sleep(0.001)
        return True


def _run_rank(
    rank: int,
    world_size: int,
    port: int,
    arguments: list[str],
    log: Path,
    dies_at: tuple[int, int] | None,
    max_file_bytes: int | None,
) -> None:
    with log.open("ab") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    os.chdir(ROOT)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME="lo",
        OMP_NUM_THREADS="1",
        TOKENIZERS_PARALLELISM="false",
    )
    if dies_at is not None and dies_at[0] == rank:
        _die_before_file_call(dies_at[1])
    if max_file_bytes is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, resource.RLIM_INFINITY))
    from megatron_sdsearch.cli import main

    sys.argv = ["sdsearch", "train", *arguments]
    main()


def _die_before_file_call(number: int) -> None:
    lock, calls = threading.Lock(), [0]

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            with lock:
                calls[0] += 1
                if calls[0] == number:
                    os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return wrapper

    for name in ("fsync", "rename", "replace", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))
