"""Edits that travel: as LoRA adapters, as compositions, and to and from the hub.

`save_adapter` and `load_adapter` go between a delta and PEFT's LoRA format, `compose`, `parts`, `remove` and
`compressed` make one delta of several and take it apart, `push_edit`, `push_statistics`, `pull_edit` and
`pull_statistics` exchange files with the hub.
"""

from fastmemit.sharing.adapter_in import load_adapter
from fastmemit.sharing.adapter_out import save_adapter
from fastmemit.sharing.composition import compose, parts, remove
from fastmemit.sharing.compression import compressed
from fastmemit.sharing.moment_files import open_statistics
from fastmemit.sharing.pull import pull_edit, pull_statistics
from fastmemit.sharing.push import push_edit, push_statistics

__all__ = [
    "compose",
    "compressed",
    "load_adapter",
    "open_statistics",
    "parts",
    "pull_edit",
    "pull_statistics",
    "push_edit",
    "push_statistics",
    "remove",
    "save_adapter",
]
