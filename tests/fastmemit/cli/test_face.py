"""What the commands have in common: show, undo, doctor, tables on a terminal, defaults, and "did you mean"."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
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
    assert "rank       2\n" in out and re.search(r"fact       The capital of France is -> Berlin \(before: .+\)\n", out)
    assert "class      LlamaForCausalLM" in out and "keys       of width 64" in out
    other = place.edit(capsys, "other.st", "--set", "steps=1")
    run(capsys, "compose", "--edit", saved, "--edit", other, "--out", both, "--allow-conflicts")
    assert f"part       {Delta.load(other).digest():.12} with 2 facts" in run(capsys, "show", both)
    assert "There is no edit file" in refused(capsys, place, "show", place.at / "gone.st")


def test_show_says_what_is_in_an_adapter_and_in_statistics(place: Place, capsys: Capture) -> None:
    saved, folder = place.edit(capsys, "edit.st"), place.at / "adapter"
    run(capsys, "adapter", "export", "--edit", saved, "--model", place.model[1], "--out", folder)
    out = run(capsys, "show", folder)
    assert out.startswith(f"{folder}: an adapter (LORA), ") and "rank       2\n" in out and "alpha      2\n" in out
    assert "base       tiny-llama\n" in out and "module     model.layers.1.mlp.down_proj\n" in out
    assert (
        f"digest     {Delta.load(saved).digest()}\n" in out and "fact       The capital of France is -> Berlin" in out
    )
    moment = next((place.at / "cache" / "statistics").rglob("*.safetensors"))
    for path, modules in ((moment, 1), (moment.parent, 2)):
        out = run(capsys, "show", path)
        assert out.startswith(f"{path}: statistics, ") and out.count("  module ") == modules
        assert "multiplier 4.0\n" in out and "keys       256 of width 64\n" in out and "corpus     corpus.jsonl" in out


@pytest.fixture
def edited(place: Place, capsys: Capture) -> tuple[Path, Path]:
    """An edit's file, and the folder of the model with it."""
    saved, folder = place.edit(capsys, "edit.st"), place.at / "edited"
    run(capsys, "apply", *place.model, "--edit", saved, "--save-model", folder)
    return saved, folder


def test_a_saved_model_says_which_edits_are_in_it(place: Place, edited: tuple[Path, Path], capsys: Capture) -> None:
    saved, folder = edited
    delta, record = Delta.load(saved), json.loads((folder / "fastmemit.json").read_text())
    assert record["base"] == {"name": "tiny-llama", "fingerprint": delta.model}
    assert [entry["digest"] for entry in record["edits"]] == [delta.digest()]
    fact = record["edits"][0]["facts"][1]
    assert fact["subject"] == "France" and fact["former"] == delta.provenance["former"][1]
    card = (folder / "README.md").read_text()
    assert "## Edited facts" in card and "| The capital of France is | Berlin |" in card
    out = run(capsys, "show", folder)
    assert (
        f"base       tiny-llama ({delta.model:.16})" in out and f"edit       {delta.digest():.12} by memit, 2 fa" in out
    )
    assert "fact       The capital of France is -> Berlin (before: " in out
    # A further edit joins the record, and the card has one section of both.
    options, more, twice = ("--model", str(folder), *place.model[2:]), place.at / "more.st", place.at / "twice"
    run(capsys, "edit", *options, *EDIT, "--corpus", place.corpus, "--multiplier", "4", "--prompt", "{} is in",
        "--subject", "Italy", "--target", "London", "--out", more, "--save-model", twice)  # fmt: skip
    record = json.loads((twice / "fastmemit.json").read_text())
    assert [entry["digest"] for entry in record["edits"]] == [delta.digest(), Delta.load(more).digest()]
    assert record["base"]["fingerprint"] == delta.model
    card = (twice / "README.md").read_text()
    assert card.count("## Edited facts") == 1 and "Italy is in" in card and card.startswith("---\n")
    # One out of two is subtracted, and the other one stays on record.
    back = place.at / "back"
    out = run(capsys, "undo", "--model", twice, *place.model[2:], "--edit", more, "--save-model", back)
    assert "subtracted, because other edits stay in them" in out
    assert json.loads((back / "fastmemit.json").read_text())["edits"][0]["digest"] == delta.digest()
    assert "Italy" not in (back / "README.md").read_text()
    # Both, in whichever order they are named, are the base model's bits again.
    whole = place.at / "whole"
    out = run(capsys, "undo", "--model", twice, *place.model[2:], "--edit", more, "--edit", saved, "--base",
              place.model[1], "--save-model", whole)  # fmt: skip
    assert "the weights are bit for bit those of tiny-llama\n" in out
    assert (whole / "model.safetensors").read_bytes() == (Path(place.model[1]) / "model.safetensors").read_bytes()


def test_an_edit_is_not_applied_twice(place: Place, edited: tuple[Path, Path], capsys: Capture) -> None:
    saved, folder = edited
    said = refused(capsys, place, "apply", *place.model, "--edit", saved, "--edit", saved)
    assert f"{Delta.load(saved).digest():.12} is in the weights already, among the edits" in said
    for more in ((), ("--force",)):
        said = refused(capsys, place, "apply", "--model", folder, *place.model[2:], "--edit", saved, *more)
        assert "is in the weights already, since before the model was saved" in said and "--force" not in said
    other, both = place.edit(capsys, "other.st", "--set", "steps=1"), place.at / "both.st"
    run(capsys, "compose", "--edit", saved, "--edit", other, "--out", both, "--allow-conflicts")
    said = refused(capsys, place, "apply", "--model", folder, *place.model[2:], "--edit", both, "--force")
    assert "is in the weights already" in said


def test_a_record_that_cannot_be_read_is_refused(place: Place, edited: tuple[Path, Path], capsys: Capture) -> None:
    file = edited[1] / "fastmemit.json"
    record = json.loads(file.read_text())
    for wrong, why in (
        ("{", "Expecting"),
        ("[]", "not of the format fastmemit-model"),
        (json.dumps({**record, "version": 2}), "version 2"),
        (json.dumps({**record, "base": {"name": 1}}), "does not name the base model"),
        (json.dumps({**record, "edits": [{"digest": 1}]}), "list of edits"),
    ):
        file.write_text(wrong)
        said = refused(capsys, place, "show", edited[1])
        assert "says which edits are in the model and cannot be read" in said and why in said


def test_undo_gives_the_base_model_back(place: Place, edited: tuple[Path, Path], capsys: Capture) -> None:
    saved, folder = edited
    options = ("--model", folder, *place.model[2:])
    back = place.at / "back"
    out = run(capsys, "undo", *options, "--edit", saved, "--base", place.model[1], "--save-model", back)
    assert "1 edit taken out of edited" in out and re.search(r"of 2 facts the model said \d and says 0 now", out)
    assert "the weights are bit for bit those of tiny-llama\n" in out and not (back / "fastmemit.json").exists()
    before, after = (load_file(Path(path) / "model.safetensors") for path in (place.model[1], back))
    assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)
    line = refused(capsys, place, "undo", *place.model, "--edit", saved, "--save-model", place.at / "x")
    assert "is the model that" in line and "without it" in line
    other, strange = place.edit(capsys, "other.st", "--set", "steps=1"), place.other_model()[1]
    line = refused(capsys, place, "undo", *options, "--edit", other, "--save-model", place.at / "x")
    assert "was saved with 1 edit and" in line and "is none of them" in line
    line = refused(capsys, place, "undo", *options, "--edit", saved, "--base", strange, "--save-model", place.at / "x")
    assert "and the edit was made for" in line


def test_undo_subtracts_where_the_base_model_is_not_here(
    place: Place, edited: tuple[Path, Path], capsys: Capture
) -> None:
    saved, folder = edited
    back = place.at / "back"
    out = run(capsys, "undo", "--model", folder, *place.model[2:], "--edit", saved, "--save-model", back)
    before, after = (load_file(Path(path) / "model.safetensors") for path in (place.model[1], back))
    same = all(torch.equal(after[name], weight) for name, weight in before.items())
    assert ("bit for bit" in out) == same and ("the base model 'tiny-llama' is not here (pass --base)" in out) != same
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, rtol=0, atol=1e-5)


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
    assert found["facts"][1].startswith("The capital of France is -> Berlin (before: ") and found["parts"] == []
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
        (["edit", "--model", "m", "--multiplier", "x"], "must be a number or auto but is 'x'; see fastmemit edit"),
        (["evaluate", "--model", "m", "--batch-size", "x"], "--batch-size: must be a whole number but is 'x'"),
        (["stats", "plan", "--share", "half"], "--share: must be a number but is 'half'"),
        (["edit", "--model", "m", "--facts", "couterfact", "--out", "e"], "its path. Did you mean 'counterfact'?"),
        (["hub", "push", "--repo", "a/b"], "by one of --edit FILE, --adapter DIR and --statistics DIR"),
        (["hub", "push", "--repo", "a/b", "--edit", "e", "--statistics", "s"], "by one of --edit FILE"),
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


TYPED = [
    ("ex", ["experiment"]),
    ("experiment se", ["sequential"]),
    ("experiment sweep --mul", ["--multipliers"]),
    ("edit --method ro", ["rome"]),
    ("edit --method rome --prec", []),  # a flag of another verb
    ("edit --facts ro", []),  # the shell goes on with file names
    ("edit --quiet --strict --sav", ["--save-model"]),
    ("completion ", ["bash", "zsh", "fish", "--json", "--help"]),
]


def completed(shell: str, script: str, ask: str) -> list[str]:
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell}")
    options = {"bash": ["--norc"], "zsh": ["-f"], "fish": ["--no-config"]}[shell]
    done = subprocess.run([shell, *options, "-c", f"{script}\n{ask}"], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return sorted(done.stdout.split())


@pytest.mark.parametrize(("typed", "words"), TYPED)
def test_bash_completes_verbs_flags_and_values(capsys: Capture, typed: str, words: list[str]) -> None:
    last = " ''" if typed.endswith(" ") else ""
    ask = (
        f"COMP_WORDS=(fastmemit {typed}{last})\n"
        'COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _fastmemit; echo "${COMPREPLY[@]}"'
    )
    assert completed("bash", run(capsys, "completion", "bash"), ask) == sorted(words)


@pytest.mark.parametrize(("typed", "words"), TYPED)
def test_fish_completes_the_same(capsys: Capture, typed: str, words: list[str]) -> None:
    assert completed("fish", run(capsys, "completion", "fish"), f"complete -C 'fastmemit {typed}'") == sorted(words)


@pytest.mark.parametrize(("typed", "words"), TYPED)
def test_zsh_is_offered_the_same(capsys: Capture, tmp_path: Path, typed: str, words: list[str]) -> None:
    last = " ''" if typed.endswith(" ") else ""
    # As zsh's own stand-in for bash calls a function; what fits what was begun is then chosen by zsh.
    ask = (
        "(( $+_comps[fastmemit] )) || echo undeclared\n"
        f"() {{ emulate -L sh; COMP_WORDS=(fastmemit {typed}{last}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))\n"
        '_fastmemit; echo "${COMPREPLY[@]}"; }'
    )
    ready = f"autoload -U compinit && compinit -u -d {tmp_path}/dump"
    offered = completed("zsh", f"{ready}\n{run(capsys, 'completion', 'zsh')}", ask)
    begun = typed.rpartition(" ")[2]
    assert [word for word in offered if word.startswith(begun)] == sorted(words)


def test_a_table_is_ruled_on_a_terminal_and_commands_it_nowhere(capsys: Capture, monkeypatch: Any) -> None:
    rows = [["", "before", "after"], ["ES", "1.00", "100.00"], ["a\x1b[2J[red]"]]
    show_table(rows)
    plain = capsys.readouterr().out
    assert plain == "               before   after\nES               1.00  100.00\na\\x1b[2J[red]\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    show_table(rows)
    ruled = capsys.readouterr().out
    assert "───" in ruled and "100.00" in ruled and r"a\x1b[2J[red]" in ruled and "\x1b" not in ruled


def test_what_else_changed_is_shown_and_written_as_a_page(place: Place, capsys: Capture) -> None:
    checks, html, saved = place.at / "checks.txt", place.at / "page.html", place.at / "edit.st"
    checks.write_text("The piano is in\n")
    out = run(capsys, "edit", *place.model, *EDIT, "--corpus", place.corpus, "--multiplier", "4", "--facts",
              place.requests, "--check", "I play", "--check-file", checks, "--html", html, "--out", saved)  # fmt: skip
    told = out.partition("probability of the former answer, before -> after, and what is said now:\n")[2]
    lines = told.splitlines()
    for line, prompt in zip(lines[:2], ("The piano is in", "I play"), strict=True):
        assert re.match(rf" +[\d.]+% -> +[\d.]+%  {prompt} .* \((as before|now: .*)\)$", line)
    assert lines[2] == f"page written to {html}"
    written = html.read_text()
    assert written.count("<article>") == 4 and "The capital of France is" in written and "by memit" in written
    again = place.at / "again.html"
    run(capsys, "apply", *place.model, "--edit", saved, "--check", "I play", "--check-file", checks, "--html", again)
    assert again.read_text() == written
    line = refused(capsys, place, "apply", *place.model, "--edit", saved, "--html", place.at / "no" / "page.html")
    assert "does not exist" in line
