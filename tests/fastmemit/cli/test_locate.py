"""The verb locate on a tiny model: table, proposal, files, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tiny_commands import Place, refused, run

Capture = pytest.CaptureFixture[str]


def locate(place: Place, *more: object) -> list[object]:
    return ["experiment", "locate", *place.model, "--facts", place.records, "--samples", "2", *more]


def test_a_table_a_proposal_and_the_files(place: Place, capsys: Capture) -> None:
    pytest.importorskip("matplotlib")
    found, figure = place.at / "found.json", place.at / "found.svg"
    out = run(capsys, *locate(place, "--unknown-too", "--positions", "all", "--window", "2",
                              "--json", found, "--figure", figure))  # fmt: skip
    lines = out.splitlines()
    assert re.match(r"tiny-llama: 4 facts traced of 4 looked at, 2 noise samples each, ", lines[0])
    assert re.match(r"probability of the answer: clean \d+\.\d\d %, subject hidden ", lines[1])
    assert re.split(r"  +", lines[3]) == [
        "layer", "mlp (2 layers)", "attention (2 layers)", "hidden (1 layer)"
    ]  # fmt: skip
    assert [line.split()[0] for line in lines[4:7]] == ["0", "1", "2"]
    assert len(re.findall(r"-?\d+\.\d\d \[ *-?\d+\.\d\d, +-?\d+\.\d\d\]", out)) == 9
    for kind in ("mlp", "attention", "hidden"):
        assert f"{kind}: effect by position" in out
    assert re.search(r"^  last subject +at most +-?\d+\.\d\d, at layer \d \(4 facts\)$", out, re.M)
    result = json.loads(found.read_text())
    assert (result["facts"], result["looked_at"]) == (4, 4)
    assert result["windows"] == {"mlp": 2, "attention": 2, "hidden": 1}
    assert len(result["records"]) == 4 and len(result["effects"]["mlp"]["last subject"]["low"]) == 3
    assert result["settings"]["facts"]["name"] == "records.json"
    assert len(result["settings"]["facts"]["sha256"]) == 64
    assert result["hardware"]["threads"] >= 1 and "torch" in result["versions"]
    assert result["command"].startswith("fastmemit experiment locate --model tiny-llama --facts records.json ")
    assert str(place.at) not in found.read_text()  # no folder goes into a file that is shared
    assert "<svg" in figure.read_text()


def test_the_recorded_command_is_one(place: Place, capsys: Capture) -> None:
    import shlex

    from fastmemit.cli import parser

    found = place.at / "found.json"
    run(capsys, *locate(place, "--unknown-too", "--dtype", "float32", "--window", "1",
                        "--limit", "2", "--kinds", "mlp", "--json", found))  # fmt: skip
    words = shlex.split(json.loads(found.read_text())["command"])
    args = parser().parse_args(words[1:])
    assert (args.limit, args.samples, args.window, args.kinds) == (2, 2, 1, "mlp")
    assert args.unknown_too and args.dtype == "float32" and args.device is None


def test_the_proposal_is_printed_as_options(place: Place, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastmemit import tracing_report

    chosen = tracing_report.Proposal(2, (1, 2), 1, 2)
    monkeypatch.setattr(tracing_report, "propose", lambda effects, seed: chosen)
    out = run(capsys, *locate(place, "--unknown-too"))
    assert "the MLP's effect is largest at layer 2 (95 % interval of its place: 1 to 2)" in out
    assert "proposed: --method memit --set layers=1-2" in out
    assert "--method rome or emmet --set layers=2" in out
    assert "now used (by depth, no preset): memit 0-2, emmet 1, rome 1" in out


def test_nothing_is_proposed_without_an_effect(place: Place, capsys: Capture) -> None:
    out = run(capsys, *locate(place, "--unknown-too", "--limit", "1"))
    assert "no layers proposed: no effect of the MLP stands out from zero" in out
    out = run(capsys, *locate(place, "--unknown-too", "--kinds", "hidden"))
    assert "no layers proposed: the MLP was not traced" in out


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ([], ["knows none of the 4 facts", "--unknown-too"]),
        (["--unknown-too", "--window", "4"], ["window of 4 layers", "the model's 3"]),
        (["--noise", "0"], ["noise must be a finite number above 0"]),
        (["--noise", "nan"], ["noise must be a finite number above 0"]),
        (["--kinds", "mlp,mlp"], ["kinds must be different ones of mlp, attention, hidden"]),
        (["--kinds", "neuron"], ["kinds must be", "'neuron'"]),
        (["--samples", "0"], ["must be a whole number above 0"]),
        (["--positions", "middle"], ["middle"]),
        (["--figure", "a.gif"], ["must end in .svg, .pdf or .png"]),
        (["--json", "gone/a.json"], ["The folder '", "/gone' does not exist; make it"]),
    ],
)
def test_what_is_refused(place: Place, capsys: Capture, options: list[str], parts: list[str]) -> None:
    line = refused(capsys, place, *locate(place, *options))
    for part in parts:
        assert part in line


def test_a_fact_that_cannot_be_traced_is_named(place: Place, capsys: Capture) -> None:
    records = json.loads(Path(place.records).read_text())
    records[1]["requested_rewrite"]["prompt"] = "{}"
    Path(place.records).write_text(json.dumps(records))
    line = refused(capsys, place, *locate(place, "--unknown-too"))
    assert "The prompt 'France' ends with its subject" in line


def test_the_facts_that_are_shipped(place: Place, capsys: Capture) -> None:
    out = run(capsys, "experiment", "locate", *place.model, "--facts", "builtin", "--unknown-too", "--limit", "3",
              "--samples", "1", "--kinds", "mlp")  # fmt: skip
    assert "3 facts traced of 3 looked at" in out
