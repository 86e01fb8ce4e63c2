"""One run in one folder: a second ``train`` on a live ``run_dir`` is an error, not a folder that two runs write to.

A flock of the first rank on ``run_dir/run.lock``. The kernel gives it back when the process ends, however it ends, so
that a killed or requeued run leaves nothing to clean up; the file stays, and means nothing. Children do not hold it:
Python's descriptors are closed in every program that it starts.

On NFS, Linux turns it into a lock of the server (from kernel 2.6.12 on): hosts see each other's, and after the loss of
a whole host it lasts until the server has given it up. A mount with ``nolock`` or ``local_lock`` keeps it to one host,
and a Lustre mount without ``flock`` has none: then a warning says so, and the run goes on without.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import tempfile
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from megatron_sdsearch.errors import ConfigError
from megatron_sdsearch.files import nearest_existing

LOCK_FILE: Final = "run.lock"
"""In ``run_dir``: ``{"host", "pid", "since"}`` of the process that holds it, or held it last."""
_log = logging.getLogger(__name__)


class RunLock:
    """Holds ``run_dir`` while it is entered.

    Args:
        run_dir: of the run; made if it is missing.

    Raises:
        ConfigError: on entering, at once: the folder cannot be written, or another process, which is named, holds it.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / LOCK_FILE
        self._descriptor = -1

    def __enter__(self) -> Self:
        check_run_dir(self._path.parent)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise _unwritable(self._path, f"cannot be written ({error.strerror})") from error
        try:
            self._take()
        except BaseException:
            os.close(self._descriptor)
            raise
        return self

    def _take(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _is_in_use(self._path) from error
        except OSError as error:
            _log.warning("%s: %s: nothing prevents a second run in this folder", self._path, error.strerror)
        holder = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": datetime.now().astimezone().isoformat(timespec="seconds"),
        }
        try:
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, json.dumps(holder).encode() + b"\n", 0)
        except OSError as error:
            raise _unwritable(self._path, f"cannot be written ({error.strerror})") from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._descriptor)


def check_run_dir(run_dir: Path) -> None:
    """A run could write in this folder, as far as can be seen without writing; it need not exist.

    Raises:
        ConfigError: it could not.
    """
    home = nearest_existing(run_dir)
    if not home.is_dir():
        raise _unwritable(home, "is no folder" if home.exists() else "is a link to nothing")
    file_system = os.statvfs(home)
    if file_system.f_flag & os.ST_RDONLY:
        raise _unwritable(home, "is on a read-only file system")
    if not os.access(home, os.W_OK | os.X_OK):
        raise _unwritable(home, "may not be written by this user")
    if not file_system.f_blocks:  # of the kernel's own (/proc, /sys), or of a store that does not say how large it is
        try:
            os.rmdir(tempfile.mkdtemp(dir=home))
        except OSError as error:
            raise _unwritable(home, f"takes no folder ({error.strerror})") from error


def _unwritable(place: Path, why: str) -> ConfigError:
    return ConfigError("run_dir", f"{place} {why}", "give a run_dir in a folder that can be written")


def live_run(run_dir: Path) -> ConfigError | None:
    """What a run in this folder would be refused with now; None when nobody holds it, or nothing can be known."""
    path = run_dir / LOCK_FILE
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # no run has been here, or we may not look
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _is_in_use(path)
    except OSError:  # a file system without locks: a run says so itself
        return None
    finally:
        os.close(descriptor)
    return None


def _is_in_use(path: Path) -> ConfigError:
    try:
        holder = json.loads(path.read_text())
        who = f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # it has the lock, and has not yet said who it is
        who = "another process"
    told = f"{path.parent} is in use by {who}"
    return ConfigError("run_dir", told, "wait for its end, end it, or set another run_dir")
