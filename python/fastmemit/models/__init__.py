"""Models: loading and saving them, and one way to ask any architecture for what editing needs."""

from fastmemit.models.adapter import ModelAdapter
from fastmemit.models.fingerprint import Watch, checksum, checksums, fingerprint, tokenizer_fingerprint
from fastmemit.models.loading import load_model, load_skeleton
from fastmemit.models.running import (
    agrees,
    check_lengths,
    hidden_of,
    input_device,
    length_batches,
    pad_batch,
    probe_ids,
    token_states,
    with_hidden,
)
from fastmemit.models.saving import new_folder, save_model
from fastmemit.models.structure import find_adapter

__all__ = [
    "ModelAdapter",
    "Watch",
    "agrees",
    "check_lengths",
    "checksum",
    "checksums",
    "find_adapter",
    "fingerprint",
    "hidden_of",
    "input_device",
    "length_batches",
    "load_model",
    "load_skeleton",
    "new_folder",
    "pad_batch",
    "probe_ids",
    "save_model",
    "token_states",
    "tokenizer_fingerprint",
    "with_hidden",
]
