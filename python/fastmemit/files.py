"""The files of a cache: who may write, what stored statistics say that they are of."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fastcov
from fastcov.files import atomic_file, printable_logger
from fastcov.store import read_checkpoint

log = printable_logger(__name__)


def cache_dir() -> Path:
    """The folder for cached files: ``$FASTMEMIT_CACHE``, or the platform's cache folder.

    The folder need not exist; who writes makes it.
    """
    chosen = os.environ.get("FASTMEMIT_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fastmemit"


def sha256_of(path: Path) -> str:
    """The digest of a file's bytes in hex, read piece by piece."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def shared_folder(folder: Path) -> None:
    """Make a folder, and those above it, for all who may write where the first one is made.

    The umask of most systems gives a new folder to its owner alone. In a cache that several users share the others
    could then neither add to what one has begun nor lock it.
    """
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for each in reversed(missing):
        try:
            each.mkdir()
        except FileExistsError:  # another process was faster
            continue
        above = stat.S_IMODE(each.parent.stat().st_mode)
        if os.name == "posix" and above & (stat.S_IWGRP | stat.S_IWOTH):
            own = stat.S_IMODE(each.stat().st_mode)
            with suppress(OSError):
                each.chmod(own | above & (stat.S_IRWXG | stat.S_IRWXO | stat.S_ISVTX))


if sys.platform != "win32":
    import fcntl


# After so many seconds a process says what it waits for.
_PATIENCE = 5.0
_POLL = 0.2
# What flock answers where somebody else has the lock; anything else is a file system without locks.
_HELD = {errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK}


def lock_of(home: Path) -> Path:
    """The lock of a folder of statistics, beside it."""
    return home.with_name(f".{home.name}.lock")


@contextmanager
def alone(path: Path, what: str, *, wait: bool = True) -> Iterator[bool]:
    """Keep other processes out that come with the same path, and wait for one inside; yields whether there is a lock.

    The system frees the lock of a process that ends, however it ends. On a file system without locks nobody waits, nor
    where the file is one that another user let nobody read: what is written inside must be written by atomic renames,
    so that both processes finish and one of two equal files stays. Two threads of a process wait for each other as two
    processes do.

    A killed process alone leaves the file behind, empty and without harm, also to other users. Its folder is made; an
    OSError says that it cannot be. Who waits says `what` the other does; without `wait`, a lock of another's is none.
    """
    shared_folder(path.parent)
    begun, told = time.monotonic(), False
    while True:
        try:
            release = _taken(path)
        except _NoLocks as error:
            log.warning("%s is as on a file system without locks (%s); nobody waits", path, error)
            with suppress(OSError):
                path.unlink()
            yield False
            return
        if release is not None:
            break
        if not wait:
            yield False
            return
        if not told and time.monotonic() - begun >= _PATIENCE:
            log.warning("another process is %s; waiting for it (%s)", what, path)
            told = True
        time.sleep(_POLL)
    try:
        yield True
    finally:
        release()


class _NoLocks(Exception):
    """The file system has none, or the file is another user's and cannot even be read."""


def _taken(path: Path) -> Callable[[], None] | None:
    """Take the lock if it is free: how to give it back, or None; _NoLocks if there are none, or none for this user."""
    # Unlike filelock, which keeps its file for ever and retries whatever flock says, this removes the file and tells a
    # lock that is held from a file system without locks.
    if sys.platform == "win32":
        return _taken_on_windows(path)
    flags = getattr(os, "O_CLOEXEC", 0)
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o666)
    except PermissionError as refused:
        if not path.exists():  # the folder cannot be written
            raise
        try:  # what a process of another user has left; who may read it may lock it
            file = os.open(path, os.O_RDONLY | flags)
        except FileNotFoundError:
            return None
        except PermissionError:
            raise _NoLocks(refused.strerror) from refused
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        mine = os.fstat(file)
        with suppress(FileNotFoundError):
            there = os.stat(path)
            # Whoever had the lock removed the file: this may be one without a name.
            if (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino):

                def release() -> None:
                    with suppress(OSError):
                        path.unlink()  # before the lock is free, so that it is never another's
                    os.close(file)

                return release
    except OSError as error:
        os.close(file)
        if error.errno in _HELD:
            return None
        raise _NoLocks(error.strerror) from error
    os.close(file)
    return None


def _taken_on_windows(path: Path) -> Callable[[], None] | None:
    from filelock import FileLock, Timeout

    lock = FileLock(path, timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        return None
    return lock.release


# What stored statistics are of, and where they lie

#: What the moments of one collection need not share.
OWN = ("module", "budget", "keys", "source", "versions")
_TEMPORARY = ".*.tmp"
#: Unfinished sums, by a digest for the star; no .safetensors: nobody takes one for a moment.
CHECKPOINTS = ".collecting-*.checkpoint"
_ABSENT = object()


def provenance_of(path: Path) -> dict[str, Any]:
    """What a stored moment says that it is of, complete; a StoreDamaged names the field that is missing or wrong."""
    stored = fastcov.read_provenance(path)
    for field in lacking_fields(stored):
        raise fastcov.StoreDamaged(
            f"The statistics {str(path)!r} do not say their {field} "
            f"({f'{stored[field]!r:.80}' if field in stored else 'not on record'}); delete the "
            "file and precompute again."
        )
    return stored


def lacking_fields(stored: Mapping[str, Any]) -> list[str]:
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
        "quartic": type(stored.get("quartic", False)) is bool,
        "forward": stored.get("forward", "bfloat16") == "bfloat16",
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


def is_stored(path: Path, shared: dict[str, Any], module: str, budget: int) -> bool:
    """Whether a module's moment of so many keys is there; StoreMismatch if it is of something else than `shared`."""
    if not path.is_file():
        return False
    stored = provenance_of(path)
    compare_provenance(path, stored, {**shared, "module": module, "budget": budget})
    return True


def stored_modules(home: Path) -> list[str]:
    """The modules whose moments are stored in a folder, in the order of their numbers."""
    names = [path.name.removesuffix(".safetensors") for path in home.glob("[!.]*.safetensors")]
    return sorted(names, key=lambda name: [int(n) for n in re.findall(r"\d+", name)])


def compare_provenance(path: Path, stored: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuse (StoreMismatch) a file of something else, in what statistics depend on or what is expected of `OWN`."""
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
    """What moments in a folder say that they are of: one collection, that of its name; else a StoreMismatch."""
    stored = {name: provenance_of(home / f"{name}.safetensors") for name in modules}
    key = re.search(r"-([0-9a-f]{12})$", home.name)
    right = [p for p in stored.values() if key is not None and _digest(p) == key[1]]
    for name, provenance in stored.items():
        path = home / f"{name}.safetensors"
        for field, value in (("model", model), ("module", name)):
            if provenance[field] != value:
                raise _mismatch(path, field, provenance[field], value)
        compare_provenance(path, provenance, shared_of((right or list(stored.values()))[0]))
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
    """Refuse, by a StoreDamaged, a moment that does not hold as many keys as its provenance says."""
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


def common_provenance(stored: Sequence[dict[str, Any]]) -> dict[str, Any]:
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


#: What statistics of one model are told apart by, with what is usual; how a sum was reached is none of it.
_APART = {"multiplier": None, "context": None, "seed": None, "bos": True, "forward": None}


def told_apart(stored: Sequence[Mapping[str, Any]]) -> str:
    """In what the first of some statistics differ from the others, by their provenance; nothing where they do not.

    Of each field that differs the first one's value is named, and behind it those of the others.
    """

    def values(one: Mapping[str, Any]) -> dict[str, str]:
        corpus = one["corpus"]
        kept = {name: str(one.get(name, usual)) for name, usual in _APART.items()}
        return {"corpus": f"{corpus['name']!r:.80} ({corpus['fingerprint']:.8})", **kept}

    parts = []
    for name, value in values(stored[0]).items():
        if others := dict.fromkeys(said for one in stored if (said := values(one)[name]) != value):
            parts.append(f"{name} {value} (not {', '.join(others)})")
    return "; ".join(parts)


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


def write_moments(
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


def copy_moments(
    paths: dict[str, Path], provenance: Mapping[str, Any], folder: Path, home: str | None = None
) -> dict[str, Path]:
    """The files of some statistics, by module, in another folder of a model's; a file that is there already stays.

    They go into `home` in it, by default called as the folder that they are in. One that is not what was written, or of
    something else than the provenance, is refused as by `compare_provenance`.
    """

    def check(path: Path, name: str) -> None:
        compare_provenance(path, provenance_of(path), {**shared_of(provenance), "module": name})

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


def remove_stale(home: Path, *, useless_too: bool = False) -> None:
    """Remove what killed processes left in a folder of statistics; nobody else may write there.

    Temporary files; and if asked checkpoints that are damaged or all of whose modules are there.
    """
    for path in home.glob(_TEMPORARY):
        with suppress(OSError):
            path.unlink()
    for path in home.glob(CHECKPOINTS) if useless_too else ():
        try:
            modules = read_checkpoint(path)[1]
        except (fastcov.StoreDamaged, OSError):
            modules = {}
        if all((home / f"{name}.safetensors").is_file() for name in modules):
            with suppress(OSError):
                path.unlink()


def remove_leftovers(home: Path) -> None:
    """Remove what was left by a process that was killed when all was written but for that.

    It is left where another process works in the folder, or where the folder cannot be written.
    """
    left = (lock_of(home), *home.glob(_TEMPORARY), *home.glob(CHECKPOINTS))
    if any(path.exists() for path in left):
        with suppress(OSError), alone(lock_of(home), "", wait=False) as ours:
            if ours:
                remove_stale(home, useless_too=True)
