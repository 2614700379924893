"""What is remembered of a model that other code edits: which it was at first, and its statistics.

Other codebases write into the weights between two calls, inside the layer loop of one edit too, and put them back or do
not. So a model object is identified once, when it is first seen, and everything that belongs to the unedited model
stays that of this moment. What is in the weights at a later moment is read off the weights.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastcov
from fastcov.hooks import isolated
from fastcov.sizing import LIMIT
from fastmemit.auto import AUTO, precompute_auto
from fastmemit.cache import cache_dir
from fastmemit.compat.settings import MULTIPLIER, Settings, current
from fastmemit.compat.stack import LiveStack
from fastmemit.contexts import Contexts, Kind
from fastmemit.data.self_written import open_corpus
from fastmemit.errors import BadCorpus, BadLayer, WrongModel
from fastmemit.kept import there
from fastmemit.models import ModelAdapter, find_adapter
from fastmemit.models.structure import unwrapped
from fastmemit.sources import Sources
from fastmemit.statistics import Statistics

log = logging.getLogger(__name__)

CAPACITY = 8 << 30  # bytes of matrices held

#: The data sets that these codebases name, as the hub has them today.
DATASETS = {"wikipedia": "wikipedia", "wikitext": "hub:Salesforce/wikitext:wikitext-103-raw-v1"}

_PLACE = "_fastmemit_compat"  # in the model's own __dict__, so that both go together


class Live:
    """What is remembered of one model object.

    A deep copy of the model is the same model at another place, and its memory is that of the original; a pickled one
    has none.
    """

    def __init__(self) -> None:
        self.baseline: str | None = None
        self._written: dict[Kind, tuple[str, ...]] = {}  # contexts
        self._statistics: Statistics | None = None
        self._matrices: dict[tuple[str, bool], Tensor] = {}
        # Which model object, its tokenizer and the settings, at the last call.
        self._opened_with: tuple[int | None, Any, Settings] = (None, None, Settings())

    def __deepcopy__(self, memo: dict[int, Any]) -> Live:
        copy = Live()
        copy.baseline, copy._statistics = self.baseline, self._statistics
        copy._written, copy._matrices = dict(self._written), dict(self._matrices)
        # Of no object yet: the original's number may be the copy's when the original is gone.
        copy._opened_with = (None, *self._opened_with[1:])
        return copy

    def __reduce__(self) -> Any:
        return (_nothing, ())

    def open(self, model: nn.Module, tokenizer: Any, module: str | None) -> None:
        """Get ready for a call; what was remembered stays where it still holds."""
        settings = current()
        at, before, last = self._opened_with
        same = before is tokenizer
        if same and (at, last) == (id(model), settings) and module in (None, self.adapter.template):
            return
        if not same or last.seed != settings.seed:
            self._written = {}
        if not same or _collecting(last) != _collecting(settings):
            self._statistics = None
            self._matrices.clear()
        self.settings: Settings = settings
        self.tokenizer = tokenizer
        self.adapter: ModelAdapter = find_adapter(model, module)
        self.stack = LiveStack(model, self.baseline)
        self.baseline = self.stack.fingerprint
        name = str(getattr(model.config, "_name_or_path", "") or "model")
        self.name = Path(name).resolve().name if Path(name).is_dir() else name
        self.sources = Sources(
            self.adapter,
            tokenizer,
            self.stack,
            cache_dir() if settings.cache is None else Path(settings.cache),
            name=self.name,
            seed=settings.seed,
            batch_tokens=None,
            progress=settings.progress,
            # As in the other codebases: of the model at the first call that needs them.
            contexts=Contexts(model, tokenizer, settings.seed, lambda: False, self._written),
        )
        self._opened_with = (id(model), tokenizer, settings)

    def has(self, layer: int) -> bool:
        """Whether the model has this layer's projection."""
        try:
            self.adapter.check_layer(layer)
        except BadLayer:
            return False
        return True

    def covers(self, layers: Sequence[int]) -> bool:
        """Whether there are statistics of these layers already."""
        names = {self.adapter.projection_name(layer) for layer in layers}
        return self._statistics is not None and names <= self._statistics.paths.keys()

    def cover(
        self, layers: Sequence[int], dataset: str, multiplier: float | None = None, needed: Sequence[int] | None = None
    ) -> Statistics:
        """Statistics of the unedited model that have these layers.

        Args:
            layers: Which to collect, if they must be collected.
            dataset: What the caller would collect them on.
            multiplier: d_m where the settings do not say it.
            needed: Which there must be; None means all of `layers`.

        Raises:
            WrongModel: They were not collected while the model was unedited, and it is edited now.
            BadCorpus: There is no text to collect them on.
            BadLayer: A layer that the model does not have.
        """
        names = {self.adapter.projection_name(layer) for layer in layers}
        if self._statistics is not None and self.covers(layers):
            self.sources.use(self._statistics)
            return self._statistics
        held = () if self._statistics is None else self._statistics.paths
        wanted = [
            layer
            for layer in range(self.adapter.n_layers)
            if self.adapter.template.replace("{}", str(layer)) in {*names, *held}
        ]
        self.stack.look()
        found = self._kept(wanted) or self._kept(layers if needed is None else needed)
        if found is None and self.stack.edits:
            raise WrongModel(
                f"The layers {sorted(needed or layers)} of {self.name} were not among those "
                "collected while it was unedited, and its weights have changed since; name all "
                "layers with fastmemit.compat.configure(layers=[...]), or pass hparams, before the "
                "first edit."
            )
        if found is not None:
            log.info("C of %s is a kept one: %s", self.name, found.describe())
        else:
            found = self._collected(wanted, dataset, multiplier)
        self.sources.use(found)
        self._statistics = found
        self._matrices.clear()
        return found

    def _kept(self, layers: Sequence[int]) -> Statistics | None:
        """Kept statistics that have some layers, with all others that were collected with them.

        None where they would have to be of a corpus that was named: if they are, nothing is collected a second time
        either.
        """
        multiplier = self.settings.multiplier
        if self.settings.corpus is not None or isinstance(multiplier, str):
            if not self.stack.edits:
                return None
            multiplier = None if isinstance(multiplier, str) else multiplier
        found = self.sources.find(layers, multiplier)
        if found is None:
            return None
        home = next(iter(found.paths.values())).parent
        paths = {name: home / f"{name}.safetensors" for name in there(home)}
        return Statistics(paths, found.provenance)

    def _collected(self, layers: Sequence[int], dataset: str, multiplier: float | None) -> Statistics:
        settings = self.settings
        chosen = settings.multiplier or multiplier or MULTIPLIER
        most = LIMIT if chosen == AUTO else float(chosen)
        self.sources.largest_budget(layers, most)  # refuses before a corpus is looked for
        spec = settings.corpus
        if spec is None:
            spec = DATASETS.get(dataset)
        if spec is None:
            raise BadCorpus(
                f"The data set {dataset!r} is not known here; name a text with "
                'fastmemit.compat.configure(corpus="FILE.jsonl").'
            )
        try:
            corpus = open_corpus(spec, self.adapter.model, self.tokenizer, self.stack.fingerprint, settings.field)
        except BadCorpus as error:
            if settings.corpus is not None:
                raise
            raise BadCorpus(
                f"{str(error).partition(';')[0].rstrip('.')}; name a text of your own with "
                'fastmemit.compat.configure(corpus="FILE.jsonl"), or corpus="self".'
            ) from error
        collect = precompute_auto if chosen == AUTO else Sources.precompute
        return collect(self.sources, corpus, list(layers), most, settings.allow_fewer, settings.max_length)

    def moment(self, layer: int) -> fastcov.SecondMoment:
        """The moment of a layer that is covered, on the CPU."""
        assert self._statistics is not None
        return self._statistics.moment(self.adapter.projection_name(layer))

    @isolated()
    def matrix(self, layer: int, *, inverse: bool = False) -> Tensor:
        """C of a layer that is covered, or its inverse: float32 (d_k, d_k) on the CPU, not a copy.

        Raises:
            fastcov.NotPositiveDefinite: C has no inverse, with any jitter that is allowed.
        """
        assert self._statistics is not None
        key = (self.adapter.projection_name(layer), inverse)
        if key not in self._matrices:
            C = self._statistics.second_moment(key[0])
            if inverse:
                device = self.place(layer)
                # Apple's GPUs have no float64.
                place = torch.device("cpu") if device.type == "mps" else device
                factor = fastcov.factorize(C.to(place).double(), in_place=True)
                C = torch.cholesky_inverse(factor.L)
            self._matrices[key] = C.float().cpu()
        self._matrices[key] = self._matrices.pop(key)  # the last one used
        while len(self._matrices) > 1 and self._bytes() > CAPACITY:
            del self._matrices[next(iter(self._matrices))]
        return self._matrices[key]

    def place(self, layer: int) -> torch.device:
        """Where a layer's weight is, or where its input will be."""
        device = next((p.device for p in self.adapter.projection(layer).parameters()), None)
        return self.adapter.device if device is None or device.type == "meta" else device

    def _bytes(self) -> int:
        return sum(matrix.numel() * matrix.element_size() for matrix in self._matrices.values())


def live(model: nn.Module, tokenizer: Any, module: str | None) -> Live:
    """What is remembered of a model, ready for a call; one that was never seen is unedited.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        module: The edited projection with ``{}`` for the layer; None finds it.

    Raises:
        UnknownArchitecture: The model has no such projection.
    """
    model = unwrapped(model)
    found = model.__dict__.get(_PLACE)
    if not isinstance(found, Live):
        found = Live()
    found.open(model, tokenizer, module)
    model.__dict__[_PLACE] = found
    return found


def forget(model: nn.Module) -> None:
    """Forget a model: it counts as unedited, as it is, at the next call.

    To be called after other weights were loaded into the same object.
    """
    unwrapped(model).__dict__.pop(_PLACE, None)


def _collecting(settings: Settings) -> Settings:
    """The settings that decide on what statistics are of."""
    return dataclasses.replace(settings, layers=None, progress=False)


def _nothing() -> None:
    """What is left of a memory in a file."""
