"""Statistics of other editing codebases: our files where they look for theirs, and theirs as ours.

Theirs lie at {stats_dir}/{model_dir}/{dataset}_stats/{module}_{precision}_mom2_{sample_size}.npz.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

import fastcov
from fastcov import KeyHooks, SecondMoment
from fastcov.closed_form import THRESHOLD
from fastcov.files import StrPath, atomic_file
from fastcov.hooks import evaluation_mode, isolated, key_rows
from fastcov.npz import NpzMoment, load_npz, save_npz
from fastmemit.data import load_corpus
from fastmemit.data.corpora import corpus_batches
from fastmemit.editor import Editor
from fastmemit.errors import BadConfig, WrongModel, counted
from fastmemit.files import sha256_of
from fastmemit.models import ModelAdapter
from fastmemit.statistics import Statistics, versions

log = logging.getLogger(__name__)

Layout = Literal["rome", "memit", "easyedit", "alphaedit", "efficient"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
PRECISIONS = ("float32", "float64")
SAMPLE_SIZE = 100_000  # documents of Wikipedia that these codebases ask for, in all of their settings
IMPORTED = "imported:"
#: What the paper's own code looks for in a model's name, the first that is in it, and the folder that it goes to then.
_EFFICIENT = {"Llama-2": "Llama-2-7b-hf", "Llama-3": "Llama-3-8b-hf", "gpt-j": "EleutherAI_gpt-j-6B"}

TOKENS, LENGTH = 2048, 128  # the check of imported files: tokens of prose that are read, and how long a text is
#: Below this correlation the keys are of another layer or model; see docs/guide/other-codebases.md.
LEAST_CORRELATION = 0.3
MOST_TIMES = 10.0  # a sum that was divided already, or a count of something else, is wrong by more than this

_NAMED = re.compile(r"(?P<module>.+)_(?P<precision>[a-z0-9]+)_mom2_(?P<size>\d+)\.npz")
_SHOWN = 6


@dataclass(frozen=True)
class StatsPlace:
    """The files of one model, data set and setting in a folder of statistics, which no name may leave (`BadConfig`)."""

    stats_dir: Path  # the codebase's own folder, data/stats in all of them as released
    layout: Layout  # whose
    model_name: str  # as the codebase loads it, a path too: EasyEdit and AlphaEdit take what is behind the last "/"
    dataset: str = "wikipedia"  # mom2_dataset there
    precision: str = "float32"  # mom2_dtype there, or float64
    sample_size: int = SAMPLE_SIZE  # mom2_n_samples there: in the name and in the file, and not the number of keys

    def __post_init__(self) -> None:
        object.__setattr__(self, "stats_dir", Path(self.stats_dir))
        if self.layout not in LAYOUTS:
            raise BadConfig(f"There is no layout {self.layout!r}; choose from {', '.join(LAYOUTS)}.")
        if self.precision not in PRECISIONS:
            raise BadConfig(
                f"Statistics in {self.precision!r} are not exchanged; choose float32 or float64 (mom2_dtype there)."
            )
        if not re.fullmatch(r"[\w.-]*\w[\w.-]*", self.dataset):
            raise BadConfig(f"The data set {self.dataset!r} is no plain name, such as wikipedia.")
        size = self.sample_size
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise BadConfig(f"sample_size must be a whole number above 0 but is {size!r}.")
        if self.model_dir in ("", ".", ".."):
            raise BadConfig(
                f"The model name {self.model_name!r} gives no folder's name; name the model as the other codebase "
                "does, with model_name= (--model-name)."
            )

    @property
    def model_dir(self) -> str:
        """The model's folder, by its name alone."""
        name = self.model_name.replace("\\", "/")
        if self.layout in ("easyedit", "alphaedit"):
            return name.rstrip("/").rpartition("/")[2]
        found = [folder for part, folder in _EFFICIENT.items() if self.layout == "efficient" and part in name]
        return found[0] if found else name.replace("/", "_")

    @property
    def folder(self) -> Path:
        """Where the files of all modules lie."""
        return self.stats_dir / self.model_dir / f"{self.dataset}_stats"

    def path(self, module: str) -> Path:
        """The file of one module, such as ``transformer.h.17.mlp.c_proj``."""
        return self.folder / f"{module}_{self.precision}_mom2_{self.sample_size}.npz"


def module_of(path: StrPath) -> str | None:
    """The module that a file's name says it is of, or None for another name."""
    named = _NAMED.fullmatch(Path(path).name)
    return None if named is None else named["module"]


def layers_by_name(adapter: ModelAdapter) -> dict[str, int]:
    """The names that the blocks' projections have or would have -> layer."""
    return {adapter.template.replace("{}", str(i)): i for i in range(adapter.n_layers)}


def check_new(*paths: Path) -> None:
    """Refuse to write over files; a `BadConfig` names the first that exists."""
    for path in paths:
        if path.exists():
            raise BadConfig(
                f"{str(path)!r} exists and may be the work of days; name another place, or pass "
                "overwrite=True (--overwrite)."
            )


@isolated()
def export_statistics(
    found: Statistics,
    place: StatsPlace,
    modules: Sequence[str] | None = None,
    *,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Path]:
    """Write second moments where another codebase looks for them, so that it collects none.

    Each file has the full symmetric sum of ``k k^T``, the number of keys and the sample size that the codebase is
    configured with. The number of keys is ours, not what that sample would have had: their loaders divide by it, so C
    is the mean over the keys that were collected here.

    Args:
        found: What to write.
        place: Where to.
        modules: Which of them; None takes all.
        overwrite: Replace files that are there. They may be what took somebody days.
        progress: Called after each file with how many it is, 1.
    """
    for name in modules or ():
        if name not in found.paths:
            found.moment(name)  # says what there is
    paths = {name: place.path(name) for name in found.paths if modules is None or name in modules}
    if not overwrite:
        check_new(*paths.values())
    for name, path in paths.items():
        save_npz(path, found.moment(name), sample_size=place.sample_size, dtype=getattr(torch, place.precision))
        if progress is not None:
            progress(1)
    return paths


@isolated()
def export_null_space(
    found: Statistics,
    path: StrPath,
    modules: Sequence[str] | None = None,
    *,
    threshold: float = THRESHOLD,
    relative: float | None = None,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> dict[str, int]:
    """Write AlphaEdit's projectors onto the null space of C (arXiv 2410.02355), layer by layer, as EasyEdit reads them.

    The file is one float32 tensor (layers, d_k, d_k) of ``P = U U^T``, U the eigenvectors of C with an eigenvalue below
    a threshold, in the order of the modules; ``torch.load`` reads it with ``weights_only=True``.

    Args:
        found: The second moments.
        path: The file, ``P_loc`` of EasyEdit's settings. AlphaEdit's own code writes one and never reads it.
        modules: Which of them and in which order, which must be that of the settings' ``layers``; None takes all as
            they are.
        threshold: See `fastcov.null_space`.
        relative: Instead of `threshold`, a multiple of the mean of C's diagonal.
        overwrite: Replace a file that is there.
        progress: Called after each layer with how many it is, 1.

    Returns:
        Module name -> how many directions its null space has. None at all makes AlphaEdit change nothing, and all of
        them make it change everything.

    Raises:
        BadConfig: The file is there already, the layers differ in width, or a threshold is not above 0.
    """
    if not overwrite:
        check_new(Path(path))
    names = list(found.paths if modules is None else modules)
    if not names:
        raise BadConfig("There is no layer to project; name at least one.")
    ranks: dict[str, int] = {}
    stacked = torch.empty(0)
    for place, name in enumerate(names):
        C = found.second_moment(name)  # (d_k, d_k)
        if place == 0:
            stacked = torch.empty(len(names), *C.shape)
        if C.shape != stacked.shape[1:]:
            raise BadConfig(
                f"The keys of {name} are {C.shape[0]} wide but those of {names[0]} are {stacked.shape[1]}, and one "
                "tensor cannot hold both; name layers of one width."
            )
        try:
            null = fastcov.null_space(C, threshold=threshold, relative=relative)
        except ValueError as error:
            raise BadConfig(str(error)) from error
        stacked[place] = null.projector()
        ranks[name] = null.rank
        if null.rank in (0, len(C)):
            share, so = ("all", "nothing would be preserved") if null.rank else ("none", "nothing could be edited")
            low, high = float(null.eigenvalues[0]), float(null.eigenvalues[-1])
            log.warning(
                f"{share} of the {len(C)} directions of {name} lie below the threshold {null.threshold:g} (eigenvalues "
                f"from {low:.2g} to {high:.2g}), so {so}; choose another threshold, or a relative one"
            )
        if progress is not None:
            progress(1)
    with atomic_file(path) as file:
        torch.save(stacked, file)
    return ranks


def files_of(editor: Editor, place: StatsPlace, layers: Sequence[int] | None = None) -> dict[str, Path]:
    """The files of a model's layers in another codebase's folder, by module; without `layers` those that are there.

    Raises:
        fastcov.FastcovError: There is none for a layer, or none at all; the message says what is.
    """
    adapter = editor.adapter
    names = list(layers_by_name(adapter)) if layers is None else [adapter.projection_name(layer) for layer in layers]
    paths = {name: place.path(name) for name in names}
    there = {name: path for name, path in paths.items() if path.is_file()}
    if there and (layers is None or there == paths):
        return there
    lacking = next(path for name, path in paths.items() if name not in there)
    folder = place.folder  # or the lowest one above it that is there: what a wrong name most likely meant
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    found = sorted(path.name for path in folder.iterdir())
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    raise fastcov.FastcovError(
        f"There is no file {str(lacking)!r} ({str(folder)!r} holds {', '.join(found[:_SHOWN]) or 'nothing'}{more}); "
        "correct --stats-dir, --layout, --model-name, --dataset, --precision or --sample-size, or name the files."
    )


@isolated()
def import_statistics(
    editor: Editor, files: Mapping[str, StrPath] | Sequence[StrPath], *, check: bool = True
) -> Statistics:
    """Take second moments that another codebase collected, and use them from now on.

    They are stored beside the ones collected here, as the newest, with where they came from on record, so that edits in
    later processes find them too. A file does not say which model it is of. So it is compared with the model: see
    `check_likeness`.

    Args:
        editor: An editor of the model that they are of, unedited, in the dtype that it will be edited in.
        files: Module name -> file; or files alone, whose names say which module they are of.
        check: Compare them with the model's own keys; False takes them as they are.

    Raises:
        BadConfig: There is no file, a name says no module of this model, two files are of one module or the same for
            two, or they count different numbers of keys.
    """
    named = _named(editor, files)
    layers = layers_by_name(editor.adapter)
    read = {n: load_npz(path, width=editor.adapter.d_k(layers[n])) for n, path in named.items()}
    digests: dict[str, str] = {}
    for name, path in named.items():
        _check_sample_size(path, read[name])
        digests[name] = sha256_of(path)
        other = next(each for each, digest in digests.items() if digest == digests[name])
        if other != name:
            raise BadConfig(
                f"{str(named[other])!r} and {str(path)!r} are the same file, but {other} and {name} have "
                "different keys; get the right one for each."
            )
    widest = max((found.moment for found in read.values()), key=lambda moment: moment.d)
    multiplier = widest.count / widest.d
    for name, found in read.items():
        if found.moment.count not in (widest.count, round(multiplier * found.moment.d)):
            raise BadConfig(
                f"{str(named[name])!r} counts {found.moment.count} keys but others {widest.count}, so "
                "they are not of one run; import files of the same run together."
            )
    if check:
        check_likeness(editor, {name: found.moment for name, found in read.items()})
    together = hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()
    shared = {
        "corpus": {"name": _corpus_name(named), "fingerprint": together},
        "seed": None,  # nobody knows; nor the length that documents were cut at
        "multiplier": multiplier,
        "allow_fewer": False,
    }
    moments = {}
    for name, found in read.items():
        source = {"file": named[name].name, "sha256": digests[name], "sample_size": found.sample_size}
        own = {"budget": found.moment.count, "keys": found.moment.count, "source": source, "versions": versions()}
        moments[name] = (found.moment, own)
    return editor.store.add(shared, moments)


def _named(editor: Editor, files: Mapping[str, StrPath] | Sequence[StrPath]) -> dict[str, Path]:
    """The files by module, which this model must have."""
    adapter = editor.adapter
    mine = layers_by_name(adapter)
    named: dict[str, Path] = {}
    if isinstance(files, Mapping):
        named = {name: Path(path) for name, path in files.items()}
    else:
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


def _check_sample_size(path: Path, found: NpzMoment) -> None:
    """Refuse a file that says another sample size than its name, as their loaders do."""
    named = _NAMED.fullmatch(path.name)
    size = None if named is None or len(named["size"]) > 18 else int(named["size"])
    if None not in (size, found.sample_size) and size != found.sample_size:
        raise fastcov.StoreMismatch(
            f"{str(path)!r} is of another sample_size ({found.sample_size}, not {size} as its name says), so it was "
            "moved or altered; take the file of this name from where it comes from, or name it by what it is.",
            field="sample_size",
            stored=found.sample_size,
            expected=size,
        )


def _corpus_name(named: Mapping[str, Path]) -> str:
    """What to call where they came from: the data set's folder where all lie in one."""
    folders = {path.resolve().parent.name for path in named.values()}
    (folder,) = folders if len(folders) == 1 else {""}
    if folder.endswith("_stats") or len(named) > 1:
        return IMPORTED + (folder or "several folders")
    return IMPORTED + next(iter(named.values())).name


# Whether a moment can be of a model's keys at all. Its width is all that could be compared. But each coordinate of a
# key is one neuron, and which neurons are active is the same on any text, and unlike in another layer or model. So the
# mean square of every coordinate, the diagonal of C, is compared with the model's own on the package's prose.


class Likeness(NamedTuple):
    """How far a second moment resembles that of a model's own keys."""

    correlation: float  # of the logarithms of the mean squares, over coordinates; 1 is the same
    times: float  # how many times larger the file's mean squares are, in the median coordinate


@isolated()
def likeness(diagonal: Tensor, mean_squares: Tensor) -> Likeness:
    """Compare the diagonal of C (d_k,) with mean squares of keys (d_k,)."""
    theirs, mine = diagonal.double().cpu(), mean_squares.double().cpu()
    alive = (theirs > 0) & (mine > 0)  # a little text cannot tell a dead neuron from a rare one
    if int(alive.sum()) < 2:
        return Likeness(0.0, 0.0)
    logs = torch.stack([theirs[alive].log(), mine[alive].log()])
    correlation = torch.corrcoef(logs)[0, 1].nan_to_num(0.0)  # NaN: one of them is constant
    return Likeness(float(correlation), float((logs[0] - logs[1]).median().exp()))


def check_likeness(editor: Editor, moments: Mapping[str, SecondMoment]) -> None:
    """Refuse moments, by module, that are unlike those of the unedited model's own keys, by a WrongModel."""
    if editor.edits:
        raise WrongModel(
            f"{counted(len(editor.edits), 'edit is', 'edits are')} in the weights, and statistics belong to the "
            "unedited model; undo them first."
        )
    own = mean_squares(editor, list(moments))
    for name, moment in moments.items():
        alike = likeness(moment.lower.diagonal() / moment.count, own[name])
        if alike.correlation < LEAST_CORRELATION:
            raise WrongModel(
                f"The statistics for {name} are not of this model's keys: the mean squares of the coordinates "
                f"correlate by {alike.correlation:.2f} with those on a little text (the same model has above "
                f"{LEAST_CORRELATION:g}); take the file of this model and layer, or pass check=False (--no-check) if "
                "you know better."
            )
        if not 1 / MOST_TIMES < alike.times < MOST_TIMES:
            raise WrongModel(
                f"The statistics for {name} are {alike.times:.3g} times what this model's keys have, so their count "
                f"({moment.count}) is not that of their keys; get the file again, or pass check=False (--no-check) if "
                "you know better."
            )


@isolated()
def mean_squares(editor: Editor, modules: Sequence[str]) -> dict[str, Tensor]:
    """The mean square of each coordinate of the keys on some prose, module name -> (d_k,)."""
    model, device = editor.adapter.model, editor.adapter.device
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(modules, 0)
    mask: Tensor | None = None  # of the batch that runs

    def add(name: str, x: Tensor) -> None:
        for rows, part in key_rows(x, mask):
            counted = rows if part is None else rows[part.to(rows.device)]
            sums[name] = sums.get(name, 0) + counted.double().square().sum(0).cpu()
            counts[name] += counted.shape[0]

    # The first position's key is unlike all others, and how much it weighs depends on how long texts are.
    prose = corpus_batches(load_corpus("builtin"), editor.tokenizer, device, tokens=TOKENS, context=LENGTH, skip=1)
    with prose as batches, KeyHooks(model, modules, add) as hooks, evaluation_mode(model):
        for batch in batches:
            moved = {k: v.to(device) for k, v in batch.items() if k != "key_mask"}
            mask = batch.get("key_mask", batch.get("attention_mask"))
            hooks.run({**moved, "use_cache": False})
    return {name: sums[name] / counts[name] for name in modules}
