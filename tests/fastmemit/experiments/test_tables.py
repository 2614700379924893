from __future__ import annotations

import csv
import io

import pytest

from fastmemit.experiments.comparison import group_cells
from fastmemit.experiments.paper import NAMES, paper_rows
from fastmemit.experiments.tables import (
    cells_csv,
    cells_table,
    comparison_csv,
    comparison_tables,
    paper_tables,
    summary,
)
from tiny_sweeps import cell, grid, made, record, study


def _rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_a_comparison_has_the_paper_s_shape() -> None:
    full, fast = [record(0, 1.0), record(1, 1.0)], [record(0, 1.0), record(1, 0.0, 0.5, None)]
    groups = group_cells(
        [
            made("memit", None, (1, 2), full),
            made("memit", 2.0, (1, 2), fast),
            made("memit", 2.0, (2, 1), fast, worse=1.5),
        ]
    )
    (table,) = comparison_tables(groups)
    assert table.name == "memit-multiplier-2"
    assert table.title == "MEMIT: multiplier 2 against the full precompute"
    assert [column.flat for column in table.columns] == [
        "batches", "ES full", "ES fast", "PS full", "PS fast", "NS full", "NS fast", "S full",
        "S fast", "S fast / full", "perplexity before", "perplexity full", "perplexity fast",
        "keys",
    ]  # fmt: skip
    first, second = table.rows
    assert first[:9] == (
        "2 batches of 1", "100.00", "50.00", "100.00", "75.00", "100.00", "100.00", "100.00",
        "69.23",
    )  # fmt: skip
    assert first[9].startswith("0.692 [")
    assert first[10:] == ("-", "-", "-", "3,072")
    assert second == (
        "1 batch of 2", "-", "50.00", "-", "75.00", "-", "100.00", "-", "69.23", "-", "36.50", "-",
        "54.75", "3,072",
    )  # fmt: skip
    assert all(len(row) == len(table.columns) for row in table.rows)


def test_a_group_of_one_size_is_one_table_over_multipliers() -> None:
    tables = comparison_tables(group_cells(study(), resamples=20))
    assert len(tables) == 6
    assert tables[0].title == "MEMIT, 2 batches of 16 against the full precompute"
    assert [row[0] for row in tables[0].rows][:4] == ["0.02", "0.1", "0.5", "0.8"]
    assert len({table.name for table in tables}) == 6


def test_what_was_not_run_is_said() -> None:
    (table,) = comparison_tables(group_cells([cell()], resamples=20))
    assert table.note.endswith("The full precompute has not been run.")
    assert comparison_tables(group_cells([cell(multiplier=None)], resamples=20)) == []


def test_the_paper_stands_beside_the_methods_and_multipliers_that_were_run() -> None:
    cells = [cell("emmet", 2.0), cell("memit", 2.0), cell("memit", 0.5), cell("rome", 2.0)]
    tables = paper_tables(group_cells(cells, resamples=20))
    assert [table.title for table in tables] == [
        "The paper's EMMET: multiplier 2",
        "The paper's MEMIT: multiplier 2",
    ]
    gpt2_xl = tables[1].rows[1]
    assert gpt2_xl == (
        "GPT2-XL", "8", "16", "96.25", "100.00", "82.50", "92.19", "78.19", "76.31", "84.98",
        "88.36", "1.040",
    )  # fmt: skip


def test_misprints_of_the_paper_are_marked() -> None:
    (table,) = paper_tables(group_cells([cell("emmet", 1.0)], resamples=20))
    row = next(row for row in table.rows if row[:3] == ("GPT2-XL", "2", "1024"))
    assert row[3:] == (
        "99.32", "86.72", "92.15", "68.25*", "62.68*", "54.11", "81.35", "67.17", "0.826",
    )  # fmt: skip
    assert "* misprinted there" in table.note
    (last,) = paper_tables(group_cells([cell("memit", 10.0)], resamples=20))
    assert "Tables 30 and 31 print the same" in last.note


def test_every_cell_has_its_intervals() -> None:
    chosen = [cell(), cell(multiplier=None), cell("rome", size=(1, 5), perplexity=True)]
    groups = group_cells(chosen)
    table = cells_table(groups)
    assert [row[0] for row in table.rows] == [found["key"] for found in chosen]
    assert [row[1:3] for row in table.rows] == [("3,072", "40"), ("67,000", "40"), ("3,072", "5")]
    found = groups[0].cells[(4, 10)][2.0].after["s"]  # type: ignore[index]
    assert found is not None and found.low < found.value < found.high
    assert table.rows[0][6] == f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"
    assert table.rows[0][8].count(".") == 3 and table.rows[1][8] == "-"
    assert [row[9] for row in table.rows] == ["-", "-", "36.50"]
    assert all(len(row) == len(table.columns) for row in table.rows)


def test_the_csv_has_measured_and_printed_rows_unrounded() -> None:
    groups = group_cells(grid(), resamples=50)
    rows = _rows(comparison_csv(groups, "tiny"))
    measured = [row for row in rows if row["source"] == "measured"]
    assert len(measured) == 2 * 3 * 5
    assert len(rows) - len(measured) == len(paper_rows())
    assert {row["model"] for row in measured} == {"tiny"}
    for row in measured:
        found = cell(
            row["method"], float(row["multiplier"]), (int(row["batch_size"]), int(row["batches"]))
        )
        assert float(row["s_fast"]) == pytest.approx(found["scores"]["s"], abs=1e-9)
        assert float(row["s_ratio_low"]) <= float(row["s_ratio"]) <= float(row["s_ratio_high"])
    printed = next(row for row in rows if row["source"] == "paper, table 2")
    assert {name: float(printed[name]) for name in NAMES} == paper_rows()[0].printed
    wrong = next(row for row in rows if "ps_fast printed as 91.62" in row["note"])
    assert wrong["ps_fast"] == "68.25"


def test_the_csv_of_cells_has_all_that_was_measured() -> None:
    records = [record(i, 1.0) for i in range(4)]
    for found in records:
        found["after"]["ea"] = 0.25
    groups = group_cells([made("memit", None, (2, 2), records, {"ridge": 0.1}, worse=2.0)])
    (row,) = _rows(cells_csv(groups))
    assert row["key"] == "memit/b2x2/full+ridge=0.1" and row["settings"] == '{"ridge": 0.1}'
    assert (row["multiplier"], row["records"], row["ppl_after"]) == ("full", "4", "73.0")
    assert (row["s"], row["s_low"], row["es_before"], row["s_ratio"]) == (
        "100.0",
        "100.0",
        "50.0",
        "",
    )
    assert row["after ea"] == "0.25"


def test_the_summary_has_a_line_for_each_group_and_size() -> None:
    cells = [cell("emmet", 2.0), cell("emmet", None), cell("memit", 0.5, size=(1, 4))]
    lines = summary(group_cells(cells, resamples=20)).splitlines()
    assert lines[0].split() == ["S", "at", "multiplier", "0.5", "2", "full"]
    scores = [found["scores"]["s"] for found in cells]
    assert lines[1].startswith("EMMET, 10 batches of 4")
    assert lines[1].split()[-2:] == [f"{score:.2f}" for score in scores[:2]]
    assert lines[2].split() == ["MEMIT,", "4", "batches", "of", "1", f"{scores[2]:.2f}"]
