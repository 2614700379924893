"""Indirect effects of restored states, for many facts at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fastcov.mode import evaluation_mode, isolated
from fastmemit.errors import BadRequest, FastmemitError
from fastmemit.models import ModelAdapter
from fastmemit.tracing.facts import GROUPS, TracedFact
from fastmemit.tracing.noise import subject_embeddings, subject_noise
from fastmemit.tracing.runs import Runs, Spot, check_tracing
from fastmemit.tracing.settings import Kind, TraceSettings, window_at


class NonFiniteProbability(FastmemitError):
    """A model that gives NaN or infinity, so that no effect can be told."""


@dataclass(frozen=True)
class Trace:
    """What a trace found.

    Attributes:
        facts: The n facts that were traced.
        windows: How many layers were restored together, by kind.
        std: Standard deviation of the noise.
        clean: (n,) probability of the answer, float64.
        corrupted: (n,) the same with the subject hidden, averaged over noise samples.
        effects: kind -> group -> (facts that have such a token, layers): probability of the answer with the state
            restored less that of the corrupted run, averaged over noise samples, and
            over the group's tokens within a fact.  Every fact has ``"last subject"``.
    """

    facts: tuple[TracedFact, ...]
    windows: dict[Kind, int]
    std: float
    clean: NDArray[np.float64]
    corrupted: NDArray[np.float64]
    effects: dict[Kind, dict[str, NDArray[np.float64]]]


class _Place(NamedTuple):
    """A token of a fact at which states are restored."""

    number: int
    fact: TracedFact
    position: int
    group: str

    @property
    def shape(self) -> tuple[int, int]:
        """Tokens from the restored one on, and tokens before it."""
        return len(self.fact.ids) - self.position, self.position


@isolated()
def trace(
    adapter: ModelAdapter,
    facts: Sequence[TracedFact],
    settings: TraceSettings,
    *,
    progress: Callable[[int], None] | None = None,
) -> Trace:
    """Trace facts (ROME, section 2.1): hide the subject, put one state back, see what returns.

    The indirect effect of a state is ``p(answer | restored) - p(answer | corrupted)``, where p is the probability of
    the answer's first token after the prompt.

    Args:
        adapter: The model.
        facts: From `choose_facts`.
        settings: How.
        progress: Called with the number of states restored since the last call; there are `count_states`.

    Raises:
        BadRequest: There is no fact.
        BadConfig: A window is more than the model's layers.
        UnknownArchitecture: The model's attention cannot be told, or part of the model does not stand for the whole.
        NonFiniteProbability: The model gives NaN or infinity.
    """
    if not facts:
        raise BadRequest("There is no fact to trace; give at least one.")
    layers = range(adapter.n_layers)
    windows = {kind: settings.window_of(kind, adapter.n_layers) for kind in settings.kinds}
    places = _places(facts, settings)
    clean, corrupted = np.zeros(len(facts)), np.zeros(len(facts))
    found = {kind: np.zeros((len(places), len(layers))) for kind in windows}
    with evaluation_mode(adapter.model):
        check_tracing(adapter)
        embedding_std, width = subject_embeddings(adapter, facts)
        std = settings.noise * embedding_std
        noise = partial(subject_noise, samples=settings.samples, width=width, std=std, seed=settings.seed)
        for batch in _batches(places, settings.samples, settings.tokens_on(adapter.device)):
            spots = [
                Spot(place.fact, place.position, noise(place.fact)) for place in (places[index] for index in batch)
            ]
            runs = Runs(adapter, spots, settings.kinds)
            numbers = [places[index].number for index in batch]
            clean[numbers] = _finite(runs.clean, "the clean run", spots)
            base = _finite(runs.corrupted, "the corrupted run", spots).mean(1)
            corrupted[numbers] = base
            for kind, window in windows.items():
                for layer in layers:
                    restored = runs.restored(kind, *window_at(layer, window, len(layers)))
                    what = f"the run with {kind} restored at layer {layer}"
                    found[kind][batch, layer] = _finite(restored, what, spots).mean(1) - base
                    if progress is not None:
                        progress(len(batch))
    effects = {kind: _grouped(places, values) for kind, values in found.items()}
    return Trace(tuple(facts), windows, std, clean, corrupted, effects)


def count_states(adapter: ModelAdapter, facts: Sequence[TracedFact], settings: TraceSettings) -> int:
    """How many states `trace` restores, each for all noise samples."""
    return len(_places(facts, settings)) * adapter.n_layers * len(settings.kinds)


def _places(facts: Sequence[TracedFact], settings: TraceSettings) -> list[_Place]:
    return [
        _Place(number, fact, position, group)
        for number, fact in enumerate(facts)
        for position, group in fact.groups().items()
        if settings.positions == "all" or group == "last subject"
    ]


def _batches(places: Sequence[_Place], samples: int, batch_tokens: int) -> Iterator[list[int]]:
    """Indices of places that run together.

    From the restored token on they are equally long, because these tokens run for every state and padding would too;
    the tokens before it run once.
    """
    batch: list[int] = []
    for index in sorted(range(len(places)), key=lambda index: places[index].shape):
        suffix, before = places[index].shape  # `before` grows within a suffix
        if batch and (
            places[batch[0]].shape[0] != suffix or (len(batch) + 1) * samples * (before + suffix) > batch_tokens
        ):
            yield batch
            batch = []
        batch.append(index)
    yield batch


def _finite(values: Tensor, what: str, spots: Sequence[Spot]) -> NDArray[np.float64]:
    """Probabilities as float64.

    Raises:
        NonFiniteProbability: One of them is NaN or infinite.
    """
    found = values.double().numpy()
    for spot, row in zip(spots, found, strict=True):
        if not np.isfinite(row).all():
            raise NonFiniteProbability(
                f"The probability of {spot.fact.request.target_true!r} after "
                f"{spot.fact.request.text!r:.80} is not finite in {what}; load the model with "
                "--dtype float32, or check its weights."
            )
    return found


def _grouped(places: Sequence[_Place], values: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """Averages over each fact's tokens of a group; groups that no fact has are left out."""
    grouped = {}
    for group in GROUPS:
        rows: dict[int, list[int]] = {}
        for index, place in enumerate(places):
            if place.group == group:
                rows.setdefault(place.number, []).append(index)
        if rows:
            grouped[group] = np.stack([values[indices].mean(0) for indices in rows.values()])
    return grouped
