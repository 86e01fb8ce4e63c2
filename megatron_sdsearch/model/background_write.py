"""Shards on their way to the disk while training goes on.

megatron plans an asynchronous save and hands out a function that would fork writers and start a manager process
(filesystem_async.py, 0.16.1). Here a thread of this rank does the same writing instead: nothing of it can outlive a
rank that is killed, a writer that dies cannot leave its parent waiting for ever, and the first save does not pay for a
new interpreter (7.7 s against 0.2 s on two cores). The price is a copy of what is saved in the host's memory, which
a GPU run makes anyway.
"""

from __future__ import annotations

import queue
import threading
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from megatron_sdsearch.model.checkpoint_folder import FileRecord

# Since 0.17 the writer has to be asked for: NVIDIA's resiliency package writes by default, in processes of its own.
_OWN_WRITER = {"async_strategy": "mcore"} if "async_strategy" in signature(dist_checkpointing.save).parameters else {}


def plan_write(content: dict[str, Any], folder: Path) -> AsyncRequest:
    """megatron's plan of who writes what of ``content`` into an empty folder. A collective; nothing is written yet."""
    filesystem_async._results_queue = queue.Queue()  # results stay in this process, and no manager is started
    return dist_checkpointing.save(content, str(folder), async_sharded_save=True, **_OWN_WRITER)


class BackgroundWrite:
    """This rank's files of one checkpoint.

    Attributes:
        error: why they could not be written; "" while nothing is wrong.
        files: by name, as written.
    """

    def __init__(self, request: AsyncRequest) -> None:
        self.error = ""
        self.files: dict[str, FileRecord] = {}
        self._request = request
        self._buckets = _snapshot(request) if request.async_fn is not None else []
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        """Written or failed."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Until it is done."""
        self._thread.join()

    def write_metadata(self) -> None:
        """A collective, once every rank is done without an error: what was written where."""
        for finalize in self._request.finalize_fns:
            finalize()

    def _run(self) -> None:
        try:
            self._write()
        except BaseException as error:  # noqa: BLE001  # whatever it is, the training thread raises it
            self.error = describe(error)
        self._buckets = []  # the copies

    def _write(self) -> None:
        if not self._buckets:
            return
        transforms = self._request.async_fn.args[0]
        results: dict[int, Any] = {}
        for index, bucket in enumerate(self._buckets):
            written: queue.Queue[Any] = queue.Queue()
            pending: queue.Queue[int] = queue.Queue()
            pending.put(index)
            # Flushes the file to the disk; an exception is its result.
            FileSystemWriterAsync.write_preloaded_data(transforms, index, bucket, written, pending, True)
            _, results[index] = written.get()
            if isinstance(results[index], BaseException):
                raise results[index]
            path, name, _ = bucket
            self.files[name] = FileRecord.of(Path(path))
        self._request.async_fn_args[2].put(results)


def describe(error: BaseException) -> str:
    """In a line what went wrong: torch buries "no space left on device" under "unexpected pos 704 vs 598"."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    shown = cause or error
    return f"{type(shown).__name__}: {shown}"


def _snapshot(request: AsyncRequest) -> list[Any]:
    """The tensors as they are now, in memory that no optimizer touches."""
    live = request.async_fn_args[1]
    staged = request.preload_fn()  # copies what is on a GPU, and nothing else
    for (_, _, (_, before)), (_, _, (_, after)) in zip(live, staged, strict=True):
        after[:] = [(item, _own(tensor, source)) for (item, tensor), (_, source) in zip(after, before, strict=True)]
    return list(staged)


def _own(tensor: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    return tensor.clone() if tensor.data_ptr() == source.data_ptr() else tensor
