"""One run in one folder: a second ``train`` on a live ``run_dir`` is an error, not a folder that two runs write to.

A flock of the first rank on ``run_dir/run.lock``. The kernel releases it when the process ends, however it ends, so
that a killed or requeued run leaves nothing to clean up; the file stays, and means nothing. Children do not hold it:
Python's descriptors are closed in every program that it starts.

On NFS, Linux turns it into a lock of the server (from kernel 2.6.12 on): hosts see each other's, and after the loss of
a whole host it lasts until the server has released it. A mount with ``nolock`` or ``local_lock`` keeps it to one host,
and a Lustre mount without ``flock`` has none: then a warning says so, and the run goes on without.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Final

from megatron_sdsearch.errors import ConfigError
from megatron_sdsearch.files import nearest_existing

#: In ``run_dir``: ``{"host", "pid", "since"}`` of the process that holds the lock, or held it last.
LOCK_FILE: Final = "run.lock"
_log = logging.getLogger(__name__)


@contextmanager
def lock_run_dir(run_dir: Path) -> Iterator[None]:
    """Hold ``run_dir``, which is made if it is missing, while the context is entered.

    Raises:
        ConfigError: on entering, at once: the folder cannot be written, or another process, which is named, holds it.
    """
    check_run_dir(run_dir)
    path = run_dir / LOCK_FILE
    with ExitStack() as stack:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(path.open("ab", buffering=0))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise _in_use(path) from error
            except OSError as error:
                _log.warning("%s: %s: nothing prevents a second run in this folder", path, error.strerror)
            since = datetime.now().astimezone().isoformat(timespec="seconds")
            holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": since}
            file.truncate(0)
            file.write(json.dumps(holder).encode() + b"\n")
        except OSError as error:
            raise _unwritable(path, f"cannot be written ({error.strerror})") from error
        yield


def check_run_dir(run_dir: Path) -> None:
    """Check that a run could write in this folder, as far as can be seen without writing; it need not exist.

    Raises:
        ConfigError: it could not.
    """
    folder = nearest_existing(run_dir)
    if not folder.is_dir():
        raise _unwritable(folder, "is no folder" if folder.exists() else "is a link to nothing")
    file_system = os.statvfs(folder)
    if file_system.f_flag & os.ST_RDONLY:
        raise _unwritable(folder, "is on a read-only file system")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise _unwritable(folder, "may not be written by this user")
    if not file_system.f_blocks:  # of the kernel's own (/proc, /sys), or of a store that does not say how large it is
        try:
            os.rmdir(tempfile.mkdtemp(dir=folder))
        except OSError as error:
            raise _unwritable(folder, f"takes no folder ({error.strerror})") from error


def live_run(run_dir: Path) -> ConfigError | None:
    """The error that a run in this folder would be refused with now; None when it is free, or nothing can be known."""
    path = run_dir / LOCK_FILE
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _in_use(path)
    except OSError:  # no run has been here, we may not look, or a file system without locks, of which a run warns
        return None
    return None


def _unwritable(path: Path, reason: str) -> ConfigError:
    return ConfigError("run_dir", f"{path} {reason}", "give a run_dir in a folder that can be written")


def _in_use(path: Path) -> ConfigError:
    try:
        content = json.loads(path.read_text())
        holder = f"process {content['pid']} on {content['host']}, since {content['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # it has the lock, and has not written its name yet
        holder = "another process"
    problem = f"{path.parent} is in use by {holder}"
    return ConfigError("run_dir", problem, "wait for its end, end it, or set another run_dir")
