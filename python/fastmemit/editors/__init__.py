"""ROME, EMMET and MEMIT: from requests to low-rank changes of weights."""

from __future__ import annotations

from collections.abc import Callable

from fastmemit.editors.base import Factors, Workspace
from fastmemit.editors.config import METHODS, EditConfig, find_config, parse_overrides
from fastmemit.editors.emmet import emmet
from fastmemit.editors.memit import memit
from fastmemit.editors.rome import rome
from fastmemit.request import EditRequest

PLANS: dict[str, Callable[[Workspace, list[EditRequest]], None]] = {
    "rome": rome,
    "emmet": emmet,
    "memit": memit,
}

__all__ = [
    "METHODS",
    "PLANS",
    "EditConfig",
    "Factors",
    "Workspace",
    "find_config",
    "parse_overrides",
]
