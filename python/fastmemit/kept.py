"""Where stored statistics lie, and how it is told that they are of what is wanted."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fastcov
from fastcov.store import atomic_file
from fastmemit.locks import alone, lock_of


def is_there(path: Path, shared: dict[str, Any], module: str) -> bool:
    """Whether the moment of a module is stored already.

    Args:
        path: Its file.
        shared: What the moments of all modules are of.
        module: The module's name.

    Raises:
        StoreMismatch: The file of this name is of something else.
    """
    if not path.is_file():
        return False
    stored = fastcov.read_provenance(path)
    compare(path, essence(stored), {**essence(shared), "module": module})
    return True


def there(home: Path) -> list[str]:
    """The modules whose moments are stored in a folder, in the order of their numbers."""
    names = [path.name.removesuffix(".safetensors") for path in home.glob("[!.]*.safetensors")]
    return sorted(names, key=lambda name: [int(n) for n in re.findall(r"\d+", name)])


def compare(path: Path, stored: dict[str, Any], expected: dict[str, Any]) -> None:
    """Refuse a file that is of something else than expected.

    Raises:
        StoreMismatch: A field differs.
    """
    for field, value in expected.items():
        if stored.get(field) != value:
            raise fastcov.StoreMismatch(
                f"The statistics {str(path)!r} are of another {field} ({stored.get(field)!r:.80}, "
                f"not {value!r:.80}), so the file was moved or altered; delete it and precompute "
                "again.",
                field=field,
                stored=stored.get(field),
                expected=value,
            )


def common(stored: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the provenance of several moments shares; of their keys, those of the widest module."""
    widest = max(stored, key=lambda provenance: int(provenance["budget"]))
    return {k: v for k, v in widest.items() if k not in ("module", "versions")}


def essence(shared: dict[str, Any]) -> dict[str, Any]:
    """What statistics depend on: the names of model and corpus say nothing of their contents."""
    kept = {k: v for k, v in shared.items() if k != "model_name"}
    return {**kept, "corpus": shared.get("corpus", {}).get("fingerprint")}


def home_of(folder: Path, shared: dict[str, Any]) -> Path:
    """A folder name that a person can read and that no two different statistics share."""
    digest = hashlib.sha256(json.dumps(essence(shared), sort_keys=True).encode()).hexdigest()[:12]
    known = sorted(folder.glob(f"*-{digest}"))  # the same corpus may have had another name
    if known:
        return known[0]
    name = re.sub(r"[^A-Za-z0-9]+", "-", Path(shared["corpus"]["name"]).name).strip("-")[:40]
    seed = "" if shared["seed"] is None else f"-seed{shared['seed']}"  # of imported ones unknown
    return folder / f"{name}-x{shared['multiplier']:g}{seed}-{digest}"


def stored(
    folder: Path,
    shared: dict[str, Any],
    moments: Mapping[str, tuple[fastcov.SecondMoment, dict[str, Any]]],
) -> dict[str, Path]:
    """Write moments that were not collected here, over former ones of the same provenance.

    Args:
        folder: That of the model's statistics.
        shared: What all of them are of.
        moments: Module name -> moment, and what it alone is of.

    Raises:
        OSError: A file cannot be written; those that were written are whole.
    """
    home = home_of(folder, shared)
    paths = {}
    for name, (moment, own) in moments.items():
        paths[name] = home / f"{name}.safetensors"
        fastcov.save_moment(paths[name], moment, {**shared, "module": name, **own})
    return paths


def copied(paths: dict[str, Path], folder: Path, home: str | None = None) -> dict[str, Path]:
    """The files of some statistics in another folder of statistics, named by their modules.

    Args:
        paths: Module name -> file, all in one folder.
        folder: That of the model's statistics.
        home: The name of their own folder in it; None takes the one that they have.

    Raises:
        OSError: A file cannot be written.
    """
    found = {
        name: folder / (home or path.parent.name) / f"{name}.safetensors"
        for name, path in paths.items()
    }
    missing = {name: path for name, path in found.items() if not path.is_file()}
    if missing:
        place = next(iter(missing.values())).parent
        with alone(lock_of(place), "writing the same statistics"):
            for name, path in missing.items():
                with atomic_file(path) as file, open(paths[name], "rb") as source:
                    shutil.copyfileobj(source, file)
    return found
