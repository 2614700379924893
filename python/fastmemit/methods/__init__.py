"""ROME, EMMET, MEMIT and its relatives: from requests to low-rank changes of weights."""

from __future__ import annotations

from collections.abc import Callable

from fastmemit.activations import ReadCache
from fastmemit.methods import alphaedit, emmet, encore, memit, pmet, rome
from fastmemit.methods.base import Factors, PreservedKeys, Workspace
from fastmemit.methods.config import (
    CONFIGS,
    METHODS,
    PRESERVING,
    AlphaEditConfig,
    CovarianceConfig,
    EditConfig,
    EmmetConfig,
    EncoreConfig,
    MemitConfig,
    PmetConfig,
    RomeConfig,
    find_config,
    parse_overrides,
)
from fastmemit.request import EditRequest

PLANS: dict[str, Callable[[Workspace, list[EditRequest]], None]] = {
    "rome": rome.write,
    "emmet": emmet.write,
    "memit": memit.write,
    "pmet": pmet.write,
    "encore": encore.write,
    "alphaedit": alphaedit.write,
}

__all__ = [
    "CONFIGS",
    "METHODS",
    "PLANS",
    "PRESERVING",
    "AlphaEditConfig",
    "CovarianceConfig",
    "EditConfig",
    "EmmetConfig",
    "EncoreConfig",
    "Factors",
    "MemitConfig",
    "PmetConfig",
    "PreservedKeys",
    "ReadCache",
    "RomeConfig",
    "Workspace",
    "find_config",
    "parse_overrides",
]
