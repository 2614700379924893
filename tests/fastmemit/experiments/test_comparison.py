from __future__ import annotations

import math

import pytest

from fastmemit.errors import BadData
from fastmemit.experiments.frame import further_means, measure
from tiny_sweeps import cell, grid, made, record, study


def test_cells_are_grouped_by_all_but_size_and_multiplier() -> None:
    found = measure([*grid(), *study(), cell(seed=1)], resamples=20)
    assert list(found["title"].unique()) == [
        "EMMET",
        "MEMIT",
        "MEMIT, without BOS",
        "MEMIT, relative_ridge=0.01",
        "MEMIT, relative_ridge=0.01, without BOS",
        "MEMIT, shrinkage=oas",
        "MEMIT, shrinkage=oas, without BOS",
        "MEMIT, seed 1",
    ]
    groups = [group for _, group in found.groupby("group")]
    assert set(groups[0]["multiplier"]) == {1, 2, 3, 4, 10, math.inf}
    sizes = groups[0][groups[0]["multiplier"] == 2][["batch_size", "batches", "size"]]
    assert sizes.values.tolist() == [
        [1, 40, "40 batches of 1"], [4, 10, "10 batches of 4"], [16, 5, "5 batches of 16"],
    ]  # fmt: skip
    assert measure([cell(size=(4, 1))], resamples=20)["size"].tolist() == ["1 batch of 4"]
    assert groups[-1]["multiplier"].tolist() == [2.0]


def test_what_is_kept_is_of_the_full_precompute_of_the_same_place() -> None:
    full, half = [record(0, 1.0), record(1, 1.0)], [record(0, 1.0, 1.0, 0.5), record(1, 1.0)]
    found = measure(
        [
            made("memit", None, (1, 2), full),
            made("memit", 2.0, (1, 2), half),
            made("memit", 2.0, (1, 1), half[:1]),  # nothing to compare with
            made("memit", 2.0, (1, 2), half, {"ridge": 1}),  # nor here, but with the preset's
        ],
        resamples=20,
    ).set_index("key")
    kept = {key: share and share.value for key, share in found["kept"].items()}
    assert kept == {
        "memit/b1x2/full": None, "memit/b1x2/x2": 0.75, "memit/b1x1/x2": None, "memit/b1x2/x2+ridge=1": None,
    }  # fmt: skip
    assert found["preset"].to_dict() == {key: "memit/b1x2/x2" if "ridge" in key else None for key in kept}


def _verdict(after: float, worse: tuple[float, float] = (0.0, 0.0), *, n: int = 40) -> str:
    """Of cells whose records lose so much of NA, every one the same."""
    cells = [
        made("memit", m, (1, n), [record(i, 1.0, ea=1.0, pa=0.5, na=na) for i in range(n)], worse=p)
        for m, na, p in ((2.0, after, worse[0]), (None, 0.5, worse[1]))
    ]
    return str(measure(cells, resamples=50)["verdict_full"].iat[0])


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
    row = measure(cells).iloc[0]
    assert row["verdict_full"] == "open: EA" and row["perplexity_over_full"] is None


def test_one_place_under_two_names_is_refused() -> None:
    again = cell()
    again["key"] = "other"
    with pytest.raises(BadData, match="'memit/b4x10/x2' and 'other' have the same"):
        measure([cell(), again], resamples=20)


def test_further_fields_of_a_cell_take_no_column() -> None:
    """A field `run` would make sequences of a sweep."""
    named, plain = cell(), cell()
    named |= {"run": "x", "first": "x", "facts": 3, "group": "x"}
    found = measure([named], resamples=20).drop(columns="facts")
    assert found.equals(measure([plain], resamples=20))


def test_further_metrics_are_averaged_over_the_records_that_have_them() -> None:
    records = [record(i, 1.0) for i in range(3)]
    for found, value in zip(records, (0.5, None, 1.0), strict=True):
        found["after"] |= {"em": value, "ea": 1.0, "text": "words"}
    assert further_means(records) == {"after em": 0.75}
    assert further_means(cell()["records"]) == {}
