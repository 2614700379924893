"""Models: loading and saving them, and one way to ask any architecture for what editing needs."""

from fastmemit.models.adapter import ModelAdapter
from fastmemit.models.fingerprint import Watch, checksum, checksums, fingerprint, tokenizer_fingerprint
from fastmemit.models.loading import load_model, load_skeleton
from fastmemit.models.saving import new_folder, save_model
from fastmemit.models.structure import find_adapter

__all__ = [
    "ModelAdapter", "Watch", "checksum", "checksums", "find_adapter", "fingerprint", "load_model", "load_skeleton",
    "new_folder", "save_model", "tokenizer_fingerprint",
]  # fmt: skip
