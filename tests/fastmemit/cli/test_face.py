"""What the commands have in common: show, undo, doctor, tables on a terminal, defaults, and "did you mean"."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastmemit.cli import VERBS, main
from fastmemit.cli.options import FLAGS, SETS, write_json
from fastmemit.cli.terminal import show_table
from fastmemit.delta import Delta
from tiny_commands import EDIT, Place, refused, run

Capture = pytest.CaptureFixture[str]


def test_show_says_what_is_in_an_edit_and_in_a_model(place: Place, capsys: Capture) -> None:
    saved, both = place.edit(capsys, "edit.st"), place.at / "both.st"
    out = run(capsys, "show", saved, place.model[1])
    assert out.startswith(f"{saved}: an edit, ")
    about = dict(re.findall(r"^  (\w+) +(.*)$", out, re.MULTILINE))
    assert about["digest"] == Delta.load(saved).digest() and about["method"] == "memit"
    assert f"model      tiny-llama ({Delta.load(saved).model:.16})" in out and "layers     0, 1\n" in out
    assert "rank       2\n" in out and "fact       The capital of France is -> Berlin\n" in out
    assert "class      LlamaForCausalLM" in out and "keys       of width 64" in out
    other = place.edit(capsys, "other.st", "--set", "steps=1")
    run(capsys, "compose", "--edit", saved, "--edit", other, "--out", both, "--allow-conflicts")
    assert f"part       {Delta.load(other).digest():.12} with 2 facts" in run(capsys, "show", both)
    assert "There is no edit file" in refused(capsys, place, "show", place.at / "gone.st")


def test_undo_takes_an_edit_out_of_a_saved_model(place: Place, capsys: Capture) -> None:
    saved, edited, back = place.edit(capsys, "edit.st"), place.at / "edited", place.at / "back"
    run(capsys, "apply", *place.model, "--edit", saved, "--save-model", edited)
    options = ("--model", edited, *place.model[2:])
    out = run(capsys, "undo", *options, "--edit", saved, "--save-model", back)
    assert "1 edits taken out of edited" in out and re.search(r"of 2 facts the model said \d and says 0 now", out)
    before, after = (load_file(Path(folder) / "model.safetensors") for folder in (place.model[1], back))
    same = all(torch.equal(after[name], weight) for name, weight in before.items())
    assert ("bit for bit" in out) == same and ("but for rounding" in out) != same
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, rtol=0, atol=1e-5)
    line = refused(capsys, place, "undo", *place.model, "--edit", saved, "--save-model", place.at / "x")
    assert "is the model that" in line and "without it" in line


def test_the_doctor_says_what_runs_here(place: Place, capsys: Capture) -> None:
    out = run(capsys, "doctor", "--cache", place.at)
    for part in ("kernels, best first", "libraries\n  transformers ", "extras\n", " in ", "hub\n  http"):
        assert part in out
    assert "HF_HUB_OFFLINE" in out or "asked when it is needed" in out


def alone(capsys: Capture, *words: object) -> Any:
    """What a command writes for ``--json -``, which has stdout for itself; the rest is said on stderr."""
    capsys.readouterr()
    assert main([*map(str, words), "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert err and not err.startswith(("{", "["))
    return json.loads(out)


def test_what_a_verb_finds_is_there_as_json(place: Place, capsys: Capture) -> None:
    assert all("--json" in verb.flags.split() for verb in VERBS.values())
    found = alone(capsys, "precompute", *place.model, "--corpus", place.corpus, "--multiplier", 4, "--layers", "0-1")
    assert (found["keys"], found["multiplier"], len(found["files"])) == (256, 4.0, 2)
    assert all(Path(file).is_file() for file in found["files"].values())
    saved, both, edited = place.at / "edit.st", place.at / "both.st", place.at / "edited"
    found = alone(capsys, "edit", *place.model, *EDIT, "--facts", place.requests, "--out", saved)
    assert (found["method"], found["layers"], found["out"]) == ("memit", [0, 1], str(saved))
    fact = found["facts"][1]
    assert fact["request"]["subject"] == "France" and fact["after"]["probability"] > fact["before"]["probability"]
    found = alone(capsys, "apply", *place.model, "--edit", saved, "--prompt", "Paris is", "--save-model", edited)
    assert found["prompts"][0].keys() == {"prompt", "before", "after"} and len(found["facts"]) == 2
    assert found["facts"][1]["after"]["probability"] == pytest.approx(fact["after"]["probability"], rel=1e-4)
    (found,) = alone(capsys, "show", saved)
    assert found["digest"] == Delta.load(saved).digest() and found["layers"] == "0, 1"
    assert found["facts"][1] == "The capital of France is -> Berlin" and found["parts"] == []
    found = alone(capsys, "compose", "--edit", saved, "--out", both)
    assert [part["facts"] for part in found["parts"]] == [2] and len(found["weights"]) == 2
    options = ("--model", edited, *place.model[2:])
    found = alone(capsys, "undo", *options, "--edit", saved, "--save-model", place.at / "back")
    assert not any(fact["after"]["said"] for fact in found["facts"]) and isinstance(found["bit_for_bit"], bool)
    found = alone(capsys, "doctor", "--cache", place.at)
    assert found["kernels"]["reference"]["runs"] is True and found["chosen"]["cpu"]["float32"] in found["kernels"]
    found = alone(capsys, "stats", "plan", "--shape", "gpt2-xl", "--multipliers", "10")
    assert [plan["keys"] for plan in found["plans"]] == [64_000, 44_000_000]


def test_json_of_what_has_no_number_and_in_a_place_that_cannot_be(place: Place, capsys: Capture) -> None:
    write_json(place.at / "odd.json", {"a": [float("inf"), float("nan"), Path("b")], "c": (1, None, "inf")})
    assert json.loads((place.at / "odd.json").read_text()) == {"a": ["inf", "nan", "b"], "c": [1, None, "inf"]}
    assert "is a folder; name a file" in refused(capsys, place, "doctor", "--json", place.at)
    assert f"written to {place.at / 'd.json'}\n" in run(capsys, "doctor", "--json", place.at / "d.json")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["edti"], "Did you mean 'edit'? See fastmemit --help."),
        (["sweep"], "Did you mean 'experiment sweep'? See"),
        (["export"], "Did you mean 'stats export' or 'adapter export'?"),
        (["stats", "improt"], "Did you mean 'import'? See fastmemit stats --help."),
        (["edit", "--model", "m", "--method", "emet"], "Did you mean 'emmet'? See fastmemit edit --help."),
        (["edit", "--model", "m", "--fcts", "f"], "unrecognized arguments: --fcts f. Did you mean '--facts'?"),
        (["hub", "push", "--repo", "a/b"], "either by --edit FILE or by --statistics DIR"),
        (["hub", "push", "--repo", "a/b", "--edit", "e", "--statistics", "s"], "either by --edit FILE"),
    ],
)
def test_a_mistyped_word_is_answered(place: Place, capsys: Capture, words: list[str], said: str) -> None:
    assert said in refused(capsys, place, *words)


def test_a_mistyped_model_is_answered(place: Place, capsys: Capture) -> None:
    folder = Path(place.model[1])
    rest = (*place.model[2:], "--corpus", place.corpus)
    line = refused(capsys, place, "precompute", "--model", folder.with_name("tiny-lama"), *rest)
    assert line.endswith(f"Did you mean {str(folder)!r}?")
    assert refused(capsys, place, "precompute", "--model", "gpt2-xll", *rest).endswith("Did you mean 'gpt2-xl'?")


def test_every_flag_is_used_and_help_shows_defaults(capsys: Capture) -> None:
    used = " ".join([*SETS.values(), *(verb.flags for verb in VERBS.values())])
    known = [name for flags in FLAGS.values() for name in flags]
    assert sorted(known) == sorted({re.split("[!=]", word)[0] for word in used.split()} - SETS.keys())
    with pytest.raises(SystemExit):
        main(["experiment", "sequential", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "how many batches (default: 10)" in out and "records edited together (default: 16)" in out
    assert "(default: None)" not in out and "(default: False)" not in out and "(default: [])" not in out


def test_a_table_is_ruled_on_a_terminal_and_commands_it_nowhere(capsys: Capture, monkeypatch: Any) -> None:
    rows = [["", "before", "after"], ["ES", "1.00", "100.00"], ["a\x1b[2J[red]"]]
    show_table(rows)
    plain = capsys.readouterr().out
    assert plain == "               before   after\nES               1.00  100.00\na\\x1b[2J[red]\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    show_table(rows)
    ruled = capsys.readouterr().out
    assert "───" in ruled and "100.00" in ruled and r"a\x1b[2J[red]" in ruled and "\x1b" not in ruled
