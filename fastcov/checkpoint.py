"""What a `fastcov.collect_moments` has summed so far, in a file, so that a killed one goes on from there.

One file has the state of all modules after the same batch, so it is consistent by itself. It holds everything that
decides on the bits of the sums to come: each sum as it is, the keys that wait for the next launch of a kernel, how many
batches there were, and a digest of their contents. The batches are then read again and not run.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor

from fastcov.batching import chained
from fastcov.errors import StaleCheckpoint, StoreDamaged
from fastcov.files import Later, atomic_file, parse_json, printable_logger, write_safetensors
from fastcov.hooks import isolated
from fastcov.moments import SecondMoment
from fastcov.ops import kernels
from fastcov.store import packed, unpacked

if TYPE_CHECKING:
    from fastcov.accumulate import Accumulator

logger = printable_logger(__name__)

FORMAT = "fastcov-checkpoint"
VERSION = 1

_STATE = (("identity", dict), ("sums", dict), ("machine", dict), ("batches", int), ("stream", str), ("modules", dict))


@dataclass(frozen=True)
class Taken:
    """What one module has given after some batches: all that is needed to go on from there."""

    moment: SecondMoment
    limit: int | None  # how many keys are wanted in all, or None for all there are
    found: int  # how many were taken, those that wait included
    waiting: Tensor | None  # keys that are not in the sum yet (n, d_k), in their order
    waiting_since: int  # the batch of the oldest of them
    device: torch.device  # where the keys come from


@isolated()
def read_checkpoint(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Taken]]:
    """Read a checkpoint, every byte verified: the state as it was written, and what each module had taken, on the CPU.

    Raises:
        StoreDamaged: The file is not what was written, or a newer version wrote it.
        OSError: It cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    if not os.path.isfile(path):  # to open a pipe is to wait for somebody to write into it
        raise StoreDamaged(_damaged(path, "is not a file"))
    left = max(os.path.getsize(path) - 32, 0)  # before the digest
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while left and (piece := file.read(min(left, 16 << 20))):
            digest.update(piece)
            left -= len(piece)
        if digest.digest() != file.read(32):
            raise StoreDamaged(_damaged(path, "is not what was written"))
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if (metadata.get("format"), metadata.get("version")) != (FORMAT, str(VERSION)):
                raise StoreDamaged(_damaged(path, f"has version {metadata.get('version')!r:.40}"))
            state = parse_json(metadata["state"])
            if not isinstance(state, dict) or any(not isinstance(state.get(part), kind) for part, kind in _STATE):
                raise StoreDamaged(_damaged(path, "lacks a part of its state"))
            modules = state.pop("modules").items()
            taken = {name: _read(file, number, module) for number, (name, module) in enumerate(modules)}
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise StoreDamaged(_damaged(path, f"is no checkpoint ({error!s:.120})")) from error
    return state, taken


def _read(file: Any, number: int, module: Mapping[str, Any]) -> Taken:
    """One module's share; its sum is compared with its width before memory is taken for it."""
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
    """Write what modules had taken; a tensor is fetched from its device when it is its turn.

    The state is JSON values: ``identity``, ``sums``, ``machine``, ``batches`` and ``stream``.
    """
    modules: dict[str, Any] = {}
    tensors: dict[str, Tensor | Later] = {}
    for number, (name, module) in enumerate(taken.items()):
        moment = module.moment
        modules[name] = {
            "d": moment.d, "count": moment.count, "limit": module.limit, "found": module.found,
            "waiting_since": module.waiting_since, "device": str(module.device),
        }  # fmt: skip
        size = moment.d * (moment.d + 1) // 2
        tensors[f"{number}:sum"] = Later(moment.dtype, (size,), partial(packed, moment.lower))
        for part, tensor in (("quartic", moment.quartic), ("waiting", module.waiting)):
            if tensor is not None:
                tensors[f"{number}:{part}"] = tensor
    text = json.dumps({**state, "modules": modules})
    write_safetensors(file, tensors, {"format": FORMAT, "version": str(VERSION), "state": text}, digest=True)


def _damaged(path: str | os.PathLike[str], what: str) -> str:
    return f"The checkpoint {os.fspath(path)!r} {what}; it may be deleted."


#: Seconds between two writes, and the share of the time that they may take beyond it.
SECONDS = 300.0
SHARE = 0.005

Batches = Iterable[Mapping[str, Any]]


class Checkpoint:
    """Where one `fastcov.collect_moments` stores what it has, and where the same one finds it again.

    A file that is damaged or of something else is reported, not used, and replaced by the next write. A write that
    fails is reported too, and the collect goes on. Two collects must not have the same file at the same time.

    Args:
        path: The file.
        identity: JSON values: what the batches and the sums depend on (model, text, its order, the size of batches,
            versions). A checkpoint serves only where all of it is equal.
        seconds: At least so long between two writes; 0 writes after every batch, infinity never. None takes `SECONDS`,
            and longer where writing would take more than `SHARE` of the time.

    Raises:
        ValueError: `seconds` is negative or NaN.
    """

    def __init__(self, path: str | os.PathLike[str], identity: Mapping[str, Any], seconds: float | None = None) -> None:
        if seconds is not None and not seconds >= 0:
            raise ValueError(
                f"The seconds between two checkpoints must be 0 or more but are {seconds!r}; {SECONDS:g} is usual."
            )
        self.path = Path(path)
        self._identity = json.loads(json.dumps(dict(identity), sort_keys=True, allow_nan=False))
        self._seconds = seconds
        self._last = time.monotonic()
        self._took = 0.0  # the last write, in seconds
        self._batches = 0
        self._stream = b""  # a digest of all batches so far

    def resume(self, sums: Accumulator, batches: Batches) -> Iterator[Mapping[str, Any]]:
        """Give a new accumulator what is stored; returns those of the same batches that are still to be run.

        Raises:
            StaleCheckpoint: The batches are not the same.
        """
        self._batches, self._stream = 0, b""
        rest = self._read(batches)
        if (found := self._found(sums)) is not None:
            state, taken = found
            for _ in zip(range(state["batches"]), rest, strict=False):
                pass
            if (self._batches, self._stream.hex()) != (state["batches"], state["stream"]):
                raise StaleCheckpoint(
                    f"The text is not what it was when {str(self.path)!r} was written, somewhere "
                    f"in its {state['batches']} batches; delete that file and collect again."
                )
            sums.resume(self._batches, taken)
            logger.info("going on behind batch %d of %s", self._batches, self.path)
        self._last = time.monotonic()
        return rest

    def write(self, sums: Accumulator) -> None:
        """Write what an accumulator has, if it is time to.

        Raises:
            NonFinite: The sums hold NaN or infinity, which is found out before they are written.
        """
        begun = time.monotonic()
        wait = max(SECONDS, self._took / SHARE) if self._seconds is None else self._seconds
        if begun - self._last < wait:
            return
        taken = sums.taken()
        state = {"identity": self._identity, "sums": sums.describe(), "machine": _machine(),
                 "batches": self._batches, "stream": self._stream.hex()}  # fmt: skip
        try:
            with atomic_file(self.path) as file:
                write_checkpoint(file, state, taken)
        except OSError as error:
            logger.warning("no checkpoint was written (%s); collecting goes on without", error)
        self._last = time.monotonic()
        self._took = self._last - begun

    def remove(self) -> None:
        """Remove the file, because it is not needed any more.

        Another user's is left where the folder lets nobody else remove it.
        """
        try:
            self.path.unlink(missing_ok=True)
        except PermissionError as error:
            logger.warning("a checkpoint that is not needed any more stays (%s)", error)

    def _read(self, batches: Batches) -> Iterator[Mapping[str, Any]]:
        """The batches, counted and digested as they are handed on."""
        for batch in batches:
            self._batches += 1
            self._stream = chained(self._stream, batch)
            yield batch

    def _found(self, sums: Accumulator) -> tuple[dict[str, Any], dict[str, Taken]] | None:
        """What is stored, if it is whole and of the same; else say why it is not used."""
        if not self.path.is_file():
            return None
        try:
            state, taken = read_checkpoint(self.path)
        except (StoreDamaged, OSError) as error:
            logger.warning("the checkpoint is not used: %s", error)
            return None
        limits = {name: module.limit for name, module in taken.items() if name in sums.wanted}
        stored = {**state["identity"], "order of the sums": state["sums"], "budget": limits}
        expected = {**self._identity, "order of the sums": sums.describe(), "budget": dict(sums.wanted)}
        differs = [
            f"{name} ({_said(stored, name)}, not {_said(expected, name)})"
            for name in sorted(stored.keys() | expected.keys())
            if name not in stored or name not in expected or stored[name] != expected[name]
        ]
        if differs:
            logger.warning("the checkpoint %s is of another %s and is not used", self.path, "; ".join(differs))
            return None
        if state["machine"] != (here := _machine()):
            logger.warning(
                "the checkpoint %s was written with %s and goes on with %s: the last bits may "
                "differ from those of an unbroken run", self.path, state["machine"], here,
            )  # fmt: skip
        return state, taken


def _said(fields: Mapping[str, Any], name: str) -> str:
    return f"{fields[name]!r:.80}" if name in fields else "nothing"


def _machine() -> dict[str, Any]:
    """What last bits depend on besides the identity; another one is no reason to start again."""
    usable = [name for name, missing in kernels().items() if missing is None]
    return {"threads": torch.get_num_threads(), "kernels": usable}
