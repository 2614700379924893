"""Where fastmemit keeps what it need not compute twice."""

from __future__ import annotations

import os
import sys
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
