"""What long steps share: the cache folder, locks for one process at a time, and one look for progress bars."""

from __future__ import annotations

import errno
import os
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tqdm.auto import tqdm

from fastcov.errors import printable, printable_logger

log = printable_logger(__name__)


def cache_dir() -> Path:
    """The folder for cached files: ``$FASTMEMIT_CACHE``, or the platform's cache folder.

    The folder need not exist; who writes makes it.
    """
    chosen = os.environ.get("FASTMEMIT_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fastmemit"


def shared_folder(folder: Path) -> None:
    """Make a folder, and those above it, for all who may write where the first one is made.

    The umask of most systems gives a new folder to its owner alone. In a cache that several users share the others
    could then neither add to what one has begun nor lock it.
    """
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for each in reversed(missing):
        try:
            each.mkdir()
        except FileExistsError:  # another process was faster
            continue
        above = stat.S_IMODE(each.parent.stat().st_mode)
        if os.name == "posix" and above & (stat.S_IWGRP | stat.S_IWOTH):
            own = stat.S_IMODE(each.stat().st_mode)
            with suppress(OSError):
                each.chmod(own | above & (stat.S_IRWXG | stat.S_IRWXO | stat.S_ISVTX))


if sys.platform != "win32":
    import fcntl


# After so many seconds a process says what it waits for.
_PATIENCE = 5.0
_POLL = 0.2
# What flock answers where somebody else has the lock; anything else is a file system without locks.
_HELD = {errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK}


def lock_of(home: Path) -> Path:
    """The lock of a folder of statistics, beside it."""
    return home.with_name(f".{home.name}.lock")


@contextmanager
def alone(path: Path, what: str, *, wait: bool = True) -> Iterator[bool]:
    """Wait until no other process is inside with the same path, and keep the others out.

    The system frees the lock of a process that ends, however it ends. On a file system without locks nobody waits, nor
    where the file is one that another user let nobody read: what is written inside must be written by atomic renames,
    so that both processes finish and one of two equal files stays. Two threads of a process wait for each other as two
    processes do.

    Args:
        path: The lock's file, which only a killed process leaves behind, empty and without harm, also to other users;
            its folder is made.
        what: What the other process is doing, for the message of one that waits.
        wait: Whether to wait for it; without, a lock that another process has is none.

    Yields:
        Whether there is a lock.

    Raises:
        OSError: The file cannot be made: the folder cannot be written.
    """
    shared_folder(path.parent)
    begun, told = time.monotonic(), False
    while True:
        try:
            release = _taken(path)
        except _NoLocks as error:
            log.warning("%s is as on a file system without locks (%s); nobody waits", path, error)
            with suppress(OSError):
                path.unlink()
            yield False
            return
        if release is not None:
            break
        if not wait:
            yield False
            return
        if not told and time.monotonic() - begun >= _PATIENCE:
            log.warning("another process is %s; waiting for it (%s)", what, path)
            told = True
        time.sleep(_POLL)
    try:
        yield True
    finally:
        release()


class _NoLocks(Exception):
    """The file system has none, or the file is another user's and cannot even be read."""


def _taken(path: Path) -> Callable[[], None] | None:
    """Take the lock if it is free; how to give it back, or None.

    Unlike filelock, which keeps its file for ever and retries whatever flock says, this removes the file and tells a
    lock that is held from a file system without locks.
    """
    if sys.platform == "win32":
        return _taken_on_windows(path)
    flags = getattr(os, "O_CLOEXEC", 0)
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o666)
    except PermissionError as refused:
        if not path.exists():  # the folder cannot be written
            raise
        try:  # what a process of another user has left; who may read it may lock it
            file = os.open(path, os.O_RDONLY | flags)
        except FileNotFoundError:
            return None
        except PermissionError:
            raise _NoLocks(refused.strerror) from refused
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        mine = os.fstat(file)
        with suppress(FileNotFoundError):
            there = os.stat(path)
            # Whoever had the lock removed the file: this may be one without a name.
            if (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino):

                def release() -> None:
                    with suppress(OSError):
                        path.unlink()  # before the lock is free, so that it is never another's
                    os.close(file)

                return release
    except OSError as error:
        os.close(file)
        if error.errno in _HELD:
            return None
        raise _NoLocks(error.strerror) from error
    os.close(file)
    return None


def _taken_on_windows(path: Path) -> Callable[[], None] | None:
    from filelock import FileLock, Timeout

    lock = FileLock(path, timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        return None
    return lock.release


class Bar:
    """A bar to count on: called with how many were done since the last call."""

    def __init__(self, shape: tqdm) -> None:
        self._shape = shape

    def __call__(self, done: int) -> None:
        """Move on."""
        self._shape.update(done)

    def note(self, text: str) -> None:
        """Show some words behind the numbers, from the next time the bar is drawn."""
        self._shape.set_postfix_str(printable(text), refresh=False)


@contextmanager
def bar(what: str, total: int, shown: bool) -> Iterator[Bar]:
    """A progress bar to count on; nothing is drawn where stderr is not a terminal, or it is not to be shown."""
    disable = None if shown else True  # None: tqdm looks for a terminal itself
    what = printable(what)
    with tqdm(total=total, desc=what, leave=False, dynamic_ncols=True, disable=disable) as shape:
        yield Bar(shape)
