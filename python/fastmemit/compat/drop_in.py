"""Functions that other editing codebases call, with their signatures: C in seconds, and whole edits.

Other codebases write into the weights between two calls, inside the layer loop of one edit too, and put them back or do
not. So a model object is identified once, when it is first seen, and everything that belongs to the unedited model
stays that of this moment. What is in the weights at a later moment is read off the weights.
"""

from __future__ import annotations

import copy as copying
import dataclasses
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

import fastcov
from fastcov.files import StrPath
from fastcov.hooks import isolated
from fastcov.linalg import FactorCache, place_of_float64
from fastmemit.compat.hparams import Hparams, device_of, fields_of, multiplier_of, read_hparams, whole_numbers
from fastmemit.compat.npz_files import layers_by_name
from fastmemit.data import Corpus
from fastmemit.data.corpora import open_corpus
from fastmemit.delta import Delta
from fastmemit.editor import shared_name
from fastmemit.edits import Edit, EditStack
from fastmemit.errors import BadConfig, BadCorpus, WrongModel, counted
from fastmemit.files import cache_dir, stored_modules
from fastmemit.methods import PRESERVING, PreservedKeys, Workspace, find_config, run
from fastmemit.models import ModelAdapter, find_adapter
from fastmemit.models.structure import unwrapped
from fastmemit.request import Fact, check_batch
from fastmemit.statistics import AUTO, Collection, Statistics, StatisticsStore
from fastmemit.targets import TargetStore
from fastmemit.text import Contexts, Kind

log = logging.getLogger(__name__)

MULTIPLIER = 10.0
IN_A_ROW = 6  # layers collected together where only the first is known: MEMIT edits five or six in a row
#: The data sets that these codebases name, as the hub has them today.
DATASETS = {"wikipedia": "wikipedia", "wikitext": "hub:Salesforce/wikitext:wikitext-103-raw-v1"}
_PLACE = "_fastmemit_compat"  # in the model's own __dict__, so that both go together


@dataclass(frozen=True)
class Settings:
    """How statistics are come by in this process; see `configure`."""

    #: As for `fastmemit.Editor.precompute`: a file, "self", "builtin", a hub name. None: $FASTMEMIT_CORPUS, else the
    #: newest statistics that are cached of the model, else the data set that the caller names, from the hub.
    corpus: StrPath | Corpus | None = None
    #: None: $FASTMEMIT_MULTIPLIER, else that of the hparams where they are `dynamic`, else 10.
    multiplier: float | Literal["auto"] | None = None
    cache: StrPath | None = None  # for statistics and targets; None: `fastmemit.files.cache_dir`
    layers: tuple[int, ...] | None = None  # collected together, where the caller passes no hparams; see `get_cov`
    max_length: int | None = None  # cut documents at so many tokens
    allow_fewer: bool = False  # take a corpus that ends early for what it has
    field: str = "text"  # of a JSON corpus
    seed: int = 0  # for the contexts and the corpus's order
    progress: bool = False  # show bars


_chosen = Settings()


def configure(**settings: Any) -> Settings:
    """Choose some `Settings` by name; what is not named stays as it is, None brings back the default."""
    global _chosen
    given: dict[str, Any] = {n: getattr(Settings(), n, None) if v is None else v for n, v in settings.items()}
    if given.get("layers") is not None:
        given["layers"] = whole_numbers(given["layers"], "configure")
    if given.get("multiplier") is not None:
        given["multiplier"] = _multiplier(given["multiplier"], "multiplier")
    _chosen = dataclasses.replace(_chosen, **given)
    return _chosen


def _current() -> Settings:
    """The settings that hold now, those of the environment included."""
    found: dict[str, Any] = {}
    if _chosen.corpus is None:
        found["corpus"] = os.environ.get("FASTMEMIT_CORPUS") or None
    if _chosen.multiplier is None and (text := os.environ.get("FASTMEMIT_MULTIPLIER")):
        found["multiplier"] = _multiplier(text, "FASTMEMIT_MULTIPLIER")
    return dataclasses.replace(_chosen, **found)


def _multiplier(value: Any, name: str) -> Any:
    try:
        return AUTO if value == AUTO else float(value)
    except (TypeError, ValueError) as error:
        raise BadConfig(f"{name} must be a number or 'auto' but is {value!r}.") from error


class LiveStack(EditStack):
    """The edits in a model that others edit too, read off the weights.

    Without a `baseline`, the unedited model's fingerprint, the model as it is counts as unedited.
    """

    def __init__(self, model: nn.Module, baseline: str | None) -> None:
        super().__init__(model)
        self._now = self._watch.identify(model)
        self._fingerprint = baseline or self._now
        self.written: list[tuple[str, Edit]] = []  # what the weights were with an edit of ours as the last, and it

    def changed(self) -> list[str]:
        """Nothing: whatever changes the weights is an edit here."""
        return []

    def look(self, weights: Iterable[str] | None = None) -> None:
        """See what is in the weights now: in all, or in these, by their bytes, and in others by what torch counts.

        Torch does not count a write into ``weight.data``. Edits of ours that somebody took back are forgotten, with all
        that came upon them.
        """
        self._now = self._watch.identify(self.model, None if weights is None else set(weights))
        states = [self.fingerprint, *(state for state, _ in self.written)]
        if self._now in states:
            del self.written[states.index(self._now) :]

    def wrote(self, edit: Edit) -> None:
        """Count an edit of ours as being in the weights, as long as they are what they are now."""
        self.look(edit.delta.factors)
        self.written.append((self._now, edit))

    @property
    def edits(self) -> tuple[Edit, ...]:
        """Ours, and one that stands for whatever else was written since the last of them, if anything was.

        A write upon ours does not take them out; to give the weights the bytes back that they had before does.
        """
        ours = tuple(edit for _, edit in self.written)
        known = self.written[-1][0] if ours else self.fingerprint
        return ours if self._now == known else (*ours, Edit(Delta({}, {}), self))

    def holds(self, edit: Edit) -> bool:
        """Whether an edit is one of ours that are in the weights."""
        return any(edit is each for each in self.edits)

    def digests(self) -> list[str]:
        """What the weights are with what is in them, if anything is."""
        return [f"unknown:{self._now}"] if self.edits else []

    def state(self) -> str:
        """What identifies the weights as they were when last looked at."""
        return self._now


class Live:
    """What is remembered of one model object: which it was at first, and its statistics.

    A deep copy of the model has the memory of the original; a pickled one has none.
    """

    def __init__(self) -> None:
        self.baseline: str | None = None
        self._written: dict[Kind, tuple[str, ...]] = {}  # contexts
        self._statistics: Statistics | None = None
        self._matrices = FactorCache()  # in the computer's memory, whatever the device
        self._preserved = PreservedKeys()
        self._inherited: list[tuple[str, Delta, Mapping[str, Sequence[Tensor]]]] = []  # see `_ours`
        # Which model object, its tokenizer and the settings, at the last call.
        self._opened_with: tuple[int | None, Any, Settings] = (None, None, Settings())

    def __deepcopy__(self, memo: dict[int, Any]) -> Live:
        copy = Live()
        copy.baseline, copy._statistics = self.baseline, self._statistics
        copy._written, copy._matrices = dict(self._written), FactorCache(self._matrices)
        copy._inherited = self._ours()
        # Of no object yet: the original's number may be the copy's when the original is gone.
        copy._opened_with = (None, *self._opened_with[1:])
        return copy

    def __reduce__(self) -> Any:
        return (type(None), ())  # None is what is left of it in a file

    def _ours(self) -> list[tuple[str, Delta, Mapping[str, Sequence[Tensor]]]]:
        """Of each edit of ours: what the weights were with it, what it added, and its keys by weight name."""
        if self._opened_with[0] is None:
            return self._inherited
        return [(state, edit.delta, self._preserved.of(edit)) for state, edit in self.stack.written]

    def open(self, model: nn.Module, tokenizer: Any, module: str | None) -> None:
        """Get ready for a call; what was remembered stays where it still holds."""
        settings = _current()
        at, before, last = self._opened_with
        same = before is tokenizer
        if same and (at, last) == (id(model), settings) and module in (None, self.adapter.template):
            return
        if not same or last.seed != settings.seed:
            self._written = {}
        # Layers and bars do not decide on what statistics are of.
        if not same or dataclasses.replace(last, layers=settings.layers, progress=settings.progress) != settings:
            self._statistics = None
            self._matrices.clear()
        self.settings: Settings = settings
        self.tokenizer = tokenizer
        self.adapter: ModelAdapter = find_adapter(model, module)
        if at != id(model):
            ours, self.stack = self._ours(), LiveStack(model, self.baseline)
            self.baseline = self.stack.fingerprint
            for state, delta, keys in ours:
                edit = Edit(delta, self.stack)
                self.stack.written.append((state, edit))
                self._preserved.add(edit, keys)
        self.name = shared_name(str(getattr(model.config, "_name_or_path", "") or "model"))
        folder = cache_dir() if settings.cache is None else Path(settings.cache)
        self.store = StatisticsStore(
            self.adapter, tokenizer, self.stack, folder, name=self.name, seed=settings.seed, progress=settings.progress
        )
        self.workspace = Workspace(
            self.adapter,
            tokenizer,
            self.stack,
            self.store,
            TargetStore(folder / "targets"),
            # As in the other codebases: of the model at the first call that needs them.
            Contexts(model, tokenizer, settings.seed, self._written, any_time=True),
            progress=settings.progress,
            preserved=self._preserved,
        )
        self._opened_with = (id(model), tokenizer, settings)

    def covers(self, layers: Sequence[int]) -> bool:
        """Whether there are statistics of these layers already."""
        names = {self.adapter.projection_name(layer) for layer in layers}
        return self._statistics is not None and names <= self._statistics.paths.keys()

    def cover(
        self, layers: Sequence[int], dataset: str, multiplier: float | None = None, needed: Sequence[int] | None = None
    ) -> None:
        """Have statistics of these layers or those `needed` of the unedited model; WrongModel on an edited one."""
        # The dataset is what the caller would collect them on, the multiplier its d_m where the settings do not say it.
        if self._statistics is not None and self.covers(layers):
            self.store.use(self._statistics)
            return
        wanted = {self.adapter.projection_name(layer) for layer in layers}
        wanted |= set() if self._statistics is None else self._statistics.paths.keys()
        every = [layer for name, layer in layers_by_name(self.adapter).items() if name in wanted]
        self.stack.look()
        found = self._cached(every) or self._cached(layers if needed is None else needed)
        if found is None and self.stack.edits:
            raise WrongModel(
                f"The layers {sorted(needed or layers)} of {self.name} were not among those collected while it was "
                "unedited, and its weights have changed since; name all layers with "
                "fastmemit.compat.configure(layers=[...]), or pass hparams, before the first edit."
            )
        if found is not None:
            log.info("C of %s is a cached one: %s", self.name, found.describe())
        else:
            found = self._collected(every, dataset, multiplier)
        self.store.use(found)
        self._statistics = found
        self._matrices.clear()

    def _cached(self, layers: Sequence[int]) -> Statistics | None:
        """Cached statistics that have some layers, with all others that were collected with them."""
        multiplier = self.settings.multiplier
        if self.settings.corpus is not None or isinstance(multiplier, str):
            if not self.stack.edits:  # to collect on the corpus that was named finds what is there, too
                return None
            multiplier = None if isinstance(multiplier, str) else multiplier
        corpus = None if self.settings.corpus is None else self._corpus(self.settings.corpus).fingerprint
        found = self.store.find(layers, multiplier, corpus=corpus, context=self.settings.max_length)
        if found is None:
            return None
        home = next(iter(found.paths.values())).parent
        return Statistics({name: home / f"{name}.safetensors" for name in stored_modules(home)}, found.provenance)

    def _collected(self, layers: Sequence[int], dataset: str, multiplier: float | None) -> Statistics:
        settings = self.settings
        chosen = settings.multiplier or multiplier or MULTIPLIER
        spec = Collection(
            settings.corpus or DATASETS.get(dataset, ""),
            layers,
            chosen if chosen == AUTO else float(chosen),
            allow_fewer=settings.allow_fewer,
            max_length=settings.max_length,
            field=settings.field,
        )
        self.store.budgets(spec)  # refuses before a corpus is looked for
        if not spec.corpus:
            raise BadCorpus(
                f"The data set {dataset!r} is not known here; name a text with "
                'fastmemit.compat.configure(corpus="FILE.jsonl").'
            )
        try:
            corpus = self._corpus(spec.corpus)
        except BadCorpus as error:
            if settings.corpus is not None:
                raise
            raise BadCorpus(
                f"{str(error).partition(';')[0].rstrip('.')}; name a text of your own with "
                'fastmemit.compat.configure(corpus="FILE.jsonl"), or corpus="self".'
            ) from error
        return self.store.collect(dataclasses.replace(spec, corpus=corpus))

    def _corpus(self, named: StrPath | Corpus) -> Corpus:
        return open_corpus(named, self.adapter.model, self.tokenizer, self.stack.fingerprint, self.settings.field)

    def moment(self, layer: int) -> fastcov.SecondMoment:
        """The moment of a layer that is covered, on the CPU."""
        assert self._statistics is not None
        return self._statistics.moment(self.adapter.projection_name(layer))

    def place(self, layer: int) -> torch.device:
        """Where a layer's weight is, or what it is offloaded from."""
        device = next((p.device for p in self.adapter.projection(layer).parameters()), self.adapter.device)
        return self.adapter.device if device.type == "meta" else device

    @isolated()
    def matrix(
        self, layer: int, *, inverse: bool = False, ridge: float = 0.0, device: torch.device | None = None
    ) -> Tensor:
        """C of a layer that is covered, or the inverse of ``C + ridge I``: float32 (d_k, d_k), the caller's own.

        It is where the weight is, unless a device is named.
        """
        assert self._statistics is not None
        name, device = self.adapter.projection_name(layer), device or self.place(layer)
        kind = (self.adapter.template, inverse, ridge)
        found = self._matrices.get((layer, kind))
        if found is None:
            layers = [i for n, i in layers_by_name(self.adapter).items() if n in self._statistics.paths]
            self._matrices.make_room(layers, kind, torch.device("cpu"), self.adapter.d_k(layer), 3)
            if inverse:
                moment = self._statistics.moment(name).to(place_of_float64(device))
                A = fastcov.regularised(moment, 1.0, ridge)
                found = torch.cholesky_inverse(fastcov.factorize(A, in_place=True).L).float().cpu()
            else:
                found = self._statistics.second_moment(name).float()
        self._matrices[layer, kind] = found
        self._matrices.move_to_end((layer, kind))
        return found.to(device, copy=True)


def live(model: nn.Module, tokenizer: Any, module: str | None) -> Live:
    """What is remembered of a model, ready for a call; `module` is the projection with ``{}`` for the layer."""
    model = unwrapped(model)
    found = model.__dict__.get(_PLACE)
    if not isinstance(found, Live):
        found = Live()
    found.open(model, tokenizer, module)
    model.__dict__[_PLACE] = found
    return found


def forget(model: nn.Module) -> None:
    """Count a model as unedited at the next call; to be called after other weights were loaded into the same object."""
    unwrapped(model).__dict__.pop(_PLACE, None)


@isolated()
def get_cov(
    model: nn.Module,
    tok: Any,
    layer_name: str,
    mom2_dataset: str,
    mom2_n_samples: int | str | None,
    mom2_dtype: str,
    inv: bool = False,
    force_recompute: bool = False,
    hparams: Any = None,
) -> Tensor:
    """The second moment C of a layer's keys, as MEMIT's function of this name returns it.

    It is the mean of ``k k^T`` over 10 d_k tokens, or as `configure` has it, of the model as it was when it was first
    seen: MEMIT asks for the second layer when the first is written already. So all layers that will be asked for are
    collected at the first call, in one pass: those of `hparams`, else those of ``configure(layers=...)``, else those
    that our settings of MEMIT have for this model if the layer is one of them, else the layer and the next five.

    `force_recompute` takes the model as it is now for unedited, and forgets what it was. Of `hparams` the ``layers``,
    ``dynamic_multiplier`` and ``device`` are read; `mom2_n_samples` and `mom2_dtype` are not used, for the number of
    keys is the multiplier's and sums are float32, of products in float32 or wider.

    Returns:
        C, or with `inv` its inverse, float32 (d_k, d_k), on the device that `hparams` name or else the weight's; the
        caller's own. An inverse is made in float64, with a jitter only where there is none without, which is logged.
    """
    if force_recompute:
        forget(model)
    found, layer = covered(model, tok, layer_name, mom2_dataset, hparams)
    return found.matrix(layer, inverse=inv, device=device_of(hparams))


@isolated()
def get_inv_cov(
    model: nn.Module,
    tok: Any,
    layer_name: str,
    mom2_dataset: str,
    mom2_n_samples: int | str | None,
    mom2_dtype: str,
    hparams: Any = None,
) -> Tensor:
    """The inverse of C, as ROME's function of this name returns it: that of `get_cov`.

    Only this layer is collected, where neither `hparams` nor ``configure`` name more.
    """
    found, layer = covered(model, tok, layer_name, mom2_dataset, hparams, alone=True)
    return found.matrix(layer, inverse=True, device=device_of(hparams))


class LayerMoment:
    """What ``layer_stats(...).mom2`` is; `count` is how many keys were summed."""

    def __init__(self, moment: fastcov.SecondMoment) -> None:
        self._moment = moment
        self.count = moment.count

    @property
    def mom2(self) -> Tensor:
        """The sum of ``k k^T``, (d_k, d_k) on the CPU."""
        return self._moment.sum

    def moment(self) -> Tensor:
        """The mean of ``k k^T``, (d_k, d_k) on the CPU."""
        return self._moment.second_moment


@isolated()
def layer_stats(
    model: nn.Module,
    tokenizer: Any,
    layer_name: str,
    stats_dir: StrPath | None,
    ds_name: str,
    to_collect: Sequence[str],
    model_name: str | None = None,
    sample_size: int | None = None,
    precision: str | None = None,
    batch_tokens: int | None = None,
    download: bool = True,
    progress: Any = None,
    force_recompute: bool = False,
    hparams: Any = None,
) -> SimpleNamespace:
    """The statistics of a layer's keys, as ROME's function of this name returns them, ``mom2`` alone; see `get_cov`.

    Files in `stats_dir` are neither read nor written: what is there can be imported once, and what is here exported. Of
    the arguments with a default only `force_recompute` and `hparams` are used.

    Raises:
        BadConfig: Anything else than ``["mom2"]`` shall be collected.
    """
    if list(to_collect) != ["mom2"]:
        raise BadConfig(
            f"Only 'mom2' is collected here but to_collect is {list(to_collect)!r}; use the "
            "original layer_stats for other statistics."
        )
    if force_recompute:
        forget(model)
    found, layer = covered(model, tokenizer, layer_name, ds_name, hparams)
    return SimpleNamespace(mom2=LayerMoment(found.moment(layer)))


def located(model: nn.Module, tokenizer: Any, layer_name: str) -> tuple[Live, int]:
    """The model's memory, and the number of the layer in a projection's name; a BadConfig if there is none in it."""
    names = layer_name.split(".")
    place = next((place for place, part in enumerate(names) if part.isdecimal()), None)
    if place is None:
        raise BadConfig(
            f"The module {layer_name!r} has no layer's number in its name; name one such as "
            '"transformer.h.13.mlp.c_proj".'
        )
    layer = int(names[place])
    found = live(model, tokenizer, ".".join([*names[:place], "{}", *names[place + 1 :]]))
    found.adapter.check_layer(layer)
    return found, layer


def covered(
    model: nn.Module, tokenizer: Any, layer_name: str, dataset: str, hparams: Any, alone: bool = False
) -> tuple[Live, int]:
    """As `located`, with statistics of the layer, which are collected where there are none."""
    found, layer = located(model, tokenizer, layer_name)
    fields = {} if hparams is None else fields_of(hparams)
    if not found.covers([layer]):
        layers = _together(found, layer, fields, alone)
        log.info("the second moments of the layers %s of %s", layers, found.name)
        found.cover(layers, dataset, multiplier_of(fields), needed=[layer])
    return found, layer


def _together(found: Live, layer: int, fields: dict[str, Any], alone: bool) -> list[int]:
    """The layers to collect with one; see `get_cov`."""
    named = fields.get("layers") or found.settings.layers
    if named:
        return sorted({*whole_numbers(named, "hparams"), layer})
    if alone:
        return [layer]
    usual = find_config(found.adapter, "memit")
    if usual.preset != "default" and layer in usual.layers:
        return list(usual.layers)
    return [other for other in found.adapter.layers if layer <= other < layer + IN_A_ROW]


class Applied(NamedTuple):
    """What was written into a model."""

    model: nn.Module
    before: dict[str, Tensor]  # weight name -> the weight before; empty unless asked for
    delta: Delta


def applying(
    method: str, about: str, returned: Callable[[Applied], tuple[Any, ...]] = lambda done: (done.model, done.before)
) -> Callable[..., tuple[Any, ...]]:
    """The function of one method, with a docstring, which returns what `returned` makes of what was written."""

    def apply(
        model: nn.Module,
        tok: Any,
        requests: Fact | Sequence[Fact],
        hparams: Any,
        copy: bool = False,
        return_orig_weights: bool = False,
        cache_template: StrPath | None = None,
        keep_original_weight: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        if kwargs:
            log.info("not used here: %s", ", ".join(sorted(kwargs)))
        theirs = read_hparams(hparams, method)
        batch = check_batch(requests)
        found = _ready(model, tok, theirs)
        if copy:  # with all that is remembered, so that both have the same contexts
            found.workspace.contexts_of(theirs.config.method)
            model = copying.deepcopy(model)
            found = _ready(model, tok, theirs)
        config = find_config(found.adapter, theirs.config)
        found.stack.look(map(found.adapter.weight_name, config.layers))
        made = isolated()(run)(config, found.workspace, batch)
        before = {}
        if return_orig_weights or keep_original_weight:
            weights = dict(model.named_parameters(remove_duplicate=False))
            before = {name: weights[name].detach().clone() for name in made.delta.factors}
        made.delta.add_to(model)
        if config.method in PRESERVING:  # so that the next edit knows its keys
            found.stack.wrote(made)
        log.info("%s written by %s into %s", counted(len(batch), "fact"), method, ", ".join(made.delta.factors))
        return returned(Applied(model, before, made.delta))

    apply.__name__ = apply.__qualname__ = f"apply_{method.replace('-', '_')}_to_model"
    apply.__doc__ = about
    return apply


def _ready(model: nn.Module, tokenizer: Any, theirs: Hparams) -> Live:
    """The model's memory with statistics of the layers to edit."""
    found = live(model, tokenizer, theirs.module)
    theirs.check(found.adapter)
    if theirs.config.needs_statistics:
        found.cover(theirs.config.layers, theirs.dataset, theirs.multiplier)
    return found


apply_memit_to_model = applying(
    "memit",
    """Write facts into a model by MEMIT, as the other codebases' function of this name does.

    C is that of the model when it was first seen (see `get_cov`), so edits may lie one on the other, and weights may be
    put back in between.

    Args:
        model: The model; it is edited in place, or with `copy` a copy of it.
        tok: The model's tokenizer.
        requests: The facts, in the spelling of MEMIT, EasyEdit or FastEdit (see `fastmemit.EditRequest.from_dict`), or
            `EditRequest`.
        hparams: Hyper-parameters of the ROME family, or a `MemitConfig`, whose defaults are then ours, the ridge for
            few keys among them; see `fastmemit.compat.read_hparams`.
        return_orig_weights: Return what the edited weights were before; so does `keep_original_weight`.
        cache_template: Not used, as all else: target vectors are cached by what they depend on.

    Returns:
        The edited model, and weight name -> the weight before, which is empty unless asked for. To copy them back
        undoes the edit bit for bit.

    Raises:
        BadRequest: A request that cannot be carried out, or two that contradict each other.
        BadConfig: Hyper-parameters that cannot be honoured.
        WrongModel: The layers were not collected while the model was unedited.
        BadCorpus: There is no text to collect C on.
    """,
)
apply_emmet_to_model = applying("emmet", "Write facts into a model by EMMET; see `apply_memit_to_model`.")
apply_rome_to_model = applying(
    "rome",
    """Write facts into a model by ROME, one after the other; see `apply_memit_to_model`.

    One key is used everywhere, as in r-ROME; a `RomeConfig` with ``keys="original"`` does as ROME was first released.
    """,
)
apply_r_rome_to_model = applying(
    "r-rome", "Write facts into a model by ROME with r-ROME's keys, one after the other; see `apply_memit_to_model`."
)
apply_alphaedit_to_model = applying(
    "alphaedit",
    """Write facts into a model by AlphaEdit; see `apply_memit_to_model`.

    The keys of its own earlier edits are preserved for as long as the weights hold them: to copy the former weights
    back takes the keys out as well.
    """,
)
