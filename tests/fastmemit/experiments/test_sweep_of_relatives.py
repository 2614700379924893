"""A sweep by the relatives of MEMIT: which vectors they share, and what each cell holds."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from fastmemit import targets as store
from fastmemit.data import Record
from fastmemit.errors import BadConfig
from fastmemit.evaluation import evaluate
from fastmemit.experiments.results import Inputs
from fastmemit.experiments.sweep import Grid, parse_methods, run_sweep
from fastmemit.methods import AlphaEditConfig
from fastmemit.request import EditRequest
from tiny_editors import record, tiny_corpus, tiny_editor

RECORDS: list[Record] = [
    record(10 + n, EditRequest("{} is in", name, "Rome", "Paris"))
    for n, name in enumerate(("Eiffel Tower", "Italy", "the poet"))
]
SETTINGS: dict[str, Any] = {"steps": 3, "layers": (0, 1)}
OF_ALPHAEDIT = {**SETTINGS, "null_relative": 0.5}


def test_each_cell_is_an_evaluation_of_its_own_and_vectors_are_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = parse_methods("memit,pmet,encore,alphaedit")
    grid = Grid(methods=methods, batches={2: 1}, multipliers=(4.0,), variants=(SETTINGS,))
    editor = tiny_editor(tmp_path / "cache", layers=None)
    made: list[str] = []
    real = store.optimise

    def spy(adapter: Any, tokenizer: Any, requests: Any, contexts: Any, settings: Any, **kw: Any):
        made.append(settings.stop)
        return real(adapter, tokenizer, requests, contexts, settings, **kw)

    monkeypatch.setattr(store, "optimise", spy)
    given = Inputs(tiny_corpus(40), tmp_path / "out", {"name": "tiny"})
    # A method's own settings may be given for its cells alone, or as an object.
    objects = Grid(
        methods=(
            "memit",
            AlphaEditConfig(layers=(0, 1), steps=3, null_relative=0.5, scale="median", v_lr=0.2),
        ),
        batches={2: 1}, multipliers=(4.0,), settings={"memit": SETTINGS},
    )  # fmt: skip
    with pytest.raises(BadConfig, match="null_relative is a setting of alphaedit; memit has"):
        run_sweep(editor, dataclasses.replace(grid, variants=(OF_ALPHAEDIT,)), RECORDS, given)
    # Settings that not all methods have are varied apart, into the same folder.
    shared = dataclasses.replace(grid, methods=methods[:3])
    cells = run_sweep(editor, shared, RECORDS, given)
    own = dataclasses.replace(grid, methods=methods[3:], variants=(OF_ALPHAEDIT,))
    cells += run_sweep(editor, own, RECORDS, given)
    assert made == ["loss", "most-probable"]
    assert [cell["key"].partition("/")[0] for cell in cells] == list(methods)
    known = {item.case_id: item for item in RECORDS}
    for cell in cells:
        assert set(cell["jitter"]) == (set() if cell["method"] == "alphaedit" else {"0", "1"})
        batch = [known[row["case_id"]] for row in cell["records"]]
        wanted = evaluate(editor, [batch], cell["method"], cell["settings"])
        for name, score in cell["scores"].items():
            assert score == pytest.approx(wanted["after"][name])
    assert made == ["loss", "most-probable"] and editor.edits == ()
    again = dataclasses.replace(given, folder=tmp_path / "objects")
    same = run_sweep(editor, objects, RECORDS, again)
    assert [cell["method"] for cell in same] == ["memit", "alphaedit"]
    assert same[1]["settings"] == {"layers": [0, 1], "steps": 3, "null_relative": 0.5}
    for cell in same:
        (first,) = [c for c in cells if c["method"] == cell["method"]]
        assert cell["scores"] == first["scores"] and cell["records"] == first["records"]
