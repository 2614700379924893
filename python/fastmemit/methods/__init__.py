"""ROME, EMMET, MEMIT and its relatives: from requests to low-rank changes of weights."""

from __future__ import annotations

from fastmemit.methods import solve  # noqa: F401 (registers each method)
from fastmemit.methods.base import REGISTRY, Draft, PreservedKeys, ReadCache, Workspace, run
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

__all__ = [
    "CONFIGS",
    "METHODS",
    "PRESERVING",
    "REGISTRY",
    "AlphaEditConfig",
    "CovarianceConfig",
    "Draft",
    "EditConfig",
    "EmmetConfig",
    "EncoreConfig",
    "MemitConfig",
    "PmetConfig",
    "PreservedKeys",
    "ReadCache",
    "RomeConfig",
    "Workspace",
    "find_config",
    "parse_overrides",
    "run",
]
