"""Lock a run's folder, so that a second ``train`` on a live ``run_dir`` is an error.

Rank 0 holds a flock on ``run_dir/run.lock``. The kernel releases it when the process ends, even by SIGKILL, so a killed
or requeued run leaves nothing to clean up; the file itself stays and means nothing. Children do not inherit the lock:
Python closes its descriptors in every program that it starts.

On NFS, Linux (from kernel 2.6.12 on) takes a lock on the server, which other hosts see; after the loss of a host it
lasts until the server releases it. A mount with ``nolock`` or ``local_lock`` limits it to one host, and a Lustre mount
without ``flock`` has no locks: then the run warns and continues without.
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
    """Create ``run_dir`` if it is missing, and hold its lock inside the context.

    Raises:
        ConfigError: on entering: the folder cannot be written, or another process holds it, which is named.
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
    """Check, without writing a file, that a run could write in this folder, which need not exist.

    Raises:
        ConfigError: the run could not.
    """
    folder = nearest_existing(run_dir)
    if not folder.is_dir():
        raise _unwritable(folder, "is not a folder" if folder.exists() else "is a broken link")
    file_system = os.statvfs(folder)
    if file_system.f_flag & os.ST_RDONLY:
        raise _unwritable(folder, "is on a read-only file system")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise _unwritable(folder, "is not writable by this user")
    if not file_system.f_blocks:  # /proc, /sys, or an object store without a size
        try:
            os.rmdir(tempfile.mkdtemp(dir=folder))
        except OSError as error:
            raise _unwritable(folder, f"does not accept a folder ({error.strerror})") from error


def live_run(run_dir: Path) -> ConfigError | None:
    """Return the error that would refuse a run in this folder now; None when it is free or its state is unknown."""
    path = run_dir / LOCK_FILE
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _in_use(path)
    except OSError:  # no run was here, no permission, or no locks, about which a run warns
        return None
    return None


def _unwritable(path: Path, reason: str) -> ConfigError:
    return ConfigError("run_dir", f"{path} {reason}", "give a run_dir in a folder that can be written")


def _in_use(path: Path) -> ConfigError:
    try:
        content = json.loads(path.read_text())
        holder = f"process {content['pid']} on {content['host']}, since {content['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # it holds the lock, but has not written its name yet
        holder = "another process"
    problem = f"{path.parent} is in use by {holder}"
    return ConfigError("run_dir", problem, "wait until it ends, end it, or set another run_dir")
