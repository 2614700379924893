"""Moments on disk: one safetensors file each, with provenance, atomic and verified; and those of an unfinished pass.

The file of a moment holds one tensor, ``sum``: the lower triangle of the sum of ``k k^T``, row by row, as a vector of d
(d + 1) / 2 numbers. Its metadata are ``format``, ``d``, ``count``, ``dtype``, ``sha256`` (of the tensor's bytes),
``quartic`` (the sum of ``||k||^4``, absent where it is not known, as in files of the first version), ``provenance`` (a
JSON object of what the moment belongs to) and ``check`` (SHA-256 of all the other metadata), so that neither half can
change unnoticed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
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
from fastcov.errors import FastcovError, StaleCheckpoint, StoreDamaged, StoreMismatch
from fastcov.files import (
    DTYPE_NAMES,
    Later,
    StrPath,
    atomic_file,
    parse_json,
    printable_logger,
    raw_bytes,
    write_safetensors,
)
from fastcov.hooks import isolated
from fastcov.moments import SecondMoment, check_moment
from fastcov.ops import kernels

if TYPE_CHECKING:
    from fastcov.collecting import Accumulator

logger = printable_logger(__name__)

FORMAT = 1
_DTYPES = {"F32": torch.float32, "F64": torch.float64}


@isolated()
def save_moment(path: StrPath, moment: SecondMoment, provenance: Mapping[str, Any]) -> None:
    """Write a moment without rounding; the file under this name is either the old one or the whole new one.

    The provenance is what the moment belongs to (model, module, corpus, ...), as JSON values. Missing folders are made.

    Raises:
        ValueError: The provenance is not JSON.
        BadInput: It is no moment.
        OSError: The file cannot be written; nothing is left of the attempt.
    """
    check_moment(moment, "A store")
    triangle = packed(moment.lower)  # (d (d + 1) / 2,)
    metadata = {
        "format": str(FORMAT),
        "d": str(moment.d),
        "count": str(moment.count),
        "dtype": DTYPE_NAMES[triangle.dtype],
        "sha256": hashlib.sha256(raw_bytes(triangle)).hexdigest(),
        "provenance": _json(provenance),
    }
    # Optional, so that the format stays the same: a reader that does not know it loads the rest.
    if moment.quartic is not None and math.isfinite(quartic := float(moment.quartic)):
        metadata["quartic"] = repr(quartic)  # the shortest text of these very bits
    metadata["check"] = _digest(metadata)
    with atomic_file(path) as file:
        write_safetensors(file, {"sum": triangle}, metadata)


@isolated()
def load_moment(path: StrPath, expect: Mapping[str, Any] | None = None) -> tuple[SecondMoment, dict[str, Any]]:
    """Read a moment, on the CPU, and its provenance, every byte verified.

    `expect` is provenance that the file must have, compared before the sum is read; other fields may be anything.

    Raises:
        FastcovError: There is no such file.
        StoreDamaged: The file is not what was written.
        StoreMismatch: A field of the provenance is not as expected, or a newer version wrote it.
    """
    with _opened(path) as (file, metadata):
        provenance = _provenance(path, metadata)
        if expect is not None:
            _compare(path, provenance, expect)
        triangle: Tensor = file.get_tensor("sum")
    d, count = _number(path, metadata, "d"), _number(path, metadata, "count")
    if triangle.dim() != 1 or d < 1 or triangle.numel() != d * (d + 1) // 2:
        raise StoreDamaged(_damaged(path, f"holds a sum of shape {tuple(triangle.shape)} for a width of {d}"))
    if triangle.dtype != _DTYPES.get(metadata.get("dtype", "")):
        raise StoreDamaged(_damaged(path, f"holds a sum of {triangle.dtype} and says {metadata.get('dtype')!r:.40}"))
    if hashlib.sha256(raw_bytes(triangle)).hexdigest() != metadata.get("sha256"):
        raise StoreDamaged(_damaged(path, "holds a sum whose bytes have changed"))
    try:
        quartic = float(metadata["quartic"]) if "quartic" in metadata else None
    except ValueError:
        quartic = math.nan
    if quartic is not None and not 0 <= quartic < math.inf:
        raise StoreDamaged(_damaged(path, f"says {metadata['quartic']!r:.40} for a sum of fourth powers"))
    return SecondMoment.from_lower(unpacked(triangle, d), count, quartic), provenance


def read_provenance(path: StrPath) -> dict[str, Any]:
    """What a stored moment belongs to, from the header alone.

    Raises:
        FastcovError: There is no such file.
        StoreDamaged: The header is not what was written, or the file is too short or too long.
        StoreMismatch: A newer version wrote it.
    """
    with _opened(path) as (_, metadata):
        return _provenance(path, metadata)


def packed(lower: Tensor) -> Tensor:
    """The lower triangle of a matrix (d, d), row by row, as (d (d + 1) / 2,) on the CPU."""
    lower = lower.detach().cpu()
    return torch.cat([lower[i, : i + 1] for i in range(lower.shape[0])])


def unpacked(triangle: Tensor, d: int) -> Tensor:
    """What `packed` was given, (d, d), with zeros above the diagonal."""
    lower = torch.zeros(d, d, dtype=triangle.dtype)
    for i, row in enumerate(torch.split(triangle, list(range(1, d + 1)))):
        lower[i, : i + 1] = row
    return lower


@contextlib.contextmanager
def _opened(path: StrPath) -> Iterator[tuple[Any, dict[str, str]]]:
    """The open file and its metadata, checked; the sum is not read yet."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).exists():
        raise FastcovError(f"There is no stored moment at {os.fspath(path)!r}; precompute it first.")
    if not Path(path).is_file():  # to open a pipe is to wait for somebody to write into it
        raise StoreDamaged(_damaged(path, "is not a file"))
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            if metadata.get("check") != _digest(metadata):
                raise StoreDamaged(_damaged(path, "has a header that is not what was written"))
            version = _whole(metadata.get("format", ""))
            if version is not None and version > FORMAT:
                raise StoreMismatch(
                    f"The moment {os.fspath(path)!r} has format {version} but this fastcov knows {FORMAT}; "
                    "upgrade, or delete the file and precompute again.",
                    field="format",
                    stored=version,
                    expected=FORMAT,
                )
            if set(file.keys()) != {"sum"}:
                raise StoreDamaged(_damaged(path, f"holds {sorted(file.keys())!s:.80} and not a sum"))
            yield file, metadata
    except SafetensorError as error:
        raise StoreDamaged(_damaged(path, f"is not a readable safetensors file ({error!s:.120})")) from error


def _provenance(path: StrPath, metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        value = parse_json(metadata["provenance"])
    except (KeyError, ValueError) as error:
        raise StoreDamaged(_damaged(path, "has no readable provenance")) from error
    if not isinstance(value, dict):
        raise StoreDamaged(_damaged(path, "has a provenance that is not an object"))
    return value


def _number(path: StrPath, metadata: Mapping[str, str], name: str) -> int:
    value = _whole(metadata.get(name, ""))
    if value is None:
        raise StoreDamaged(_damaged(path, f"says {metadata.get(name)!r:.40} for its {name}"))
    return value


def _whole(text: str) -> int | None:
    """The number in a text of up to 18 digits, which is more than any count."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= 18 else None


def _compare(path: StrPath, provenance: Mapping[str, Any], expect: Mapping[str, Any]) -> None:
    for field, value in json.loads(_json(expect)).items():
        stored = provenance.get(field)
        if field not in provenance or stored != value:
            shown = repr(stored) if field in provenance else "not on record"
            raise StoreMismatch(
                f"The moment {os.fspath(path)!r} is of something else: its {field} is {shown} but "
                f"{value!r} is expected; precompute it for these settings, in another file.",
                field=field,
                stored=stored,
                expected=value,
            )


def _json(values: Mapping[str, Any]) -> str:
    try:
        text = json.dumps(dict(values), sort_keys=True, allow_nan=False)
        parse_json(text)  # what a reader would refuse is not written
        return text
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Provenance must be JSON but is not ({error}); pass text, numbers, lists and objects."
        ) from error


def _digest(metadata: Mapping[str, str]) -> str:
    kept = {name: value for name, value in metadata.items() if name != "check"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _damaged(path: StrPath, what: str) -> str:
    return f"The file {os.fspath(path)!r} {what}; delete it and precompute the moment again."


# -- of a pass that is not finished -------------------------------------------------------------------
#
# What a `fastcov.collect_moments` has summed so far, so that a killed one goes on from there. One file has the state of
# all modules after the same batch, so it is consistent by itself. It holds everything that decides on the bits of the
# sums to come: each sum as it is, the keys that wait for the next launch of a kernel, how many batches there were, and
# a digest of their contents. The batches are then read again and not run.

CHECKPOINT = "fastcov-checkpoint"
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
def read_checkpoint(path: StrPath) -> tuple[dict[str, Any], dict[str, Taken]]:
    """A checkpoint's state, and what each module had taken, on the CPU; StoreDamaged if it is not what was written."""
    from safetensors import SafetensorError, safe_open

    if not os.path.isfile(path):  # to open a pipe is to wait for somebody to write into it
        raise StoreDamaged(_spoilt(path, "is not a file"))
    left = max(os.path.getsize(path) - 32, 0)  # before the digest
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while left and (piece := file.read(min(left, 16 << 20))):
            digest.update(piece)
            left -= len(piece)
        if digest.digest() != file.read(32):
            raise StoreDamaged(_spoilt(path, "is not what was written"))
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if (metadata.get("format"), metadata.get("version")) != (CHECKPOINT, str(VERSION)):
                raise StoreDamaged(_spoilt(path, f"has version {metadata.get('version')!r:.40}"))
            state = parse_json(metadata["state"])
            if not isinstance(state, dict) or any(not isinstance(state.get(part), kind) for part, kind in _STATE):
                raise StoreDamaged(_spoilt(path, "lacks a part of its state"))
            modules = state.pop("modules").items()
            taken = {name: _read(file, number, module) for number, (name, module) in enumerate(modules)}
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise StoreDamaged(_spoilt(path, f"is no checkpoint ({error!s:.120})")) from error
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
    write_safetensors(file, tensors, {"format": CHECKPOINT, "version": str(VERSION), "state": text}, digest=True)


def _spoilt(path: StrPath, what: str) -> str:
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

    def __init__(self, path: StrPath, identity: Mapping[str, Any], seconds: float | None = None) -> None:
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
