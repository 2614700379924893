"""Where stored statistics lie, and how it is told that they are of what is wanted."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fastcov
from fastcov.files import atomic_file
from fastmemit.files import alone, lock_of, shared_folder

#: What the moments of one collection need not share.
OWN = ("module", "budget", "keys", "source", "versions")
_ABSENT = object()


def provenance_of(path: Path) -> dict[str, Any]:
    """What a stored moment says that it is of, complete.

    Raises:
        StoreMissing: There is no such file.
        StoreDamaged: Its header is not what was written, or a field, which is named, is missing or something else.
    """
    stored = fastcov.read_provenance(path)
    for field in lacking(stored):
        raise fastcov.StoreDamaged(
            f"The statistics {str(path)!r} do not say their {field} "
            f"({f'{stored[field]!r:.80}' if field in stored else 'not on record'}); delete the "
            "file and precompute again."
        )
    return stored


def lacking(stored: Mapping[str, Any]) -> list[str]:
    """The fields of a provenance that are missing, unless older files lack them, or not what is written."""
    corpus = stored.get("corpus")
    smaller = stored.get("snapshots", [])
    sound = {
        "model": _is_text(stored.get("model")),
        "tokenizer": _is_text(stored.get("tokenizer")),
        "module": _is_text(stored.get("module")),
        "corpus": isinstance(corpus, Mapping)
        and isinstance(corpus.get("name"), str)
        and _is_text(corpus.get("fingerprint")),
        "multiplier": _is_number(stored.get("multiplier")),
        "budget": type(stored.get("budget")) is int and stored["budget"] > 0,
        "keys": type(stored.get("keys", 1)) is int and stored.get("keys", 1) > 0,
        "seed": type(stored.get("seed", "")) in (int, type(None)),  # None of imported ones
        "context": type(stored.get("context")) in (int, type(None)),
        "allow_fewer": type(stored.get("allow_fewer", False)) is bool,
        "bos": type(stored.get("bos", True)) is bool,
        "snapshots": isinstance(smaller, list) and all(map(_is_number, smaller)),
    }
    return [field for field, fine in sound.items() if not fine]


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _is_number(value: object) -> bool:
    """Whether it is a finite number above 0, as a float too."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return 0 < value <= sys.float_info.max  # a whole number in JSON has no largest


def is_there(path: Path, shared: dict[str, Any], module: str, budget: int) -> bool:
    """Whether the moment of a module with so many keys is stored already; `shared` is what all modules' are of.

    Raises:
        StoreDamaged: The file is not what was written.
        StoreMismatch: The file of this name is of something else.
    """
    if not path.is_file():
        return False
    stored = provenance_of(path)
    compare(path, stored, {**shared, "module": module, "budget": budget})
    return True


def there(home: Path) -> list[str]:
    """The modules whose moments are stored in a folder, in the order of their numbers."""
    names = [path.name.removesuffix(".safetensors") for path in home.glob("[!.]*.safetensors")]
    return sorted(names, key=lambda name: [int(n) for n in re.findall(r"\d+", name)])


def compare(path: Path, stored: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuse a file that is of something else than expected, field by field.

    Compared is all that statistics depend on, and those of `OWN` that are expected.

    Raises:
        StoreMismatch: A field differs, or only one of them has it.
    """
    found = {**essence(stored), **{name: stored.get(name) for name in OWN if name in expected}}
    wanted = {**essence(expected), **{name: expected[name] for name in OWN if name in expected}}
    for field in (*wanted, *found):
        said, value = found.get(field, _ABSENT), wanted.get(field, _ABSENT)
        if said is _ABSENT or value is _ABSENT or said != value:
            raise _mismatch(path, field, said, value)


def _mismatch(path: Path, field: str, stored: object, expected: object) -> fastcov.StoreMismatch:
    said, value = ("nothing" if found is _ABSENT else f"{found!r:.80}" for found in (stored, expected))
    return fastcov.StoreMismatch(
        f"The statistics {str(path)!r} are of another {field} ({said}, not {value}), so the file "
        "was moved or altered; delete it and precompute again.",
        field=field,
        stored=None if stored is _ABSENT else stored,
        expected=None if expected is _ABSENT else expected,
    )


def provenances_in(home: Path, modules: Sequence[str], model: str) -> list[dict[str, Any]]:
    """What the moments of some modules in a folder say that they are of: one collection, which the folder is called by.

    Raises:
        StoreMissing: There is no file of a module.
        StoreDamaged: A file's header is not what was written, or lacks a field.
        StoreMismatch: A file is of another model, module or collection.
    """
    stored = {name: provenance_of(home / f"{name}.safetensors") for name in modules}
    key = re.search(r"-([0-9a-f]{12})$", home.name)
    right = [p for p in stored.values() if key is not None and _digest(p) == key[1]]
    for name, provenance in stored.items():
        path = home / f"{name}.safetensors"
        for field, value in (("model", model), ("module", name)):
            if provenance[field] != value:
                raise _mismatch(path, field, provenance[field], value)
        compare(path, provenance, shared_of((right or list(stored.values()))[0]))
        if key is not None and not right:
            raise fastcov.StoreMismatch(
                f"The statistics {str(path)!r} are of {_described(provenance)}, which belong into "
                f"a folder named *-{_digest(provenance)} and not *-{key[1]}, so the files were "
                "moved or altered; delete them and precompute again.",
                field="folder",
                stored=_digest(provenance),
                expected=key[1],
            )
    return list(stored.values())


def _described(provenance: Mapping[str, Any]) -> str:
    """What a collection is of, as a mismatch of all its files has no field to name."""
    kept = {k: v for k, v in essence(provenance).items() if k not in ("model", "corpus")}
    name = f"the corpus {provenance['corpus']['name']!r:.80}"
    return ", ".join([name, *(f"{field} {value!r:.20}" for field, value in kept.items())])


def check_moment(path: Path, provenance: Mapping[str, Any], moment: fastcov.SecondMoment) -> None:
    """Refuse a moment that does not hold as many keys as its provenance says.

    Raises:
        StoreDamaged: The numbers contradict each other.
    """
    budget, keys = provenance["budget"], provenance.get("keys", provenance["budget"])
    numbers = [("keys", keys, moment.count)]
    if "source" not in provenance:  # other codebases count keys, and know of no budget
        numbers.append(("budget", budget, fastcov.budget(provenance["multiplier"], moment.d)))
    if not provenance.get("allow_fewer"):
        numbers.append(("keys", keys, budget))
    for field, said, found in numbers:
        if said != found:
            raise fastcov.StoreDamaged(
                f"The statistics {str(path)!r} say that their {field} are {said}, but with all "
                f"else that they say it must be {found}; delete the file and precompute again."
            )


def common(stored: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the provenance of several moments shares; of their keys, those of the widest module."""
    widest = max(stored, key=lambda provenance: int(provenance["budget"]))
    return {k: v for k, v in widest.items() if k not in ("module", "versions")}


def shared_of(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a moment's provenance that all moments of its collection share."""
    return {name: value for name, value in provenance.items() if name not in OWN}


def essence(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What statistics depend on: the names of model and corpus say nothing of their contents."""
    kept = {k: v for k, v in shared_of(provenance).items() if k != "model_name"}
    return {**kept, "corpus": provenance.get("corpus", {}).get("fingerprint")}


def _digest(provenance: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(essence(provenance), sort_keys=True).encode()).hexdigest()[:12]


def home_of(folder: Path, shared: dict[str, Any]) -> Path:
    """A folder name that a person can read and that no two different statistics share."""
    digest = _digest(shared)
    known = sorted(folder.glob(f"*-{digest}"))  # the same corpus may have had another name
    if known:
        return known[0]
    name = re.sub(r"[^A-Za-z0-9]+", "-", Path(shared["corpus"]["name"]).name).strip("-")[:40]
    seed = "" if shared["seed"] is None else f"-seed{shared['seed']}"  # of imported ones unknown
    return folder / f"{name}-x{shared['multiplier']:g}{seed}-{digest}"


def stored(
    folder: Path, shared: dict[str, Any], moments: Mapping[str, tuple[fastcov.SecondMoment, dict[str, Any]]]
) -> dict[str, Path]:
    """Write moments that were not collected here into a model's folder, each with what it alone is of; their files."""
    home = home_of(folder, shared)
    paths = {}
    shared_folder(home)
    for name, (moment, own) in moments.items():
        paths[name] = home / f"{name}.safetensors"
        fastcov.save_moment(paths[name], moment, {**shared, "module": name, **own})
    return paths


def copied(
    paths: dict[str, Path], provenance: Mapping[str, Any], folder: Path, home: str | None = None
) -> dict[str, Path]:
    """The files of some statistics in another folder of a model's statistics, where a file that is there already stays.

    Args:
        paths: Module name -> file, all in one folder.
        provenance: What all of them are of.
        folder: The folder of the model's statistics.
        home: The name for their own folder in it; None takes the one that they have.

    Raises:
        StoreDamaged: A file is not what was written.
        StoreMismatch: A file is of something else.
        OSError: A file cannot be written.
    """

    def check(path: Path, name: str) -> None:
        compare(path, provenance_of(path), {**shared_of(provenance), "module": name})

    for name, path in paths.items():
        check(path, name)
    found = {name: folder / (home or path.parent.name) / f"{name}.safetensors" for name, path in paths.items()}
    missing = {name: path for name, path in found.items() if not path.is_file()}
    if missing:
        place = next(iter(missing.values())).parent
        with alone(lock_of(place), "writing the same statistics"):
            shared_folder(place)
            for name, path in missing.items():
                with atomic_file(path) as file, open(paths[name], "rb") as source:
                    shutil.copyfileobj(source, file)
    for name, path in found.items():
        check(path, name)
    return found
