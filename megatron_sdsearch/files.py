"""Files of a run's folder: written whole or not at all, and one error that says what is missing when they cannot be."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_sdsearch.errors import StorageError


@contextmanager
def writing(path: Path, num_bytes: int = 0) -> Iterator[None]:
    """Around all that writes to ``path``.

    Args:
        path: named in the error; a file or a folder.
        num_bytes: that are about to be written; 0 where that is not known.

    Raises:
        StorageError: in place of the system's error: the disk is full, or the place may not be written.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, IsADirectoryError):
            raise StorageError(f"{path} cannot be written: it is a folder; give the name of a file") from error
        need = f"it needs {size_words(num_bytes)}, " if num_bytes else ""
        raise StorageError(
            f"{path} cannot be written ({error.strerror or error}): {need}{free_words(path)}; "
            "make room or fix the permissions, then start the same command again"
        ) from error


def write_file(path: Path, content: str | bytes, *, is_shared: bool = False) -> None:
    """``write_durably``, with the one error.

    Raises:
        StorageError: see ``writing``; what was there before is unharmed.
    """
    data = content.encode() if isinstance(content, str) else content
    with writing(path, len(data)):
        write_durably(path, data, is_shared=is_shared)


def write_durably(path: Path, content: str | bytes, *, is_shared: bool = False) -> None:
    """Write beside and rename, with both flushed to the disk: a reader sees the old content or the new.

    Args:
        path: what a killed attempt has left beside it is overwritten.
        content: text in UTF-8.
        is_shared: other processes may be writing it at the same time; then what a killed one leaves stays.

    Raises:
        OSError: it cannot be written; nothing is left of the attempt, for a full disk needs the room.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp" if is_shared else f".{path.name}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.rename(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Flush a folder's own entries: a file that was renamed keeps its new name after a crash of the host."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def nearest_existing(path: Path) -> Path:
    """The path itself, or the nearest one above it that is there."""
    path = path.absolute()
    while not os.path.lexists(path):
        path = path.parent
    return path


def free_words(path: Path) -> str:
    """How much room there is where ``path`` is or would be."""
    home = nearest_existing(path)
    return f"{size_words(shutil.disk_usage(home).free)} are free on {home}"


def size_words(num_bytes: int) -> str:
    """In the largest of GB, MB and kB of which there is a tenth."""
    name, size = next((pair for pair in (("GB", 1e9), ("MB", 1e6)) if num_bytes >= pair[1] / 10), ("kB", 1e3))
    return f"{num_bytes / size:,.1f} {name}"
