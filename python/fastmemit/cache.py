"""Where fastmemit keeps what it need not compute twice."""

from __future__ import annotations

import os
import stat
import sys
from contextlib import suppress
from pathlib import Path


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

    Raises:
        OSError: It cannot be made.
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
