"""The picture of a trace, and the file that it is drawn from."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastmemit.errors import BadConfig
from fastmemit.request import EditRequest
from fastmemit.tracing import GROUPS, KINDS, Trace, TracedFact
from fastmemit.tracing_report import Proposal, check_figure, draw, located

FACTS = tuple(TracedFact(EditRequest("{} is", name, "x", "y"), (1, 2), 0, 0, 3) for name in ("Rome", "Paris"))

FIELDS = ("facts", "looked_at", "clean", "corrupted", "windows", "noise_std", "effects", "proposal", "records",
          "settings", "seconds", "versions", "hardware", "command")  # fmt: skip


def result(groups: tuple[str, ...], proposal: Proposal | None = None, facts: int = 2) -> dict[str, Any]:
    effects: Any = {kind: {group: np.arange(8.0).reshape(2, 4)[:facts] / 10 for group in groups} for kind in KINDS}
    values = np.array([0.5, 0.7])[:facts]
    windows: Any = {"mlp": 2, "attention": 2, "hidden": 1}
    found = Trace(FACTS[:facts], windows, 0.3, values, values / 2, effects)
    return located(
        found,
        9,
        proposal,
        seed=0,
        settings={"model": "tiny"},
        seconds=1.26,
        versions={"torch": "2"},
        hardware={"cpu": "some"},
        command=["fastmemit", "experiment", "locate", "--facts", "two words.json"],
    )


def test_the_file_says_what_was_found() -> None:
    found = json.loads(json.dumps(result(("last subject",), Proposal(2, (1, 2), 1, 3))))
    assert found.keys() == set(FIELDS)
    assert (found["facts"], found["looked_at"], found["seconds"]) == (2, 9, 1.3)
    assert found["proposal"] == {"peak": 2, "layers": [1, 2], "low": 1, "high": 3}
    effect = found["effects"]["mlp"]["last subject"]
    assert effect["mean"] == pytest.approx([0.2, 0.3, 0.4, 0.5]) and effect["facts"] == 2
    assert effect["low"][0] <= 0.2 <= effect["high"][0]
    assert found["clean"]["mean"] == pytest.approx([0.6])
    assert found["corrupted"]["mean"] == pytest.approx([0.3])
    assert found["records"][1] == {
        "prompt": "{} is", "subject": "Paris", "answer": "y", "clean": 0.7, "corrupted": 0.35
    }  # fmt: skip
    assert found["command"] == "fastmemit experiment locate --facts 'two words.json'"


def test_one_fact_and_no_proposal() -> None:
    found = result(("last subject",), facts=1)
    assert found["proposal"] is None
    assert found["effects"]["hidden"]["last subject"]["low"] is None


def test_a_line_per_kind_and_the_proposed_layers(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "a.svg"
    draw(result(("last subject",), Proposal(2, (1, 2), 1, 3)), path)
    text = path.read_text()
    for part in ("mlp, 2 layers together", "attention, 2 layers together", "hidden, one layer",
                 "proposed: 1-2", "tiny: restored at", "2 facts"):  # fmt: skip
        assert part in text
    assert "first subject" not in text
    draw(result(("last subject",), Proposal(2, (1, 2), 1, 3)), tmp_path / "b.svg")
    assert (tmp_path / "b.svg").read_bytes() == path.read_bytes()


def test_all_positions_are_drawn_as_maps(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "a.svg"
    draw(result(GROUPS), path)
    text = path.read_text()
    assert "proposed" not in text
    for group in GROUPS:
        assert f">{group}<" in text


def test_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw(result(("last subject",), facts=1), tmp_path / "a.PNG")
    assert (tmp_path / "a.PNG").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["a.PNG"]


def test_a_pdf_whose_text_is_text(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("a.pdf", "b.pdf"):
        draw(result(("last subject",), facts=1), tmp_path / name)
    content = (tmp_path / "a.pdf").read_bytes()
    assert content.startswith(b"%PDF")
    assert b"/Subtype /Type3" not in content and (b"/TrueType" in content or b"/CIDFontType2" in content)
    assert (tmp_path / "b.pdf").read_bytes() == content


def test_pictures_that_cannot_be_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    check_figure(None)
    with pytest.raises(BadConfig, match=r"'a\.gif' must end in \.svg, \.pdf or \.png"):
        check_figure(Path("folder/a.gif"))
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(BadConfig, match=r"need matplotlib.*fastmemit\[report\]"):
        check_figure(Path("a.svg"))
