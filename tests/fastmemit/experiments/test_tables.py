from __future__ import annotations

import csv
import io

import pytest

from fastmemit.experiments.frame import answers, measure, summary
from fastmemit.experiments.tables import (
    NAMES,
    _csv_cell,
    cells_csv,
    cells_table,
    comparison_csv,
    comparison_tables,
    difference_tables,
    paper_rows,
    paper_tables,
)
from tiny_sweeps import cell, grid, made, record, study


def _rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_a_comparison_has_the_paper_s_shape_and_what_the_paper_leaves_out() -> None:
    full = [record(0, 1.0, ea=1.0), record(1, 1.0, ea=1.0)]
    fast = [record(0, 1.0, ea=0.0), record(1, 0.0, 0.5, None, ea=0.0)]
    groups = measure(
        [
            made("memit", None, (1, 2), full),
            made("memit", 2.0, (1, 2), fast),
            made("memit", 2.0, (2, 1), fast, worse=1.5),
        ]
    )
    (table,) = comparison_tables(groups)
    assert table.name == "memit-multiplier-2"
    assert table.title == "MEMIT: multiplier 2 against the full precompute"
    assert [f"{column.over} {column.name}".strip() for column in table.columns] == [
        "batches", "ES full", "ES fast", "PS full", "PS fast", "NS full", "NS fast", "S full",
        "S fast", "EA full", "EA fast", "PA full", "PA fast", "NA full", "NA fast",
        "perplexity before", "perplexity full", "perplexity fast", "least share of full", "keys",
    ]  # fmt: skip
    first, second = table.rows
    assert first == (
        "2 batches of 1", "100.00", "50.00", "100.00", "75.00", "100.00", "100.00", "100.00",
        "69.23", "100.00", "0.00", "-", "-", "-", "-", "-", "-", "-", "0.000 (EA) [0.000, 0.000]",
        "3,072",
    )  # fmt: skip
    assert second == (
        "1 batch of 2", "-", "50.00", "-", "75.00", "-", "100.00", "-", "69.23", "-", "0.00", "-",
        "-", "-", "-", "36.50", "-", "54.75", "-", "3,072",
    )  # fmt: skip
    assert "0.95 counts as kept" in table.note


def test_differences_are_paired_and_judged() -> None:
    full = [record(i, 1.0, 1.0, 0.8, ea=1.0, pa=0.5, na=0.1) for i in range(4)]
    fast = [record(i, 1.0, 1.0, 0.7, ea=1.0, pa=0.5, na=0.1) for i in range(4)]
    tables = difference_tables(
        measure(
            [
                made("memit", None, (2, 2), full, worse=1.0),
                made("memit", 2.0, (2, 2), fast, worse=1.5),
                made("memit", 2.0, (2, 2), full, {"ridge": 0.1}),
            ],
            resamples=50,
        )
    )
    assert [table.title for table in tables] == [
        "Against the full precompute, paired",
        "Against the settings of the preset",
    ]
    ((name, other, *values),) = tables[0].rows
    assert (name, other) == ("memit/b2x2/x2", "memit/b2x2/full")
    same = "+0.0 [+0.0, +0.0]"
    assert values[:3] == [same, same, "-10.0 [-10.0, -10.0]"] and values[4:7] == [same] * 3
    assert values[7:] == ["1.50", "worse: NS, perplexity"]
    ((name, other, *values),) = tables[1].rows
    assert (name, other) == ("memit/b2x2/x2+ridge=0.1", "memit/b2x2/x2")
    assert values[2] == "+10.0 [+10.0, +10.0]" and values[-1] == "not worse"
    assert "lower than 2 points below zero" in tables[0].note and "1.05 times" in tables[0].note
    assert difference_tables(measure([cell()], resamples=20)) == []


def test_a_group_of_one_size_is_one_table_over_multipliers() -> None:
    tables = comparison_tables(measure(study(), resamples=20))
    assert len(tables) == 6
    assert tables[0].title == "MEMIT, 2 batches of 16 against the full precompute"
    assert [row[0] for row in tables[0].rows][:4] == ["0.02", "0.1", "0.5", "0.8"]
    assert len({table.name for table in tables}) == 6


def test_what_was_not_run_is_said() -> None:
    (table,) = comparison_tables(measure([cell()], resamples=20))
    assert table.note.endswith("The full precompute has not been run.") and table.title == "MEMIT, 10 batches of 4"
    heads = [f"{column.over} {column.name}".strip() for column in table.columns]
    assert heads == ["multiplier", *(f"{name} fast" for name in ("ES", "PS", "NS", "S", "EA", "PA", "NA")), "keys"]
    assert "-" not in table.rows[0]
    every = cells_table(measure([cell()], resamples=20))
    assert every.columns[-1].name == "NA" and "share of full" not in every.note
    assert comparison_tables(measure([cell(multiplier=None)], resamples=20)) == []


def test_the_paper_stands_beside_the_methods_and_multipliers_that_were_run() -> None:
    cells = [cell("emmet", 2.0), cell("memit", 2.0), cell("memit", 0.5), cell("rome", 2.0)]
    tables = paper_tables(measure(cells, resamples=20))
    assert [table.title for table in tables] == ["The paper's EMMET: multiplier 2", "The paper's MEMIT: multiplier 2"]
    gpt2_xl = tables[1].rows[1]
    assert gpt2_xl == (
        "GPT2-XL", "8", "16", "96.25", "100.00", "82.50", "92.19", "78.19", "76.31", "84.98",
        "88.36", "1.040",
    )  # fmt: skip


def test_misprints_of_the_paper_are_marked() -> None:
    (table,) = paper_tables(measure([cell("emmet", 1.0)], resamples=20))
    row = next(row for row in table.rows if row[:3] == ("GPT2-XL", "2", "1024"))
    assert row[3:] == (
        "99.32", "86.72", "92.15", "68.25*", "62.68*", "54.11", "81.35", "67.17", "0.826",
    )  # fmt: skip
    assert "* misprinted there" in table.note
    (last,) = paper_tables(measure([cell("memit", 10.0)], resamples=20))
    assert "Tables 30 and 31 print the same" in last.note


def test_every_cell_has_its_intervals_and_the_unedited_model_is_there_once() -> None:
    chosen = [cell(), cell(multiplier=None), cell("rome", size=(1, 5), perplexity=True)]
    groups = measure(chosen)
    table = cells_table(groups)
    names = [found["key"] for found in chosen]
    assert [row[0] for row in table.rows] == ["unedited", "unedited", *names]
    assert [row[1:3] for row in table.rows] == [
        ("-", "40"), ("-", "5"), ("3,072", "40"), ("67,000", "40"), ("3,072", "5"),
    ]  # fmt: skip
    measured = groups.set_index("key").loc["memit/b4x10/x2"]
    for column, name in enumerate(("es", "ps", "ns", "s", "ea", "pa", "na"), 3):
        for row, end in ((table.rows[0], "_before"), (table.rows[2], "")):
            found = measured[name + end]
            assert found is not None and found.low <= found.value <= found.high
            assert row[column] == f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"
    assert [row[10] for row in table.rows] == ["-", "36.50", "-", "-", table.rows[4][10]]
    assert table.rows[2][11].count(".") == 3 and table.rows[3][11] == "-"
    assert all(len(row) == len(table.columns) for row in table.rows)


def test_the_csv_has_measured_and_printed_rows_unrounded() -> None:
    groups = measure(grid(), resamples=50)
    rows = _rows(comparison_csv(groups, "tiny"))
    measured = [row for row in rows if row["source"] == "measured"]
    assert len(measured) == 2 * 3 * 5
    assert len(rows) - len(measured) == len(paper_rows())
    assert {row["model"] for row in measured} == {"tiny"}
    for row in measured:
        found = cell(row["method"], float(row["multiplier"]), (int(row["batch_size"]), int(row["batches"])))
        assert float(row["s_fast"]) == pytest.approx(found["scores"]["s"], abs=1e-9)
        assert float(row["ea_fast"]) == pytest.approx(found["scores"]["ea"], abs=1e-9)
        assert float(row["kept_low"]) <= float(row["kept"]) <= 1 and row["kept_by"]
    printed = next(row for row in rows if row["source"] == "paper, table 2")
    assert {name: float(printed[name]) for name in NAMES} == paper_rows()[0]["printed"]
    wrong = next(row for row in rows if "ps_fast printed as 91.62" in row["note"])
    assert wrong["ps_fast"] == "68.25"


def test_the_csv_of_cells_has_all_that_was_measured() -> None:
    records = [record(i, 1.0) for i in range(4)]
    for found in records:
        found["after"] |= {"ea": 0.25, "em": 0.125}
    groups = measure([made("memit", None, (2, 2), records, {"ridge": 0.1}, worse=2.0)])
    (row,) = _rows(cells_csv(groups))
    assert row["key"] == "memit/b2x2/full+ridge=0.1" and row["settings"] == '{"ridge": 0.1}'
    assert (row["multiplier"], row["records"], row["ppl_after"]) == ("full", "4", "73.0")
    assert (row["s"], row["s_low"], row["es_before"]) == ("100.0", "100.0", "50.0")
    assert (row["ea"], row["ea_high"], row["pa"]) == ("25.0", "25.0", "")
    assert (row["kept"], row["ea_minus_full"]) == ("", ""), "there is nothing to compare with"
    assert row["after em"] == "0.125"


def test_the_csv_of_cells_has_the_paired_differences() -> None:
    full, fast = [record(0, 1.0, ea=1.0)], [record(0, 1.0, 0.75, ea=0.5)]
    groups = measure([made("memit", None, (1, 1), full), made("memit", 1.0, (1, 1), fast)])
    row = _rows(cells_csv(groups))[1]
    assert (row["ea_minus_full"], row["ea_minus_full_low"]) == ("-50.0", "-50.0")
    assert (row["ps_minus_full"], row["na_minus_full"]) == ("-25.0", "")
    assert (row["kept"], row["kept_by"]) == ("0.5", "ea")


def test_the_answer_is_where_all_larger_multipliers_keep_every_score() -> None:
    full = made("memit", None, (1, 1), [record(0, 1.0, ea=1.0)])
    half, whole = [record(0, 1.0, ea=0.5)], [record(0, 1.0, ea=1.0)]
    cells = [made("memit", m, (1, 1), scores) for m, scores in ((1.0, whole), (2.0, half), (3.0, whole), (10.0, whole))]
    first, second = answers(measure([full, *cells], resamples=20))
    assert first.startswith("Unedited, 1 batch of 1: S ")
    assert second == "MEMIT, 1 batch of 1: from 3 on (of 1, 2, 3, 10) at least 95 % of every score of full."
    (_, none) = answers(measure([full, *cells[:2]], resamples=20))
    assert none.endswith("no multiplier of 1, 2 keeps 95 % of every score of full; 2 keeps 50.0 % of EA.")
    (_, alone) = answers(measure(cells[:2], resamples=20))
    assert alone.startswith("MEMIT, 1 batch of 1: at 2 S ") and "EA 50.0" in alone
    two = answers(measure([cell(size=(1, 4)), cell(size=(4, 1))], resamples=20))
    assert [sentence.partition(":")[0] for sentence in two[:2]] == [
        f"Unedited, {s}" for s in ("4 batches of 1", "1 batch of 4")
    ]


def test_the_summary_has_s_exact_matches_and_what_is_kept() -> None:
    cells = [cell("emmet", 2.0), cell("emmet", None), cell("memit", 0.5, size=(1, 4))]
    groups = measure(cells, resamples=20)
    lines = summary(groups)
    assert lines[0] == ["S, at multiplier", "0.5", "2", "full"]
    for at, name in ((0, "s"), (3, "ea")):
        scores = [f"{found['scores'][name]:.2f}" for found in cells]
        assert lines[at + 1] == ["EMMET, 10 batches of 4", "", *scores[:2]]
        assert lines[at + 2] == ["MEMIT, 4 batches of 1", scores[2], "", ""]
    assert lines[6][0] == "least share of full, %, at multiplier"
    kept = groups["kept"].dropna().iat[0]
    assert lines[7][2] == f"{100 * kept.value:.1f}"
    assert len(summary(measure([cell()], resamples=20))) == 4, "nothing was compared"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ('=HYPERLINK("http://x","click")', '\'=HYPERLINK("http://x","click")'),
        ("@SUM(1+1)", "'@SUM(1+1)"),
        ("+cmd|' /C calc'!A0", "'+cmd|' /C calc'!A0"),
        ("-2+3", "'-2+3"),
        ("\t=1+1", "'\t=1+1"),
        ("\r=1+1", "'\r=1+1"),
        ("\uff1d1+1", "'\uff1d1+1"),
        ("a=b", "a=b"),
        ("memit", "memit"),
        ("", ""),
        ("-2.5e-3", "-2.5e-3"),
        ("+7", "+7"),
        (-2.5, -2.5),
        (None, None),
    ],
)
def test_no_cell_begins_a_formula_and_numbers_stay_numbers(value: object, shown: object) -> None:
    assert _csv_cell(value) == shown


def test_every_text_of_both_csv_files_is_kept_from_being_a_formula() -> None:
    evil = "=cmd|' /C calc'!A0"
    cells = [cell(evil, d, (2, 2), settings={"=x": "@y"}) for d in (2.0, None)]
    for found in cells:
        found["key"] = f"={found['key']}"
    groups = measure(cells, resamples=20)
    for text in (comparison_csv(groups, evil), cells_csv(groups)):
        values = [value for row in csv.reader(io.StringIO(text)) for value in row]
        assert not [value for value in values if value.startswith(("=", "+", "@"))]
        assert not [v for v in values if v.startswith("-") and not v[1:2].isdigit()]
        assert f"'{evil}" in values
