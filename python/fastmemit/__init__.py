"""Knowledge editing of language models that starts in seconds: ROME, EMMET, MEMIT and relatives."""

from __future__ import annotations

import warnings
from importlib import import_module
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
        PreservedKeys,
        RomeConfig,
    )
    from fastmemit.statistics import Collection, Statistics

# tqdm.auto, which transformers and the hub import, tells a notebook without ipywidgets to install them; text does too.
warnings.filterwarnings("ignore", message="IProgress not found")

__version__ = "0.1.0"

__all__ = [
    "AlphaEditConfig",
    "Collection",
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
    "PreservedKeys",
    "RomeConfig",
    "Statistics",
]

_HOMES = {
    "Collection": "fastmemit.statistics",
    "Delta": "fastmemit.delta",
    "Edit": "fastmemit.edits",
    "Editor": "fastmemit.editor",
    "Statistics": "fastmemit.statistics",
}


def __getattr__(name: str) -> Any:
    """Import what needs torch and transformers only when it is asked for."""
    if name not in __all__:
        raise AttributeError(f"module 'fastmemit' has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, "fastmemit.methods")), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
