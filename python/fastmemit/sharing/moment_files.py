"""A folder of second moments from elsewhere, verified before anything of it is used."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fastcov
from fastmemit.errors import DamagedFile
from fastmemit.kept import check_moment, common, compare, copied, home_of, lacking, shared_of
from fastmemit.statistics import Statistics

# Parts of letters, digits and underscores between single points: no path, no drive, no parent.
_MODULE = re.compile(r"\w+(\.\w+)*", re.ASCII)
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")


def open_statistics(folder: str | os.PathLike[str]) -> Statistics:
    """The moments in a folder as statistics, every byte of them verified.

    Args:
        folder: As ``fastmemit precompute`` made it in the cache: one file for each module.

    Raises:
        FileNotFoundError: There is no such folder, or no moment in it.
        StoreDamaged: A file is not what was written, or counts other keys than it says.
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
        moment, provenance = fastcov.load_moment(file)
        _check(file, provenance)
        check_moment(file, provenance, moment)
        stored.append(provenance)
        paths[provenance["module"]] = file
    for file, provenance in zip(files, stored, strict=True):
        try:
            compare(file, provenance, shared_of(stored[0]))
        except fastcov.StoreMismatch as differs:
            raise _damaged(
                file,
                f"is of another {differs.field} ({differs.stored!r:.80}) than {files[0].name} "
                f"({differs.expected!r:.80})",
            ) from differs
    return Statistics(paths, common(stored))


def keep_statistics(found: Statistics, folder: Path) -> Statistics:
    """Copy statistics to where edits find them.

    The names come from what the files say and `open_statistics` checked, not from how they were called. A file that is
    there already stays.

    Args:
        found: What `open_statistics` gave.
        folder: The folder ``statistics`` of a cache.

    Raises:
        OSError: A file cannot be written.
    """
    home = home_of(folder / found.provenance["model"][:16], shared_of(found.provenance))
    paths = copied(found.paths, found.provenance, home.parent, home.name)
    return Statistics(paths, found.provenance)


def _check(file: Path, provenance: Mapping[str, Any]) -> None:
    """Refuse a file whose provenance could not have been written by `precompute`."""
    forms = {"model": _FINGERPRINT, "tokenizer": _FINGERPRINT, "module": _MODULE}
    wrong = lacking(provenance)
    wrong += [n for n, form in forms.items() if not form.fullmatch(str(provenance.get(n)))]
    if wrong:
        said = provenance.get(wrong[0])
        raise _damaged(file, f"does not say its {wrong[0]} ({said!r:.80})")
    if provenance["module"] != file.stem:
        raise _damaged(file, f"is of the module {provenance['module']!r:.80}")


def _damaged(file: Path, what: str) -> DamagedFile:
    return DamagedFile(f"The moment {str(file)!r} {what}, so it belongs to no statistics; get it again.")
