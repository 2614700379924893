"""Other codebases' statistics as ours: read, checked, and kept where edits find them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fastcov
from fastcov.hooks import isolated
from fastcov.npz import NpzMoment, load_npz
from fastmemit.editor import Editor
from fastmemit.errors import BadConfig
from fastmemit.interop.layouts import StatsPlace, module_of, sample_size_of
from fastmemit.interop.likeness import check_likeness
from fastmemit.models import ModelAdapter
from fastmemit.statistics import Statistics, versions

IMPORTED = "imported:"

_READ_BYTES = 1 << 24
_SHOWN = 6


@isolated()
def import_statistics(editor: Editor, files: Mapping[str, Path] | Sequence[Path], *, check: bool = True) -> Statistics:
    """Take second moments that another codebase collected, and use them from now on.

    They are kept beside the ones collected here, as the newest, with where they came from on record, so that edits in
    later processes find them too. A file does not say which model it is of. So it is compared with the model: see
    `fastmemit.interop.likeness`.

    Args:
        editor: Of the model that they are of, unedited, in the dtype that it will be edited in.
        files: Module name -> file; or files alone, whose names say which module they are of.
        check: Compare them with the model's own keys; False takes them as they are.

    Returns:
        The statistics.

    Raises:
        BadConfig: There is no file, a name says no module of this model, two files are of one module or the same for
            two, or they count different numbers of keys.
        WrongModel: The keys that they were made of are unlike this model's.
        fastcov.StoreMissing: A file is not there.
        fastcov.WrongWidth: The keys are of another width than the model's.
        fastcov.NonFiniteMatrix: A sum holds NaN or infinity.
        fastcov.StoreDamaged: A file is not what it should be.
        fastcov.StoreMismatch: A file is of another sample size than its name says.
        OSError: A file cannot be written; those that were written are whole.
    """
    named = _named(editor, files)
    adapter = editor.adapter
    layers = layers_by_name(adapter)
    read = {n: load_npz(path, width=adapter.d_k(layers[n])) for n, path in named.items()}
    for name, path in named.items():
        _check_named(path, read[name])
    digests = {name: _sha256(path) for name, path in named.items()}
    _check_apart(named, digests)
    multiplier = _multiplier(named, read)
    if check:
        check_likeness(editor, {name: found.moment for name, found in read.items()})
    corpus = {"name": _corpus_name(named), "fingerprint": _together(digests)}
    shared: dict[str, Any] = {
        **editor.sources.identity(),
        "corpus": corpus,
        "seed": None,  # nobody knows; nor the length that documents were cut at
        "multiplier": multiplier,
        "allow_fewer": False,
    }
    moments = {
        name: (
            found.moment,
            {
                "budget": found.moment.count,
                "keys": found.moment.count,
                "source": {"file": named[name].name, "sha256": digests[name], "sample_size": found.sample_size},
                "versions": versions(),
            },
        )
        for name, found in read.items()
    }
    return editor.sources.take_over(shared, moments)


def files_of(editor: Editor, place: StatsPlace, layers: Sequence[int] | None = None) -> dict[str, Path]:
    """The files of a model's layers in another codebase's folder.

    Args:
        editor: Of the model.
        place: Where they lie.
        layers: Which; None takes those that are there.

    Returns:
        Module name -> file.

    Raises:
        fastcov.StoreMissing: There is none for a layer, or none at all; the message says what is.
        BadLayer: A layer that the model does not have.
    """
    if layers is None:
        names = list(layers_by_name(editor.adapter))
    else:
        names = [editor.adapter.projection_name(layer) for layer in layers]
    paths = {name: place.path(name) for name in names}
    there = {name: path for name, path in paths.items() if path.is_file()}
    if there and (layers is None or there == paths):
        return there
    lacking = next(path for name, path in paths.items() if name not in there)
    raise fastcov.StoreMissing(
        f"There is no file {str(lacking)!r} ({_what_is_there(place)}); correct --stats-dir, "
        "--layout, --model-name, --dataset, --precision or --sample-size, or name the files."
    )


def _what_is_there(place: StatsPlace) -> str:
    """What a wrong name most likely meant, in words."""
    folder = place.folder
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    found = sorted(path.name for path in folder.iterdir())
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return f"{str(folder)!r} holds {', '.join(found[:_SHOWN]) or 'nothing'}{more}"


def _named(editor: Editor, files: Mapping[str, Path] | Sequence[Path]) -> dict[str, Path]:
    """The files by module, which this model must have."""
    adapter = editor.adapter
    mine = layers_by_name(adapter)
    if isinstance(files, Mapping):
        named = {name: Path(path) for name, path in files.items()}
    else:
        named = {}
        for path in map(Path, files):
            name = module_of(path)
            if name is None:
                raise BadConfig(
                    f"The name {path.name!r} does not say which module the file is of; it should "
                    "be as MODULE_float32_mom2_100000.npz."
                )
            if name in named:
                raise BadConfig(f"Both {str(named[name])!r} and {str(path)!r} are of {name}; name one of them.")
            named[name] = path
    if not named:
        raise BadConfig("There is no file to import; name at least one.")
    for name, path in named.items():
        if name not in mine:
            raise BadConfig(
                f"The file {path.name!r} is of {name}, but the edited projections of {editor.name} "
                f"are {adapter.template}; take the files of this model, or set --module."
            )
        adapter.check_layer(mine[name])
    return dict(sorted(named.items(), key=lambda item: mine[item[0]]))


def layers_by_name(adapter: ModelAdapter) -> dict[str, int]:
    """The names that the blocks' projections have or would have -> layer."""
    return {adapter.template.replace("{}", str(i)): i for i in range(adapter.n_layers)}


def _check_named(path: Path, found: NpzMoment) -> None:
    """Refuse a file that says another sample size than its name, as their loaders do.

    It is all that a file of theirs says of itself beside the count.
    """
    named = sample_size_of(path)
    if None not in (named, found.sample_size) and named != found.sample_size:
        raise fastcov.StoreMismatch(
            f"{str(path)!r} is of another sample_size ({found.sample_size}, not {named} as its "
            "name says), so it was moved or altered; take the file of this name from where it "
            "comes from, or name it by what it is.",
            field="sample_size",
            stored=found.sample_size,
            expected=named,
        )


def _check_apart(named: Mapping[str, Path], digests: Mapping[str, str]) -> None:
    """Refuse one file under two names."""
    first: dict[str, str] = {}
    for name, digest in digests.items():
        other = first.setdefault(digest, name)
        if other != name:
            raise BadConfig(
                f"{str(named[other])!r} and {str(named[name])!r} are the same file, but {other} "
                f"and {name} have different keys; get the right one for each."
            )


def _multiplier(named: Mapping[str, Path], read: Mapping[str, NpzMoment]) -> float:
    """How many keys there are for each dimension, the same for all modules."""
    widest = max((found.moment for found in read.values()), key=lambda moment: moment.d)
    multiplier = widest.count / widest.d
    for name, found in read.items():
        moment = found.moment
        if moment.count not in (widest.count, round(multiplier * moment.d)):
            raise BadConfig(
                f"{str(named[name])!r} counts {moment.count} keys but others {widest.count}, so "
                "they are not of one run; import files of the same run together."
            )
    return multiplier


def _corpus_name(named: Mapping[str, Path]) -> str:
    """What to call where they came from: the data set's folder where all lie in one."""
    folders = {path.resolve().parent.name for path in named.values()}
    (folder,) = folders if len(folders) == 1 else {""}
    if folder.endswith("_stats") or len(named) > 1:
        return IMPORTED + (folder or "several folders")
    return IMPORTED + next(iter(named.values())).name


def _together(digests: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(dict(digests), sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()
