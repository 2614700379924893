from __future__ import annotations

import pytest

from fastmemit.errors import BadData
from fastmemit.experiments.tables import Group, Size, against, further_means, group_cells
from tiny_sweeps import cell, grid, made, record, study


def test_cells_are_grouped_by_all_but_size_and_multiplier() -> None:
    groups = group_cells([*grid(), *study(), cell(seed=1)], resamples=20)
    assert [group.title for group in groups] == [
        "EMMET",
        "MEMIT",
        "MEMIT, without BOS",
        "MEMIT, relative_ridge=0.01",
        "MEMIT, relative_ridge=0.01, without BOS",
        "MEMIT, shrinkage=oas",
        "MEMIT, shrinkage=oas, without BOS",
        "MEMIT, seed 1",
    ]
    assert groups[0].multipliers == [1, 2, 3, 4, 10] and groups[0].has_full
    assert [found.size for found in groups[0].row(2.0)] == [(1, 40), (4, 10), (16, 5)]
    assert str(Size(4, 10)) == "10 batches of 4" and str(Size(4, 1)) == "1 batch of 4"
    assert groups[-1].multipliers == [2.0] and not groups[-1].has_full


def _shares(group: Group) -> dict[tuple[int, float | None], float | None]:
    return {
        (size.batches, multiplier): found.full.kept.share.value if found.full and found.full.kept else None
        for size, row in group.cells.items()
        for multiplier, found in row.items()
    }


def test_what_is_kept_is_of_the_full_precompute_of_the_same_place() -> None:
    full, half = [record(0, 1.0), record(1, 1.0)], [record(0, 1.0, 1.0, 0.5), record(1, 1.0)]
    (group, other) = group_cells(
        [
            made("memit", None, (1, 2), full),
            made("memit", 2.0, (1, 2), half),
            made("memit", 2.0, (1, 1), half[:1]),  # nothing to compare with
            made("memit", 2.0, (1, 2), half, {"ridge": 1}),  # nor here, but with the preset's
        ],
        resamples=20,
    )
    assert _shares(group) == {(2, None): None, (2, 2.0): 0.75, (1, 2.0): None}
    assert _shares(other) == {(2, 2.0): None}
    plain = other.cells[Size(1, 2)][2.0].plain
    assert plain is not None and plain.other == "memit/b1x2/x2"
    assert all(found.plain is None for row in group.cells.values() for found in row.values())


def _verdict(after: float, worse: tuple[float, float] = (0.0, 0.0), *, n: int = 40) -> str:
    """Of cells whose records lose so much of NA, every one the same."""
    fast, full = (
        made("memit", m, (1, n), [record(i, 1.0, ea=1.0, pa=0.5, na=na) for i in range(n)], worse=p)
        for m, na, p in ((2.0, after, worse[0]), (None, 0.5, worse[1]))
    )
    return against(fast, full, resamples=50).verdict


def test_the_verdict_is_by_the_paired_interval_and_the_margin() -> None:
    assert _verdict(0.5) == _verdict(0.485) == _verdict(0.9) == "not worse"
    assert _verdict(0.475) == "worse: NA"
    assert _verdict(0.5, (1.05, 1.0)) == "not worse"
    assert _verdict(0.5, (1.06, 1.0)) == "worse: perplexity"
    assert _verdict(0.475, (float("inf"), 1.0)) == "worse: NA, perplexity"
    assert _verdict(0.5, (float("inf"), float("inf"))) == "worse: perplexity", "broken, both"
    # One of forty records is lost: -2.5 points with an interval that reaches to both sides of -2.
    full = [record(i, 1.0, ea=1.0) for i in range(40)]
    fast = [record(i, 1.0, ea=float(i > 0)) for i in range(40)]
    cells = [made("memit", m, (1, 40), found) for m, found in ((2.0, fast), (None, full))]
    assert against(*cells).verdict == "open: EA"
    assert against(*cells).perplexity is None


def test_one_place_under_two_names_is_refused() -> None:
    again = cell()
    again["key"] = "other"
    with pytest.raises(BadData, match="'memit/b4x10/x2' and 'other' have the same"):
        group_cells([cell(), again], resamples=20)


def test_further_metrics_are_averaged_over_the_records_that_have_them() -> None:
    records = [record(i, 1.0) for i in range(3)]
    for found, value in zip(records, (0.5, None, 1.0), strict=True):
        found["after"] |= {"em": value, "ea": 1.0, "text": "words"}
    assert further_means(made("memit", 2.0, (1, 3), records)) == {"after em": 0.75}
    assert further_means(cell()) == {}
