"""Models: loading and saving them, and one way to ask any architecture for what editing needs."""

from __future__ import annotations

from fastmemit.models.adapter import ModelAdapter, find_adapter, input_device
from fastmemit.models.context import check_lengths
from fastmemit.models.fingerprint import checksum, fingerprint, tokenizer_fingerprint
from fastmemit.models.loading import load_model, load_skeleton
from fastmemit.models.outputs import hidden_of, with_hidden
from fastmemit.models.saving import new_folder, save_model

__all__ = [
    "ModelAdapter",
    "check_lengths",
    "checksum",
    "find_adapter",
    "fingerprint",
    "hidden_of",
    "input_device",
    "load_model",
    "load_skeleton",
    "new_folder",
    "save_model",
    "tokenizer_fingerprint",
    "with_hidden",
]
