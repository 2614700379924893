from __future__ import annotations

import pytest

from fastmemit.errors import BadData
from fastmemit.experiments.comparison import Group, Size, further_means, group_cells
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


def _ratios(group: Group) -> dict[tuple[int, float | None], float | None]:
    return {
        (size.batches, multiplier): found.ratio.value if found.ratio else None
        for size, row in group.cells.items()
        for multiplier, found in row.items()
    }


def test_a_ratio_is_to_the_full_precompute_of_the_same_place() -> None:
    full, half = [record(0, 1.0), record(1, 1.0)], [record(0, 1.0, 1.0, 0.5), record(1, 1.0)]
    (group, other) = group_cells(
        [
            made("memit", None, (1, 2), full),
            made("memit", 2.0, (1, 2), half),
            made("memit", 2.0, (1, 1), half[:1]),  # nothing to compare with
            made("memit", 2.0, (1, 2), half, {"ridge": 1}),  # nor here
        ],
        resamples=20,
    )
    assert _ratios(group) == {(2, None): None, (2, 2.0): pytest.approx(2.7 / 3), (1, 2.0): None}
    assert _ratios(other) == {(2, 2.0): None}


def test_one_place_under_two_names_is_refused() -> None:
    again = cell()
    again["key"] = "other"
    with pytest.raises(BadData, match="'memit/b4x10/x2' and 'other' have the same"):
        group_cells([cell(), again], resamples=20)


def test_further_metrics_are_averaged_over_the_records_that_have_them() -> None:
    records = [record(i, 1.0) for i in range(3)]
    for found, value in zip(records, (0.5, None, 1.0), strict=True):
        found["after"] |= {"ea": value, "text": "words"}
    assert further_means(made("memit", 2.0, (1, 3), records)) == {"after ea": 0.75}
    assert further_means(cell()) == {}
