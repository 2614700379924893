from __future__ import annotations

import pytest

from fastmemit.experiments.results import method_title
from fastmemit.experiments.tables import Column, Table, latex, markdown, markdown_text, slug, unique

TABLE = Table(
    "a-table",
    "50 % of a|b",
    (Column("batches", text=True), Column("full", "ES"), Column("fast", "ES"), Column("n_keys")),
    (("2 batches of 16", "100.00", "98.50", "1,536"), ("[x](y)_<b>", "-", "1 \\ 2", "$5 & ^~#{}")),
    "A note*.",
)


def test_markdown() -> None:
    assert markdown([TABLE]) == (
        "## 50 % of a\\|b\n"
        "\n"
        "| batches | ES full | ES fast | n_keys |\n"
        "| --- | ---: | ---: | ---: |\n"
        "| 2 batches of 16 | 100.00 | 98.50 | 1,536 |\n"
        "| [x]\\(y)_\\<b\\> | - | 1 \\\\ 2 | $5 & ^~#{} |\n"
        "\n"
        "A note\\*.\n"
    )


def test_latex() -> None:
    assert latex([TABLE]) == (
        "% Needs \\usepackage{booktabs}.\n"
        "\n"
        "\\begin{table}\n"
        "\\centering\n"
        "\\caption{50 \\% of a|b}\n"
        "\\label{tab:a-table}\n"
        "\\begin{tabular}{lrrr}\n"
        "\\toprule\n"
        " & \\multicolumn{2}{c}{ES} &  \\\\\n"
        "\\cmidrule(lr){2-3}\n"
        "batches & full & fast & n\\_keys \\\\\n"
        "\\midrule\n"
        "2 batches of 16 & 100.00 & 98.50 & 1,536 \\\\\n"
        "{[}x{]}(y)\\_\\textless{}b\\textgreater{} & -- & 1 \\textbackslash{} 2 & "
        "\\$5 \\& \\textasciicircum{}\\textasciitilde{}\\#\\{\\} \\\\\n"
        "\\bottomrule\n"
        "\\end{tabular}\n"
        "\\par\\smallskip {\\footnotesize A note*.}\n"
        "\\end{table}\n"
    )


def test_a_wide_table_is_made_as_narrow_as_the_page() -> None:
    columns = tuple(Column(f"c{index}") for index in range(10))
    text = latex([Table("t", "t", columns, (tuple("0123456789"),))])
    assert text.startswith("% Needs \\usepackage{booktabs} and \\usepackage{graphicx}.\n")
    assert "\\resizebox{\\textwidth}{!}{%\n\\begin{tabular}{rrrrrrrrrr}\n" in text
    assert "\\end{tabular}}\n\\end{table}" in text
    assert "resizebox" not in latex([TABLE])


def test_columns_without_an_upper_head_have_no_second_row() -> None:
    plain = Table("t", "t", (Column("a"), Column("b")), (("1", "2"),))
    assert plain.spans == []
    assert TABLE.spans == [("", 1, 1), ("ES", 2, 2), ("", 4, 1)]
    assert "multicolumn" not in latex([plain])


def test_names() -> None:
    assert slug("MEMIT, relative_ridge=0.01: ../x2") == "memit-relative-ridge-0.01-..-x2"
    assert "/" not in slug("a/b\\c")
    assert unique(["a", "b", "a", "a-2", "a"]) == ["a", "b", "a-2", "a-2-2", "a-3"]


def test_method_titles() -> None:
    assert [method_title(m) for m in ("memit", "pmet", "alphaedit")] == [
        "MEMIT", "PMET", "AlphaEdit",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<script>alert(1)</script>", r"\<script\>alert(1)\</script\>"),
        ("a\n# b", "a # b"),
        ("[x](javascript:1)", r"[x]\(javascript:1)"),
        ("`x` *y* |", r"\`x\` \*y\* \|"),
        ("gpt2-xl_7", "gpt2-xl_7"),
    ],
)
def test_markdown_text_stays_text(text: str, shown: str) -> None:
    assert markdown_text(text) == shown


@pytest.mark.parametrize("text", ["..", "", "日本", "-", "."])
def test_a_name_of_a_file_is_never_empty(text: str) -> None:
    assert slug(text) == "unnamed"
