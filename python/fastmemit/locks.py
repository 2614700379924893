"""One process at a time where two would do the same work."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

# After so many seconds a process says what it waits for.
_PATIENCE = 5.0
_POLL = 0.2
# What flock answers where somebody else has the lock; anything else is a file system without locks.
_HELD = {errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK}


@contextmanager
def alone(path: Path, what: str) -> Iterator[bool]:
    """Wait until no other process is inside with the same path, and keep the others out.

    The system frees the lock of a process that ends, however it ends. On a file system without
    locks nobody waits: what is written inside must be written by atomic renames, so that both
    processes finish and one of two equal files stays.

    Args:
        path: The lock's file, which stays behind, empty; its folder is made.
        what: What the other process is doing, for the message of one that waits.

    Yields:
        Whether there is a lock.

    Raises:
        OSError: The file cannot be made: the folder cannot be written.
    """
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    if not _has_locks(path):
        log.warning("%s is on a file system without locks; going on without one", path)
        yield False
        return
    # Two editors in two threads of a process wait for each other as two processes do.
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(timeout=_PATIENCE, poll_interval=_POLL)
    except Timeout:
        log.warning("another process is %s; waiting for it (%s)", what, path)
        lock.acquire(timeout=-1, poll_interval=_POLL)
    try:
        yield True
    finally:
        lock.release()


def _has_locks(path: Path) -> bool:
    """Whether locks work where this file is; it is made.

    Raises:
        OSError: It cannot be made.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            import fcntl
        except ImportError:  # Windows, whose file systems have them
            return True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno in _HELD
        fcntl.flock(file, fcntl.LOCK_UN)
        return True
    finally:
        os.close(file)
