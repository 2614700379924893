"""ROME, EMMET, MEMIT and its relatives: from requests to low-rank changes of weights."""

from __future__ import annotations

from fastmemit.methods import solve, ultraedit  # noqa: F401 (they register each method)
from fastmemit.methods.base import REGISTRY, Draft, PreservedKeys, PreservedText, ReadCache, Workspace, run
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
    RlsEditConfig,
    RomeConfig,
    TargetConfig,
    UltraEditConfig,
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
    "PreservedText",
    "ReadCache",
    "RlsEditConfig",
    "RomeConfig",
    "TargetConfig",
    "UltraEditConfig",
    "Workspace",
    "find_config",
    "parse_overrides",
    "run",
]
