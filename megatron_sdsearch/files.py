"""Writes files and folders of a run completely or not at all, and describes disk errors."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_sdsearch.errors import StorageError


@contextmanager
def writing(path: Path, num_bytes: int = 0) -> Iterator[None]:
    """Turn an OSError of the block, which writes to ``path``, into a StorageError.

    Args:
        path: a file or a folder; named in the error.
        num_bytes: bytes about to be written; 0 if unknown.

    Raises:
        StorageError: the disk is full, or ``path`` may not be written.
    """
    try:
        yield
    except IsADirectoryError as error:
        raise StorageError(f"{path} cannot be written: it is a folder; give the name of a file") from error
    except OSError as error:
        need = f"it needs {format_bytes(num_bytes)}, " if num_bytes else ""
        raise StorageError(
            f"{path} cannot be written ({error.strerror or error}): {need}{describe_free_space(path)}; "
            "make room or fix the permissions, then start the same command again"
        ) from error


def write_file(path: Path, content: str | bytes, *, is_shared: bool = False) -> None:
    """Write a temporary file next to ``path`` and rename it, both flushed: readers see the old or the new content.

    Args:
        path: the file; the temporary file of a killed attempt is overwritten.
        content: text is written as UTF-8.
        is_shared: several processes may write the file at once, so each uses a temporary file of its own, which stays
            behind if the process is killed.

    Raises:
        StorageError: see ``writing``; the old content is unharmed, and the temporary file is removed.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp" if is_shared else f".{path.name}.tmp")
    with writing(path, len(data)):
        try:
            with temporary.open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.rename(path)  # after the flush: a crash in between leaves the old file
        except OSError:
            temporary.unlink(missing_ok=True)  # frees space on a full disk
            raise
        _sync_folder(path.parent)


def replace_folder(partial: Path, target: Path) -> None:
    """Rename a complete folder to ``target``; an old ``target`` is first moved aside and finally removed.

    Raises:
        OSError: the folder cannot be renamed; ``target`` is unchanged.
    """
    old = target.with_name(f".old_{target.name}")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():  # a folder that is not empty cannot be replaced by renaming
        target.rename(old)
    try:
        partial.rename(target)
    except BaseException:  # also Ctrl-C between the two renames
        if old.exists():
            old.rename(target)
        raise
    _sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """Yield the path of a folder to create and fill. It replaces ``target`` at the end, or is removed after an error.

    Raises:
        OSError: see ``replace_folder``.
    """
    partial = target.with_name(f".partial_{target.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        yield partial
        replace_folder(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _sync_folder(path: Path) -> None:
    """Flush a folder's entries, so that a renamed file keeps its new name if the host crashes."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def nearest_existing(path: Path) -> Path:
    """Return the path, or its nearest parent that exists."""
    path = path.absolute()
    while not os.path.lexists(path):
        path = path.parent
    return path


def describe_free_space(path: Path) -> str:
    """Describe the free space on the disk that ``path`` is or would be on."""
    folder = nearest_existing(path)
    return f"{format_bytes(shutil.disk_usage(folder).free)} are free on {folder}"


def format_bytes(num_bytes: int) -> str:
    """Format a size in GB or MB, if it is at least a tenth of one, else in kB."""
    name, size = next((pair for pair in (("GB", 1e9), ("MB", 1e6)) if num_bytes >= pair[1] / 10), ("kB", 1e3))
    return f"{num_bytes / size:,.1f} {name}"
