"""Writing files and folders of a run: whole or not at all, with one error that says what is missing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_sdsearch.errors import StorageError


@contextmanager
def writing(path: Path, num_bytes: int = 0) -> Iterator[None]:
    """Turn the system's errors of the block, which writes to ``path``, into a StorageError.

    Args:
        path: named in the error; a file or a folder.
        num_bytes: about to be written; 0 where that is not known.

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
    """Write beside ``path`` and rename, both flushed to the disk: a reader sees the old content or the new.

    Args:
        path: of the file; what a killed attempt has left beside it is overwritten.
        content: a text is written in UTF-8.
        is_shared: other processes may write the file at the same time; then what a killed one leaves stays.

    Raises:
        StorageError: see ``writing``; the old content is unharmed, and nothing is left of the new.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp" if is_shared else f".{path.name}.tmp")
    with writing(path, len(data)):
        try:
            with temporary.open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.rename(path)  # the content first: a crash in between leaves the old file
        except OSError:
            temporary.unlink(missing_ok=True)  # a full disk needs the room
            raise
        _sync_folder(path.parent)


def replace_folder(partial: Path, target: Path) -> None:
    """Rename a complete folder to ``target``; an old ``target`` stands aside meanwhile and is removed in the end.

    Raises:
        OSError: it cannot be renamed; ``target`` is as before.
    """
    old = target.with_name(f".old_{target.name}")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():  # nothing can be renamed over a folder that is not empty
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
    """Yield the path of a folder to make and fill, which replaces ``target`` at the end and is removed on an error.

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
    """Flush a folder's entries, so that a file that was renamed keeps its new name after a crash of the host."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def nearest_existing(path: Path) -> Path:
    """The path itself, or the nearest one above it that exists."""
    path = path.absolute()
    while not os.path.lexists(path):
        path = path.parent
    return path


def describe_free_space(path: Path) -> str:
    """How much room there is where ``path`` is or would be."""
    folder = nearest_existing(path)
    return f"{format_bytes(shutil.disk_usage(folder).free)} are free on {folder}"


def format_bytes(num_bytes: int) -> str:
    """A size in the largest of GB, MB and kB of which it has a tenth."""
    name, size = next((pair for pair in (("GB", 1e9), ("MB", 1e6)) if num_bytes >= pair[1] / 10), ("kB", 1e3))
    return f"{num_bytes / size:,.1f} {name}"
