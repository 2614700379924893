"""Edits that travel: as LoRA adapters, as compositions, and to and from the hub."""

from fastmemit.sharing.adapter import load_adapter, save_adapter
from fastmemit.sharing.composition import compose, compressed, parts, remove
from fastmemit.sharing.hub import open_statistics, pull_edit, pull_statistics, push_adapter, push_edit, push_statistics

__all__ = [
    "compose", "compressed", "load_adapter", "open_statistics", "parts", "pull_edit", "pull_statistics",
    "push_adapter", "push_edit", "push_statistics", "remove", "save_adapter",
]  # fmt: skip
