"""A folder of second moments from elsewhere, verified before anything of it is used."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fastcov
from fastmemit.errors import DamagedFile
from fastmemit.kept import common, copied, essence, home_of
from fastmemit.statistics import Statistics

# Parts of letters, digits and underscores between single points: no path, no drive, no parent.
_MODULE = re.compile(r"\w+(\.\w+)*", re.ASCII)
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
#: What the moments of one model need not share.
_OWN = ("module", "budget", "keys", "source", "versions")


def open_statistics(folder: str | os.PathLike[str]) -> Statistics:
    """The moments in a folder as statistics, every byte of them verified.

    Args:
        folder: As ``fastmemit precompute`` made it in the cache: one file for each module.

    Raises:
        FileNotFoundError: There is no such folder, or no moment in it.
        StoreDamaged: A file is not what was written.
        StoreMismatch: A file is of a newer format.
        DamagedFile: The files do not belong together, or do not say what they are of.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(
            f"There is no moment in {os.fspath(folder)!r}; name a folder of statistics, as "
            "fastmemit precompute lists its files."
        )
    stored: list[dict[str, Any]] = []
    paths = {}
    for file in files:
        provenance = fastcov.load_moment(file)[1]
        _check(file, provenance)
        stored.append(provenance)
        paths[provenance["module"]] = file
    first = _shared(stored[0])
    for file, provenance in zip(files, stored, strict=True):
        if essence(_shared(provenance)) != essence(first):
            raise _damaged(file, f"is of something else than {files[0].name}")
    return Statistics(paths, common(stored))


def keep_statistics(found: Statistics, folder: Path) -> Statistics:
    """Copy statistics to where edits find them.

    The names come from what the files say and `open_statistics` checked, not from how they were
    called. A file that is there already stays.

    Args:
        found: What `open_statistics` gave.
        folder: The folder ``statistics`` of a cache.

    Raises:
        OSError: A file cannot be written.
    """
    home = home_of(folder / found.provenance["model"][:16], _shared(found.provenance))
    return Statistics(copied(found.paths, home.parent, home.name), found.provenance)


def _shared(provenance: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in provenance.items() if name not in _OWN}


def _check(file: Path, provenance: Mapping[str, Any]) -> None:
    """Refuse a file whose provenance could not have been written by `precompute`."""
    module, corpus = provenance.get("module"), provenance.get("corpus")
    keys, smaller = provenance.get("keys", 0), provenance.get("snapshots", [])
    sound: Sequence[tuple[str, bool]] = (
        ("model", _is_text(provenance.get("model"), _FINGERPRINT)),
        ("tokenizer", _is_text(provenance.get("tokenizer"), _FINGERPRINT)),
        ("module", _is_text(module, _MODULE)),
        ("corpus", isinstance(corpus, Mapping) and _is_text(corpus.get("name"), None)),
        ("multiplier", _is_number(provenance.get("multiplier"))),
        ("budget", type(provenance.get("budget")) is int),
        ("keys", type(keys) is int),
        ("seed", type(provenance.get("seed", "")) in (int, type(None))),  # None of imported ones
        ("snapshots", isinstance(smaller, list) and all(map(_is_number, smaller))),
    )
    for field, fine in sound:
        if not fine:
            raise _damaged(file, f"does not say its {field} ({provenance.get(field)!r:.80})")
    if module != file.stem:
        raise _damaged(file, f"is of the module {module!r:.80}")


def _is_text(value: object, pattern: re.Pattern[str] | None) -> bool:
    return isinstance(value, str) and (pattern is None or pattern.fullmatch(value) is not None)


def _is_number(value: object) -> bool:
    """Whether it is a finite number above 0, as a float too."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return 0 < value <= sys.float_info.max  # a whole number in JSON has no largest


def _damaged(file: Path, what: str) -> DamagedFile:
    return DamagedFile(
        f"The moment {str(file)!r} {what}, so it belongs to no statistics; get it again."
    )
