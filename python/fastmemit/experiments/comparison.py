"""Cells put side by side: few keys against the full precompute, multiplier by multiplier.

A group is what one of the paper's figures shows: one method with its settings, over multipliers and
batch sizes. Cells are compared only where all but the multiplier is equal.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from fastmemit.errors import BadData
from fastmemit.experiments.folders import settings_name
from fastmemit.experiments.intervals import (
    RESAMPLES,
    Estimate,
    ratio_interval,
    score_intervals,
)
from fastmemit.experiments.layout import method_title
from fastmemit.experiments.schema import Cell, Perplexity

#: Quality counts as kept from this share of the full precompute's on, as in the paper's figures.
KEPT = 0.95


class Size(NamedTuple):
    """How many records were edited: batches of a size, each on the unedited weights."""

    batch_size: int
    batches: int

    def __str__(self) -> str:
        return f"{self.batches} batch{'es' if self.batches != 1 else ''} of {self.batch_size}"


@dataclass(frozen=True)
class Measured:
    """A cell with intervals.

    Attributes:
        cell: As it was stored.
        after: ES, PS, NS and S after the edits, in percent; None where there is no such score.
        before: The same of the unedited model.
        ratio: S divided by the S of the full precompute, paired by case; None for the full
            precompute itself and where there is none.
    """

    cell: Cell
    after: dict[str, Estimate | None]
    before: dict[str, Estimate | None]
    ratio: Estimate | None

    @property
    def size(self) -> Size:
        """Batch size and number of batches."""
        return Size(self.cell["batch_size"], self.cell["batches"])

    @property
    def perplexity(self) -> Perplexity | None:
        """Perplexity before and after, where it was measured."""
        return self.cell["perplexity"]


@dataclass(frozen=True)
class Group:
    """One method with its settings.

    Attributes:
        method: One of `fastmemit.editors.METHODS`.
        settings: The overrides, as ``name=value``; "" where there are none.
        bos: Whether the first position of a document is a key.
        seed: Of the corpus' order.
        cells: By size, then by multiplier (None: the full precompute).
    """

    method: str
    settings: str
    bos: bool
    seed: int
    cells: dict[Size, dict[float | None, Measured]] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """``MEMIT, relative_ridge=0.01, without BOS, seed 1``."""
        return ", ".join([method_title(self.method), *([self.variant] if self.variant else [])])

    @property
    def variant(self) -> str:
        """What tells the group from the plain one of its method; "" for that one."""
        parts = [self.settings, "" if self.bos else "without BOS"]
        parts.append(f"seed {self.seed}" if self.seed else "")
        return ", ".join(part for part in parts if part)

    @property
    def multipliers(self) -> list[float]:
        """The multipliers of any size, ascending, without the full precompute."""
        found = {m for row in self.cells.values() for m in row if m is not None}
        return sorted(found)

    @property
    def has_full(self) -> bool:
        """Whether the full precompute was run for any size."""
        return any(None in row for row in self.cells.values())

    def row(self, multiplier: float | None) -> list[Measured]:
        """The cells of one multiplier, ordered by size."""
        return [row[multiplier] for _, row in sorted(self.cells.items()) if multiplier in row]


def group_cells(cells: Sequence[Cell], *, resamples: int = RESAMPLES) -> list[Group]:
    """Sort cells into groups and work out every interval.

    Args:
        cells: Of one model, as ``folders.collect`` gives them; their order is kept.
        resamples: Draws behind every interval.

    Raises:
        BadData: Two cells stand in the same place under different names.
    """
    full = {_place(cell): cell for cell in cells if cell["multiplier"] is None}
    groups: dict[tuple[str, str, bool, int], Group] = {}
    for cell in cells:
        identity = (
            cell["method"],
            json.dumps(cell["settings"], sort_keys=True),
            cell["bos"],
            cell["seed"],
        )
        fresh = Group(cell["method"], settings_name(cell["settings"]), cell["bos"], cell["seed"])
        row = groups.setdefault(identity, fresh).cells.setdefault(
            Size(cell["batch_size"], cell["batches"]), {}
        )
        multiplier = cell["multiplier"]
        if multiplier in row:
            raise BadData(
                f"The cells {row[multiplier].cell['key']!r} and {cell['key']!r} have the same "
                "method, settings, batches and multiplier; remove one of them."
            )
        other = None if multiplier is None else full.get(_place(cell))
        ratio = other and ratio_interval(cell["records"], other["records"], resamples=resamples)
        row[multiplier] = Measured(
            cell,
            score_intervals(cell["records"], resamples=resamples),
            score_intervals(cell["records"], when="before", resamples=resamples),
            ratio or None,
        )
    return list(groups.values())


def further_means(cell: Cell) -> dict[str, float]:
    """Means over records of what was measured besides ES, PS and NS, as ``before NAME``.

    A value that is missing, or no number, in every record has no mean.
    """
    means: dict[str, float] = {}
    for when in ("before", "after"):
        names = {name for record in cell["records"] for name in record[when]} - {"es", "ps", "ns"}
        for name in sorted(names):
            found = [record[when].get(name) for record in cell["records"]]
            numbers = [value for value in found if isinstance(value, (int, float))]
            if numbers:
                means[f"{when} {name}"] = math.fsum(numbers) / len(numbers)
    return means


def _place(cell: Cell) -> tuple[object, ...]:
    """Where a cell stands but for its multiplier."""
    return (
        cell["method"],
        json.dumps(cell["settings"], sort_keys=True),
        cell["bos"],
        cell["seed"],
        cell["batch_size"],
        cell["batches"],
    )
