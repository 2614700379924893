"""The file of a checkpoint: safetensors, written piece by piece and sealed by its own digest.

The metadata are ``format``, ``version`` and ``state``, a JSON object. Each module has a number n and the tensors
``n:sum`` (the lower triangle, row by row), ``n:quartic`` and, where keys wait for the next launch of a kernel,
``n:waiting``. The last tensor, ``sha256``, is the digest of every byte before its own. No more than one module is in
memory twice while it is written.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO

import torch
from torch import Tensor

from fastcov.batches import raw_bytes
from fastcov.errors import StoreDamaged
from fastcov.mode import isolated
from fastcov.moments import SecondMoment
from fastcov.parsing import parse_json
from fastcov.store import DTYPE_NAMES, packed, unpacked

FORMAT = "fastcov-checkpoint"
VERSION = 1

_DIGEST = 32  # bytes
_PIECE = 16 << 20
_STATE = {"identity": dict, "sums": dict, "machine": dict, "batches": int, "stream": str, "modules": dict}


@dataclass(frozen=True)
class Taken:
    """What one module has given after some batches: all that is needed to go on from there.

    Attributes:
        moment: What was summed.
        limit: How many keys are wanted in all, or None for all there are.
        found: How many were taken, those that wait included.
        waiting: Keys that are not in the sum yet (n, d_k), in their order; None where none waits.
        waiting_since: The batch of the oldest of them.
        device: Where the keys come from.
    """

    moment: SecondMoment
    limit: int | None
    found: int
    waiting: Tensor | None
    waiting_since: int
    device: torch.device


@isolated()
def read_checkpoint(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Taken]]:
    """Read a checkpoint, every byte verified.

    Returns:
        ``identity``, ``sums``, ``machine``, ``batches`` and ``stream`` as they were written, and what each module had
        taken, on the CPU.

    Raises:
        StoreDamaged: The file is not what was written, or a newer version wrote it.
        OSError: It cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    if not os.path.isfile(path):  # to open a pipe is to wait for somebody to write into it
        raise _damaged(path, "is not a file")
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        left = max(size - _DIGEST, 0)
        while left and (piece := file.read(min(left, _PIECE))):
            digest.update(piece)
            left -= len(piece)
        if digest.digest() != file.read(_DIGEST):
            raise _damaged(path, "is not what was written")
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if (metadata.get("format"), metadata.get("version")) != (FORMAT, str(VERSION)):
                raise _damaged(path, f"has version {metadata.get('version')!r:.40}")
            state = parse_json(metadata["state"])
            if not isinstance(state, dict) or not all(
                isinstance(state.get(name), kind) for name, kind in _STATE.items()
            ):
                raise _damaged(path, "lacks a part of its state")
            modules = state.pop("modules")
            taken = {name: _read(file, number, module) for number, (name, module) in enumerate(modules.items())}
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise _damaged(path, f"is no checkpoint ({error!s:.120})") from error
    return state, taken


def _read(file: Any, number: int, module: Mapping[str, Any]) -> Taken:
    """One module's share; its sum is compared with its width before memory is taken for it.

    Raises:
        ValueError, TypeError, KeyError: It is not what `write_checkpoint` writes.
    """
    names = set(file.keys())
    for name in ("d", "count", "found", "waiting_since"):
        if type(module[name]) is not int:
            raise ValueError(f"{name} of module {number} is no number")
    triangle, d = file.get_tensor(f"{number}:sum"), module["d"]
    if d < 1 or tuple(triangle.shape) != (d * (d + 1) // 2,):
        raise ValueError(f"module {number} has a sum of another width")
    quartic, waiting = (
        file.get_tensor(f"{number}:{name}") if f"{number}:{name}" in names else None for name in ("quartic", "waiting")
    )
    if quartic is not None and quartic.dim() != 0:
        raise ValueError(f"module {number} has a quartic sum of another shape")
    if waiting is not None and (waiting.dim() != 2 or waiting.shape[1] != d):
        raise ValueError(f"module {number} has waiting keys of another width")
    try:
        device = torch.device(module["device"])
    except RuntimeError as error:
        raise ValueError(f"module {number} is on no device") from error
    moment = SecondMoment.from_lower(unpacked(triangle, d), module["count"], quartic)
    return Taken(moment, module["limit"], module["found"], waiting, module["waiting_since"], device)


@isolated()
def write_checkpoint(file: BinaryIO, state: Mapping[str, Any], taken: Mapping[str, Taken]) -> None:
    """Write header, tensors and digest; a tensor is fetched from its device when it is its turn.

    Args:
        file: Open for writing.
        state: JSON values: ``identity``, ``sums``, ``machine``, ``batches`` and ``stream``.
        taken: What each module had taken.

    Raises:
        OSError: The file cannot be written.
    """
    modules: dict[str, Any] = {}
    parts: list[Callable[[], Tensor]] = []
    header: dict[str, Any] = {}
    offset = 0

    def add(name: str, dtype: str, shape: list[int], size: int) -> None:
        nonlocal offset
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size

    def add_tensor(name: str, like: Tensor, shape: list[int], fetch: Callable[[], Tensor]) -> None:
        numbers = int(torch.Size(shape).numel())
        add(name, DTYPE_NAMES[like.dtype], shape, numbers * like.element_size())
        parts.append(fetch)

    for number, (name, module) in enumerate(taken.items()):
        moment = module.moment
        modules[name] = {
            "d": moment.d,
            "count": moment.count,
            "limit": module.limit,
            "found": module.found,
            "waiting_since": module.waiting_since,
            "device": str(module.device),
        }
        lower = moment.lower
        triangle = [moment.d * (moment.d + 1) // 2]
        add_tensor(f"{number}:sum", lower, triangle, partial(packed, lower))
        for part, tensor in (("quartic", moment.quartic), ("waiting", module.waiting)):
            if tensor is not None:
                add_tensor(f"{number}:{part}", tensor, list(tensor.shape), tensor.detach)
    add("sha256", "U8", [_DIGEST], _DIGEST)
    header["__metadata__"] = {
        "format": FORMAT,
        "version": str(VERSION),
        "state": json.dumps({**state, "modules": modules}),
    }
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    digest = hashlib.sha256()

    def write(data: bytes | memoryview) -> None:
        for start in range(0, len(data), _PIECE):
            piece = data[start : start + _PIECE]
            digest.update(piece)
            file.write(piece)

    write(len(head).to_bytes(8, "little") + head)
    for fetch in parts:
        write(raw_bytes(fetch()))
    file.write(digest.digest())


def _damaged(path: str | os.PathLike[str], what: str) -> StoreDamaged:
    return StoreDamaged(f"The checkpoint {os.fspath(path)!r} {what}; it may be deleted.")
