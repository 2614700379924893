"""Scores as a table that a person reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

SCORES = ("es", "ps", "ns", "s")


def score_table(rows: Mapping[str, Mapping[str, Any]], names: Sequence[str] = SCORES) -> str:
    """One line per row with the scores that are named; a dash where a score does not exist."""
    width = max(len(name) for name in rows)
    lines = [" " * width + "".join(f"{name.upper():>8}" for name in names)]
    for label, scores in rows.items():
        cells = (f"{scores[n]:8.2f}" if scores[n] is not None else f"{'-':>8}" for n in names)
        lines.append(f"{label:<{width}}" + "".join(cells))
    return "\n".join(lines)
