"""Moments on disk: one safetensors file each, with provenance, atomic and verified.

The file holds one tensor, ``sum``: the lower triangle of the sum of ``k k^T``, row by row, as a vector of d (d + 1) / 2
numbers. Its metadata are ``format``, ``d``, ``count``, ``dtype``, ``sha256`` (of the tensor's bytes), ``quartic`` (the
sum of ``||k||^4``, absent where it is not known, as in files of the first version), ``provenance`` (a JSON object of
what the moment belongs to) and ``check`` (SHA-256 of all the other metadata), so that neither half can change
unnoticed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcov.errors import FastcovError, StoreDamaged, StoreMismatch
from fastcov.files import DTYPE_NAMES, atomic_file, parse_json, raw_bytes, write_safetensors
from fastcov.hooks import isolated
from fastcov.moments import SecondMoment, check_moment

FORMAT = 1
_DTYPES = {"F32": torch.float32, "F64": torch.float64}


@isolated()
def save_moment(path: str | os.PathLike[str], moment: SecondMoment, provenance: Mapping[str, Any]) -> None:
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
def load_moment(
    path: str | os.PathLike[str], expect: Mapping[str, Any] | None = None
) -> tuple[SecondMoment, dict[str, Any]]:
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


def read_provenance(path: str | os.PathLike[str]) -> dict[str, Any]:
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
def _opened(path: str | os.PathLike[str]) -> Iterator[tuple[Any, dict[str, str]]]:
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


def _provenance(path: str | os.PathLike[str], metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        value = parse_json(metadata["provenance"])
    except (KeyError, ValueError) as error:
        raise StoreDamaged(_damaged(path, "has no readable provenance")) from error
    if not isinstance(value, dict):
        raise StoreDamaged(_damaged(path, "has a provenance that is not an object"))
    return value


def _number(path: str | os.PathLike[str], metadata: Mapping[str, str], name: str) -> int:
    value = _whole(metadata.get(name, ""))
    if value is None:
        raise StoreDamaged(_damaged(path, f"says {metadata.get(name)!r:.40} for its {name}"))
    return value


def _whole(text: str) -> int | None:
    """The number in a text of up to 18 digits, which is more than any count."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= 18 else None


def _compare(path: str | os.PathLike[str], provenance: Mapping[str, Any], expect: Mapping[str, Any]) -> None:
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


def _damaged(path: str | os.PathLike[str], what: str) -> str:
    return f"The file {os.fspath(path)!r} {what}; delete it and precompute the moment again."
