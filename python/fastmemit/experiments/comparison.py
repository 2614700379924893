"""Cells put side by side: few keys against the full precompute, multiplier by multiplier.

A group is what one of the paper's figures shows: one method with its settings, over multipliers and batch sizes. Cells
are compared only where all but the multiplier is equal.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, cast

from fastmemit.errors import BadData
from fastmemit.evaluation.perplexity import Perplexity
from fastmemit.experiments.folders import settings_name
from fastmemit.experiments.intervals import (
    PERPLEXITY,
    RESAMPLES,
    SHARES,
    Estimate,
    Kept,
    difference_intervals,
    kept_share,
    score_intervals,
)
from fastmemit.experiments.layout import method_title
from fastmemit.experiments.schema import Cell

#: Quality counts as kept from this share of the full precompute's on, as in the paper's figures,
#: in each of ES, PS, NS, EA, PA, NA and perplexity.
KEPT = 0.95
#: A cell is not worse than another where each score's interval of the difference ends above this
#: many points below zero. One of 64 facts is 1.6 points of EA.
MARGIN = 2.0


class Size(NamedTuple):
    """How many records were edited: batches of a size, each on the unedited weights."""

    batch_size: int
    batches: int

    def __str__(self) -> str:
        return f"{self.batches} batch{'es' if self.batches != 1 else ''} of {self.batch_size}"


@dataclass(frozen=True)
class Against:
    """A cell compared with another one, paired by case.

    Attributes:
        other: The name of the other cell.
        kept: The smallest share of the other's scores and perplexity.
        differences: Each score minus the other's, in points; None where one of them lacks it.
        perplexity: Perplexity after the edits divided by the other's; None where it was not measured. One text has no
            interval.
    """

    other: str
    kept: Kept | None
    differences: Mapping[str, Estimate | None]
    perplexity: float | None

    @property
    def verdict(self) -> str:
        """Which scores are worse by more than the margin, and for which that is open."""
        found = {name: d for name in SHARES if (d := self.differences.get(name)) is not None}
        worse = [name.upper() for name, d in found.items() if d.high < -MARGIN]
        unsure = [name.upper() for name, d in found.items() if d.low < -MARGIN <= d.high]
        if self.perplexity is not None and not self.perplexity * KEPT <= 1:
            worse.append(PERPLEXITY)
        parts = [f"worse: {', '.join(worse)}"] if worse else []
        parts += [f"open: {', '.join(unsure)}"] if unsure else []
        return "; ".join(parts) or ("not worse" if found else "-")


@dataclass(frozen=True)
class Measured:
    """A cell with intervals.

    Attributes:
        cell: As it was stored.
        after: Every score after the edits, in percent; None where there is no such score.
        before: The same of the unedited model.
        full: Against the full precompute; None for the full precompute itself and where it was not run.
        plain: Against the same cell with the settings of the preset; None where there is none.
    """

    cell: Cell
    after: dict[str, Estimate | None]
    before: dict[str, Estimate | None]
    full: Against | None = None
    plain: Against | None = None

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
        method: One of `fastmemit.methods.METHODS`.
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
    known = {(_place(cell), cell["multiplier"]): cell for cell in cells}
    groups: dict[tuple[str, str, bool, int], Group] = {}
    for cell in cells:
        identity = (cell["method"], json.dumps(cell["settings"], sort_keys=True), cell["bos"], cell["seed"])
        fresh = Group(cell["method"], settings_name(cell["settings"]), cell["bos"], cell["seed"])
        row = groups.setdefault(identity, fresh).cells.setdefault(Size(cell["batch_size"], cell["batches"]), {})
        multiplier = cell["multiplier"]
        if multiplier in row:
            raise BadData(
                f"The cells {row[multiplier].cell['key']!r} and {cell['key']!r} have the same "
                "method, settings, batches and multiplier; remove one of them."
            )
        full = None if multiplier is None else known.get((_place(cell), None))
        bare = cast(Cell, {**cell, "settings": {}})
        plain = known.get((_place(bare), multiplier)) if cell["settings"] else None
        row[multiplier] = Measured(
            cell,
            score_intervals(cell["records"], resamples=resamples),
            score_intervals(cell["records"], when="before", resamples=resamples),
            None if full is None else against(cell, full, resamples=resamples),
            None if plain is None else against(cell, plain, resamples=resamples),
        )
    return list(groups.values())


def against(cell: Cell, other: Cell, *, resamples: int = RESAMPLES) -> Against:
    """Compare a cell with another one, on the cases that both have.

    Args:
        cell: The cell that is asked about.
        other: The one that it shall not be worse than.
        resamples: Draws behind every interval.
    """
    costs = [each["perplexity"] for each in (cell, other)]
    pair = None
    if costs[0] is not None and costs[1] is not None:
        pair = costs[0]["after"], costs[1]["after"]
    return Against(
        other["key"],
        kept_share(cell["records"], other["records"], pair, resamples=resamples),
        difference_intervals(cell["records"], other["records"], resamples=resamples),
        None if pair is None else pair[0] / pair[1],
    )


def further_means(cell: Cell) -> dict[str, float]:
    """Means over records of what was measured besides `SHARES`, as ``before NAME``.

    A value that is missing, or no number, in every record has no mean.
    """
    means: dict[str, float] = {}
    for when in ("before", "after"):
        names = {name for record in cell["records"] for name in record[when]} - {*SHARES}
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
