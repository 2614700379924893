"""Knowledge editing of language models that starts in seconds: ROME, EMMET, MEMIT and relatives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastmemit.errors import FastmemitError
from fastmemit.request import EditRequest

if TYPE_CHECKING:
    from fastmemit.delta import Delta
    from fastmemit.editor import Editor
    from fastmemit.edits import Edit
    from fastmemit.methods import (
        AlphaEditConfig,
        EditConfig,
        EmmetConfig,
        EncoreConfig,
        MemitConfig,
        PmetConfig,
        RomeConfig,
    )

__version__ = "0.1.0"

__all__ = [
    "AlphaEditConfig",
    "Delta",
    "Edit",
    "EditConfig",
    "EditRequest",
    "Editor",
    "EmmetConfig",
    "EncoreConfig",
    "FastmemitError",
    "MemitConfig",
    "PmetConfig",
    "RomeConfig",
]

_HOMES = {
    "Delta": "fastmemit.delta",
    "Edit": "fastmemit.edits",
    "Editor": "fastmemit.editor",
    "AlphaEditConfig": "fastmemit.methods",
    "EditConfig": "fastmemit.methods",
    "EmmetConfig": "fastmemit.methods",
    "EncoreConfig": "fastmemit.methods",
    "MemitConfig": "fastmemit.methods",
    "PmetConfig": "fastmemit.methods",
    "RomeConfig": "fastmemit.methods",
}


def __getattr__(name: str) -> Any:
    """Import what needs torch and transformers only when it is asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'fastmemit' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
