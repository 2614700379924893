"""Models: loading and saving them, and one way to ask any architecture for what editing needs."""

from __future__ import annotations

from fastmemit.models.adapter import ModelAdapter, find_adapter
from fastmemit.models.outputs import hidden_of, with_hidden

__all__ = ["ModelAdapter", "find_adapter", "hidden_of", "with_hidden"]
