"""The paper's own numbers: Tables 2 to 31 of arXiv 2506.04226, kept in ``paper.csv``.

The file has the values as they are printed. Some rows contradict themselves or one another: S is not the harmonic mean
of its columns, or a baseline differs between tables that share it. Where the right value follows from the others it
stands in the column ``corrected``, and is used; where it does not, the column ``note`` says what is wrong.
"""

from __future__ import annotations

import csv
import functools
from dataclasses import dataclass
from importlib.resources import files

NAMES = tuple(f"{score}_{side}" for score in ("es", "ps", "ns", "s") for side in ("full", "fast"))


@dataclass(frozen=True)
class PaperRow:
    """One row of a table: one batch size of one model, method and multiplier.

    Attributes:
        table: Its number in the paper.
        model: "GPT2-XL", "GPT-J" or "Llama-2-7B".
        method: "emmet" or "memit".
        multiplier: d_m of the fast columns.
        batch_size: Records edited together.
        printed: "es_full" to "s_fast", in percent, as printed.
        corrected: Those of them that are misprinted, as they must be.
        note: What else is doubtful; "" for nothing.
    """

    table: int
    model: str
    method: str
    multiplier: float
    batch_size: int
    printed: dict[str, float]
    corrected: dict[str, float]
    note: str

    def value(self, name: str) -> float:
        """The value of a column, corrected where it is misprinted."""
        return self.corrected.get(name, self.printed[name])


@functools.cache
def paper_rows() -> tuple[PaperRow, ...]:
    """All 150 rows, in the order of the paper."""
    text = (files("fastmemit.experiments") / "paper.csv").read_text(encoding="utf-8")
    return tuple(
        PaperRow(
            int(row["table"]),
            row["model"],
            row["method"],
            float(row["multiplier"]),
            int(row["batch_size"]),
            {name: float(row[name]) for name in NAMES},
            _corrections(row["corrected"]),
            row["note"],
        )
        for row in csv.DictReader(text.splitlines())
    )


def rows_for(method: str, multiplier: float) -> list[PaperRow]:
    """The rows of one method and multiplier, of all three models; none where the paper has none."""
    return [row for row in paper_rows() if (row.method, row.multiplier) == (method, multiplier)]


def _corrections(text: str) -> dict[str, float]:
    pairs = (item.partition("=") for item in text.split(";") if item)
    return {name: float(value) for name, _, value in pairs}
