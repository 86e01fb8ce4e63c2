"""Writes a checkpoint's files in a background thread while training continues."""

from __future__ import annotations

import queue
import threading
from inspect import signature
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from megatron_sdsearch.model.checkpoint_folder import FileRecord, hash_file

# Since 0.17 megatron's own writer must be selected: by default NVIDIA's resiliency package writes, in own processes.
_OWN_WRITER = {"async_strategy": "mcore"} if "async_strategy" in signature(dist_checkpointing.save).parameters else {}


class BackgroundWrite:
    """Writes this rank's files of one checkpoint from a copy of its state, in a thread, while training continues.

    megatron plans an asynchronous save and returns a function that would fork writers and start a manager process
    (filesystem_async.py, 0.16.1). Here a thread of this rank writes the same files instead: no process can outlive a
    killed rank, the rank cannot wait forever for a dead writer, and the first save does not start a new interpreter
    (7.7 s against 0.2 s on two cores). The cost is a copy of the state in host memory, which a GPU run makes anyway.

    Args:
        content: of the checkpoint. The constructor is a collective: the ranks agree on which of them writes what.
        folder: an empty folder.
    """

    def __init__(self, content: dict[str, Any], folder: Path) -> None:
        filesystem_async._results_queue = queue.Queue()  # keeps results in this process: no manager is started
        self._request = dist_checkpointing.save(content, str(folder), async_sharded_save=True, **_OWN_WRITER)
        self._error = ""
        self._files: dict[str, FileRecord] = {}
        self._buckets: list[Any] = []
        if self._request.async_fn is not None:
            live = self._request.async_fn_args[1]
            self._buckets = list(self._request.preload_fn())  # copies only tensors on a GPU; the loop copies the others
            for (_, _, (_, sources)), (_, _, (_, copies)) in zip(live, self._buckets, strict=True):
                copies[:] = [
                    (item, tensor.clone() if tensor.data_ptr() == source.data_ptr() else tensor)
                    for (item, tensor), (_, source) in zip(copies, sources, strict=True)
                ]
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        """True if the files are written or have failed."""
        return not self._thread.is_alive()

    def wait(self) -> tuple[str, dict[str, FileRecord]]:
        """Wait for the thread; returns the error ("" without one) and the size and checksum of each file by name."""
        self._thread.join()
        return self._error, self._files

    def write_metadata(self) -> None:
        """Write the index of all ranks' files: a collective, to be called once every rank is done without an error."""
        for finalize in self._request.finalize_fns:
            finalize()

    def _run(self) -> None:
        results: dict[int, Any] = {}
        try:
            for index, bucket in enumerate(self._buckets):
                written: queue.Queue[Any] = queue.Queue()
                pending: queue.Queue[int] = queue.Queue()
                pending.put(index)
                transforms = self._request.async_fn.args[0]
                # Flushes the file to the disk; returns an exception as its result.
                FileSystemWriterAsync.write_preloaded_data(transforms, index, bucket, written, pending, True)
                _, results[index] = written.get()
                if isinstance(results[index], BaseException):
                    raise results[index]
                path, name, _ = bucket
                self._files[name] = hash_file(Path(path))
            if self._buckets:
                self._request.async_fn_args[2].put(results)
        except BaseException as error:  # noqa: BLE001  # the training thread raises it
            self._error = describe_error(error)
        self._buckets = []  # frees the copies


def describe_error(error: BaseException) -> str:
    """Describe an error by its underlying OSError: torch hides "no space left" behind "unexpected pos 704 vs 598"."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    shown = cause or error
    return f"{type(shown).__name__}: {shown}"
