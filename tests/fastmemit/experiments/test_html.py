from __future__ import annotations

import html
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fastmemit.experiments.frame import measure
from fastmemit.experiments.plots import Picture
from fastmemit.experiments.report import page, runs, write_report
from fastmemit.experiments.results import collect
from fastmemit.experiments.tables import cells_table, comparison_tables, difference_tables, paper_tables
from headless_browser import figures_seen, open_page
from tiny_sweeps import cell, write

HOSTILE = "<script>throw 1</script>\"'><img src=x onerror='throw 2'>{{ 7 * 7 }}&amp;"


class Elements(HTMLParser):
    """Every element with its attributes, and the text of the page."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with two figures: a method over two sizes, and settings that are compared."""
    cells = [cell(multiplier=m, size=s) for s in ((1, 8), (4, 10)) for m in (1.0, 2.0, None)]
    ridge = [cell(multiplier=m, settings={"ridge": 0.1}, perplexity=True) for m in (1.0, 2.0)]
    folder = write(tmp_path_factory.mktemp("sweep"), [*cells, *ridge])
    write_report([folder], resamples=50)
    return folder / "report" / "report.html"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of a sweep whose every name is an attack."""
    settings = {HOSTILE: HOSTILE}
    cells = [cell(multiplier=m, settings=settings) for m in (1.0, None)]
    folder = write(tmp_path_factory.mktemp("hostile"), cells, model=HOSTILE, corpus={"n": HOSTILE})
    write_report([folder], resamples=50)
    return folder / "report" / "report.html"


def test_chromium_shows_every_figure_and_has_nothing_to_say(report: Path, tmp_path: Path) -> None:
    seen = open_page(report, tmp_path)
    assert seen.console == []
    assert "Full against fast" in seen.document
    figures = figures_seen(report, tmp_path)
    names = ["memit", "memit-10-batches-of-4-settings"]
    assert [figure["id"] for figure in figures] == [f"figure-{name}" for name in names]
    assert sorted(path.stem for path in (report.parent / "figures").glob("*.svg")) == names
    for figure in figures:
        assert figure["width"] > 600 and figure["height"] > 200
        assert figure["inked"] > 1000


def test_chromium_runs_nothing_that_came_from_a_file(hostile: Path, tmp_path: Path) -> None:
    assert open_page(hostile, tmp_path).console == []
    assert all(figure["inked"] > 1000 for figure in figures_seen(hostile, tmp_path))


# A load that merely fails is not in Chromium's log; the page's policy makes every load a refusal,
# which is.
@pytest.mark.parametrize(
    "more",
    [
        "<script>1</script>",
        "<img src='https://example.org/a.png'>",
        "<link rel='stylesheet' href='https://example.org/a.css'>",
        "<p style='background: url(https://example.org/a.png)'>a</p>",
    ],
    ids=["script", "image", "style", "background"],
)
def test_the_check_of_the_console_can_fail(report: Path, tmp_path: Path, more: str) -> None:
    broken = tmp_path / "broken.html"
    source = report.read_text(encoding="utf-8")
    broken.write_text(source.replace("</body>", f"{more}</body>"), encoding="utf-8")
    (line,) = open_page(broken, tmp_path).console
    assert "violates the following Content Security Policy directive" in line


def test_a_script_that_throws_is_heard(tmp_path: Path) -> None:
    path = tmp_path / "throws.html"
    path.write_text("<!DOCTYPE html><html><body><script>throw new Error('lost')</script></body>")
    assert "Uncaught Error: lost" in " ".join(open_page(path, tmp_path).console)


@pytest.mark.parametrize(
    ("pattern", "new", "field"),
    [(r"base64,[^\"]*", "base64,AAAA", "inked"), (r"<figure ", "<figure hidden ", "width")],
    ids=["a broken figure", "a hidden figure"],
)
def test_the_check_of_the_figures_can_fail(report: Path, tmp_path: Path, pattern: str, new: str, field: str) -> None:
    broken = tmp_path / "broken.html"
    broken.write_text(re.sub(pattern, new, report.read_text(encoding="utf-8"), count=1))
    first, second = figures_seen(broken, tmp_path)
    assert first[field] == 0 and second[field] > 0


def test_the_page_asks_for_nothing(report: Path) -> None:
    source = report.read_text(encoding="utf-8")
    elements = Elements(source)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in elements.found}
    assert all((image["src"] or "").startswith("data:") for image in elements.all("img"))
    assert all((link["href"] or "").startswith("#") for link in elements.all("a"))
    assert "url(" not in source and "@import" not in source
    (policy,) = [m for m in elements.all("meta") if m.get("http-equiv")]
    assert policy["content"] == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_the_page_can_be_read_without_seeing_it(report: Path) -> None:
    elements = Elements(report.read_text(encoding="utf-8"))
    names = [attributes["id"] for _, attributes in elements.found if "id" in attributes]
    assert len(names) == len(set(names)), "an id must be there once"
    for _, attributes in elements.found:
        assert attributes.get("aria-labelledby", names[0]) in names
    for link in elements.all("a"):
        assert (link["href"] or "").removeprefix("#") in names
    assert len(elements.all("figcaption")) == len(elements.all("figure")) == 2
    assert len(elements.all("caption")) == len(elements.all("table"))
    assert {head.get("scope") for head in elements.all("th")} == {"col", "colgroup", "row"}
    alt = elements.all("img")[0]["alt"] or ""
    assert alt.startswith("ES, EA, PS, PA, NS, NA, S against the multiplier. EA of 8 batches of 1")
    assert elements.all("html") == [{"lang": "en"}]


def test_what_came_from_files_is_text(hostile: Path) -> None:
    source = hostile.read_text(encoding="utf-8")
    elements = Elements(source)
    assert "script" not in {tag for tag, _ in elements.found}
    assert len(elements.all("img")) == 1
    assert not any(name.startswith("on") for _, found in elements.found for name in found)
    assert elements.text.count(HOSTILE) > 5  # the model, the settings, the corpus
    assert html.escape("<script>", quote=False) in source and "{{ 7 * 7 }}" in source


def test_the_page_says_what_was_run(tmp_path: Path) -> None:
    folder = write(tmp_path, [cell(), cell(multiplier=None)])
    description, costs = runs(collect([folder]))
    assert description[0] == str(folder)
    facts = dict(description[1])
    assert facts["model"] == "tiny-model" and facts["dtype"] == "float32"
    assert facts["settings of memit"] == "layers: [3, 4, 5], clamp: 1.0"
    assert "max length" not in facts, "it was not set"
    assert dict(costs[1]) == {
        "hardware": "2 cores of a test (2 cells)",
        "versions": "torch: 2.13.0, fastmemit: 0.1.0 (2 cells)",
        "seconds: plan": "3.0",
        "seconds: apply": "0.5",
        "seconds: evaluate": "16.0",
        "seconds: undo": "0.5",
        "seconds: all": "20.0",
    }
    (folder / "timings.jsonl").unlink()
    assert len(runs(collect([folder]))) == 1


def test_every_table_and_picture_is_on_the_page(tmp_path: Path) -> None:
    found = collect([write(tmp_path, [cell(), cell(multiplier=None)])])
    groups = measure(found.cells, resamples=50)
    comparisons, paper = comparison_tables(groups), paper_tables(groups)
    differences = difference_tables(groups)
    pictures = [Picture("a", "A picture", "seen", {"svg": b"<svg/>", "png": b""})]
    tables = {"comparisons": comparisons, "differences": differences, "paper": paper, "all": [cells_table(groups)]}
    elements = Elements(page(found, pictures, tables))
    for table in (*comparisons, *differences, *paper, cells_table(groups)):
        assert table.title in elements.text
        assert all(value in elements.text for row in table.rows for value in row)
    assert "A picture." in elements.text
    assert elements.all("img")[0]["src"] == "data:image/svg+xml;base64,PHN2Zy8+"
