"""The result file of a trace, field by field (``fastmemit locate --json``)."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any, TypedDict

from fastmemit.tracing.averages import average
from fastmemit.tracing.proposal import Proposal
from fastmemit.tracing.settings import Kind
from fastmemit.tracing.trace import Trace


class Effect(TypedDict):
    """An averaged indirect effect per layer: a difference of probabilities, in [-1, 1]."""

    facts: int  # how many were averaged
    mean: list[float]
    low: list[float] | None  # 95 % bootstrap interval over facts; null for a single fact
    high: list[float] | None


class TracedRecord(TypedDict):
    """One fact: probabilities of the first token of its true answer."""

    prompt: str
    subject: str
    answer: str
    clean: float
    corrupted: float  # averaged over noise samples


class ProposedLayers(TypedDict):
    """Layers to edit."""

    peak: int  # ROME's and EMMET's
    layers: list[int]  # MEMIT's
    low: int  # 95 % interval of the peak's place
    high: int


class Located(TypedDict):
    """Everything that a trace found."""

    facts: int
    looked_at: int  # how many the model was asked about to find them; the rest it does not know
    clean: Effect  # lists of one value
    corrupted: Effect
    windows: dict[Kind, int]
    noise_std: float  # of what was added to the subjects' embeddings
    effects: dict[Kind, dict[str, Effect]]  # kind -> group of positions
    proposal: ProposedLayers | None  # null where no effect was found, or no MLP was traced
    records: list[TracedRecord]
    settings: dict[str, Any]
    seconds: float  # of the trace, without loading the model
    versions: dict[str, str]
    hardware: dict[str, Any]
    command: str


def located(
    found: Trace,
    looked_at: int,
    proposal: Proposal | None,
    *,
    seed: int,
    settings: dict[str, Any],
    seconds: float,
    versions: dict[str, str],
    hardware: dict[str, Any],
    command: Sequence[str],
) -> Located:
    """The file's content.

    Args:
        found: The trace.
        looked_at: How many facts were looked at to find those traced.
        proposal: The layers, or None.
        seed: Of the intervals.
        settings: What to write down as the settings.
        seconds: What the trace took.
        versions: Of the libraries.
        hardware: The machine.
        command: The words of the command line.
    """
    layers = None
    if proposal is not None:
        layers = ProposedLayers(peak=proposal.peak, layers=list(proposal.layers), low=proposal.low, high=proposal.high)
    return Located(
        facts=len(found.facts),
        looked_at=looked_at,
        clean=_effect(found.clean[:, None], seed),
        corrupted=_effect(found.corrupted[:, None], seed),
        windows=found.windows,
        noise_std=found.std,
        effects={
            kind: {group: _effect(values, seed) for group, values in groups.items()}
            for kind, groups in found.effects.items()
        },
        proposal=layers,
        records=[
            TracedRecord(
                prompt=fact.request.prompt,
                subject=fact.request.subject,
                answer=str(fact.request.target_true),
                clean=float(clean),
                corrupted=float(corrupted),
            )
            for fact, clean, corrupted in zip(found.facts, found.clean, found.corrupted, strict=True)
        ],
        settings=settings,
        seconds=round(seconds, 1),
        versions=versions,
        hardware=hardware,
        command=shlex.join(command),
    )


def _effect(values: Any, seed: int) -> Effect:
    found = average(values, seed)
    return Effect(
        facts=found.count,
        mean=found.mean.tolist(),
        low=None if found.low is None else found.low.tolist(),
        high=None if found.high is None else found.high.tolist(),
    )
