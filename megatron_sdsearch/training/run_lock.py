"""Locks a run folder, so that a second ``train`` on the same ``run_dir`` is refused.

The first rank holds a flock on ``run_dir/run.lock``. The kernel releases it however the process ends, so a killed or
requeued run needs no cleanup; the file itself stays and does not matter. Child processes do not hold the lock, because
Python closes its descriptors in them.

On NFS, Linux turns it into a lock of the server (since kernel 2.6.12): it works across hosts, and when a host is lost
it lasts until the server releases it. With ``nolock`` or ``local_lock`` it works within one host only. A Lustre mount
without ``flock`` has no locks: the run logs a warning and continues without.
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
    """Hold the lock of ``run_dir``, which is created if missing, within the context.

    Raises:
        ConfigError: on entering: the folder is not writable, or another process (named) holds the lock.
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
                _log.warning(
                    "%s cannot be locked (%s): nothing prevents a second run in this folder", path, error.strerror
                )
            since = datetime.now().astimezone().isoformat(timespec="seconds")
            holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": since}
            file.truncate(0)
            file.write(json.dumps(holder).encode() + b"\n")
        except OSError as error:
            raise _unwritable(path, f"cannot be written ({error.strerror})") from error
        yield


def check_run_dir(run_dir: Path) -> None:
    """Check that a run could write in this folder, without writing; it need not exist.

    Raises:
        ConfigError: the folder is not writable.
    """
    folder = nearest_existing(run_dir)
    if not folder.is_dir():
        raise _unwritable(folder, "is not a folder" if folder.exists() else "is a broken link")
    file_system = os.statvfs(folder)
    if file_system.f_flag & os.ST_RDONLY:
        raise _unwritable(folder, "is on a read-only file system")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise _unwritable(folder, "is not writable for this user")
    if not file_system.f_blocks:  # /proc or /sys, or a store that reports no size
        try:
            os.rmdir(tempfile.mkdtemp(dir=folder))
        except OSError as error:
            raise _unwritable(folder, f"does not allow new folders ({error.strerror})") from error


def live_run(run_dir: Path) -> ConfigError | None:
    """Return the error with which a run in this folder would be refused now; None if it is free or unknown."""
    path = run_dir / LOCK_FILE
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _in_use(path)
    except OSError:  # no file, no permission, or no locks on this file system
        return None
    return None


def _unwritable(path: Path, reason: str) -> ConfigError:
    return ConfigError("run_dir", f"{path} {reason}", "set it to a folder that can be written")


def _in_use(path: Path) -> ConfigError:
    try:
        content = json.loads(path.read_text())
        holder = f"process {content['pid']} on {content['host']}, since {content['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # the holder has not written its name yet
        holder = "another process"
    problem = f"{path.parent} is in use by {holder}"
    return ConfigError("run_dir", problem, "wait until it ends, end it, or set another run_dir")
