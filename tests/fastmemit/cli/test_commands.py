"""The whole way on the command line: precompute, edit, apply, evaluate, on a tiny model folder."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastmemit import __version__
from fastmemit.cli import VERBS, main
from fastmemit.delta import Delta
from fastmemit.methods import CONFIGS
from tiny_commands import EDIT, Place, refused, run


def test_every_verb_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert VERBS.keys() == {
        "demo", "precompute", "edit", "apply", "show", "undo", "compose", "evaluate", "doctor",
        "completion", "stats plan", "stats export", "stats import", "adapter export", "adapter import", "hub push",
        "hub pull", "experiment sweep", "experiment sequential", "experiment locate",
        "experiment report", "experiment downstream",
    }  # fmt: skip
    modelless = {"experiment report", "stats plan", "compose", "hub push", "adapter export", "show", "doctor",
                 "completion"}  # fmt: skip
    for verb in VERBS:
        with pytest.raises(SystemExit) as left:
            main([*verb.split(), "--help"])
        out = capsys.readouterr().out
        assert left.value.code == 0
        assert "examples:\n" in out and f"fastmemit {verb}" in out.partition("examples:")[2]
        for option in ("--model", "--seed", "--device", "--dtype"):
            runs = verb not in modelless
            assert runs == (option in out) or (verb, option) == ("adapter export", "--model")
        assert all(len(line) <= 100 for line in out.splitlines())


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """What another interpreter says to some code, with nothing in its environment but this."""
    env = {"PYTHONPATH": ":".join(sys.path), "PATH": "", **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env)


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; from fastmemit.cli import main\n"
        "try: main(['edit', '--help'])\n"
        "except SystemExit: pass\n"
        "slow = {'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'loaded {slow}' if slow else 0)"
    )
    done = python(code)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("busy", "said", "spins"),
    [
        (True, {}, "'1000'"),
        (False, {"GOMP_SPINCOUNT": "5"}, "'5'"),
        (True, {"GOMP_SPINCOUNT": "7"}, "'7'"),
        (True, {"OMP_WAIT_POLICY": "passive"}, "'0'"),
    ],
)
def test_threads_wait_briefly_on_a_busy_machine(busy: bool, said: dict[str, str], spins: str) -> None:
    """What GCC's OpenMP has read by the time that torch is loaded, which it says itself."""
    code = (
        "import sys, fastmemit.cli as cli\n"
        "def run(args): import torch\n"
        f"cli._busy = lambda: {busy}\n"
        "cli.VERBS['doctor'] = __import__('dataclasses').replace(cli.VERBS['doctor'], run=run)\n"
        "sys.argv = ['fastmemit', 'doctor']\n"
        "sys.exit(cli.main())"
    )
    done = python(code, OMP_DISPLAY_ENV="verbose", **said)
    assert done.returncode == 0, done.stderr
    found = [line.split(" = ")[1] for line in done.stderr.splitlines() if "GOMP_SPINCOUNT" in line]
    if not found:
        pytest.skip("torch brings another OpenMP than GCC's")
    assert set(found) == {spins}


@pytest.mark.parametrize("words", [["doctor"], ["precompute", "--model", "x", "--quiet"]])
def test_no_library_draws_its_bars_into_a_log(words: list[str]) -> None:
    code = (
        "import sys, fastmemit.cli as cli\n"
        "def run(args):\n"
        "    from tqdm.auto import tqdm\n"
        "    list(tqdm(range(3), desc='Converting'))\n"
        "for name in ('doctor', 'precompute'):\n"
        "    cli.VERBS[name] = __import__('dataclasses').replace(cli.VERBS[name], run=run)\n"
        f"sys.argv = ['fastmemit', *{words!r}]\n"
        "sys.exit(cli.main())"
    )
    done = python(code)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_quiet_machine_waits_as_libgomp_does(monkeypatch: pytest.MonkeyPatch) -> None:
    import fastmemit.cli as cli

    for busy in (True, False):
        for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
            monkeypatch.setenv(name, "")  # so that what is set below is taken back
            monkeypatch.delenv(name)
        monkeypatch.setattr(cli, "_busy", lambda busy=busy: busy)
        cli._wait_briefly()
        assert ("GOMP_SPINCOUNT" in os.environ) == busy


def test_the_callers_process_waits_as_it_did(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    with pytest.raises(SystemExit):
        main(["--version"])
    assert "GOMP_SPINCOUNT" not in os.environ


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0 and capsys.readouterr().out == f"fastmemit {__version__}\n"


def test_the_examples_are_commands_that_parse(capsys: pytest.CaptureFixture[str]) -> None:
    import shlex

    from fastmemit.cli import EPILOG, parser

    texts = [EPILOG, *(verb.epilog for verb in VERBS.values())]
    examples = [
        shlex.split(line.partition(" > ")[0])  # where its output goes is the shell's business
        for text in texts
        for line in text.replace("\\\n", " ").splitlines()
        if line.startswith("  fastmemit ")
    ]
    assert len(examples) > 10
    for example in examples:
        assert example[0] == "fastmemit"
        parser().parse_args(example[1:])


def test_a_strict_edit_that_misses_saves_nothing(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "precompute", *place.model, "--corpus", place.corpus, "--multiplier", "4",
        "--layers", "0-1")  # fmt: skip
    saved, folder = place.at / "edit.safetensors", place.at / "edited"
    arguments = ["edit", *place.model, *EDIT, "--set", "steps=1", "--prompt", "{} is in",
                 "--subject", "Paris", "--target", "Rome", "--join", "", "--out", str(saved),
                 "--save-model", str(folder)]  # fmt: skip
    assert main([*arguments, "--strict"]) == 1
    out, err = capsys.readouterr()
    assert "0 of 1 fact is now what the model says; not: Paris is inRome (says: " in out
    assert "Not every fact is what the model says, so nothing was saved." in err
    assert not saved.exists() and not folder.exists()
    assert main(arguments) == 0
    assert Delta.load(saved).requests[0]["join"] == "" and folder.is_dir()


def test_an_edit_preserves_a_text_and_says_its_weight(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    text, found = place.at / "neighbours.txt", place.at / "found.json"
    text.write_text("The mother tongue of Italy is\n\nThe piano is in\n")
    plain = Delta.load(place.edit(capsys, "plain.safetensors"))
    out = run(capsys, "edit", *place.model, *EDIT, "--facts", place.requests, "--preserve", text,
              "--preserve-weight", "0.5", "--json", found, "--out", place.at / "kept.safetensors")  # fmt: skip
    kept = Delta.load(place.at / "kept.safetensors")
    about = kept.provenance["preserved_text"]
    assert f"preserved beside C: {about['tokens']} tokens of neighbours.txt, 0.5 of a fact each\n" in out
    assert about["texts"] == 2 and json.loads(found.read_text())["preserved_text"] == about
    assert kept.digest() != plain.digest() and "preserved_text" not in plain.provenance
    arguments = ["edit", *place.model, *EDIT, "--facts", place.requests, "--out", place.at / "none.safetensors"]
    said = refused(capsys, place, *arguments, "--preserve-weight", "2")
    assert said == "--preserve-weight weighs the text of --preserve FILE; give one."
    assert "does not exist" in refused(capsys, place, *arguments, "--preserve", place.at / "gone.txt")
    said = refused(capsys, place, *arguments, "--preserve", text, "--preserve-weight", "0")
    assert said == "The weight of preserved text must be a finite number above 0 but is 0.0."


def test_from_statistics_to_scores(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, "precompute", *place.model, "--corpus", place.corpus, "--multiplier", "4",
              "--layers", "0-1")  # fmt: skip
    assert "second moments of 2 layers, corpus" in out and "multiplier 4, 256 keys" in out
    files = [Path(line.strip()) for line in out.splitlines() if line.startswith("  ")]
    assert len(files) == 2 and all(file.is_file() for file in files)

    saved, folder = place.at / "edit.safetensors", place.at / "edited"
    out = run(capsys, "edit", *place.model, *EDIT, "--facts", place.requests, "--out", saved,
              "--save-model", folder)  # fmt: skip
    assert "multiplier 4, 256 keys (stored)" in out
    assert "layers 0, 1 of" in out and " of 2 facts are now what the model says" in out
    rows = re.findall(r"^ +([\d.]+)% -> +([\d.]+)%  (.*) \(before: .*\)$", out, re.MULTILINE)
    assert [row[2] for row in rows] == [
        "Eiffel Tower is located in the city of Rome",
        "The capital of France is Berlin",
    ]
    assert all(float(new) > float(old) for old, new, _ in rows)
    delta = Delta.load(saved)
    assert [r["subject"] for r in delta.provenance["requests"]] == ["Eiffel Tower", "France"]

    # The saved model is the unedited one plus the saved edit, to the bit, and nothing else.
    before = load_file(Path(place.model[1]) / "model.safetensors")
    after = load_file(folder / "model.safetensors")
    assert before.keys() == after.keys()
    for name, weight in before.items():
        if name in delta.factors:
            left, right = delta.factors[name]
            weight = weight + left @ right.T
            assert not torch.equal(before[name], after[name])
        assert torch.equal(weight, after[name])

    again = place.at / "again"
    prompt = "The capital of France is"
    out = run(capsys, "apply", *place.model, "--edit", saved, "--prompt", prompt, "--max-new-tokens", "3",
              "--save-model", again)  # fmt: skip
    assert "1 edit with 2 facts applied" in out and " of 2 facts are now what" in out
    assert re.search(rf"\n{prompt}\n  before: .*\n  after:  .*\n", out)
    third = load_file(again / "model.safetensors")
    assert all(torch.equal(third[name], after[name]) for name in after)

    result = place.at / "out.json"
    out = run(capsys, "evaluate", *place.model, *EDIT, "--facts", place.records, "--batch-size", "2",
              "--num-batches", "2", "--json", result)  # fmt: skip
    assert "4 records in 2 batches" in out and re.search(r"\n +before +after +change\n", out)
    found = json.loads(result.read_text())
    assert len(found["records"]) == 4 and found["settings"]["batches"] == [2, 2]
    for name in ("es", "ps", "ns", "s", "ea", "pa", "na"):
        shown = next(line for line in out.splitlines() if line.split()[:1] == [name.upper()])
        values = [float(value) for value in re.findall(r"([-+]?\d+\.\d\d) \[", shown)]
        before, after = found["before"][name], found["after"][name]
        assert values == pytest.approx([before, after, after - before], abs=0.006)


def test_one_fact_from_options(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    saved = place.at / "one.safetensors"
    out = run(capsys, "edit", *place.model, "--method", "rome", "--set", "layers=1", "--set",
              "steps=2", "--corpus", place.corpus, "--multiplier", "4", "--prompt",
              "The capital of {} is", "--subject", "Italy", "--target", "London", "--out",
              saved)  # fmt: skip
    assert "layers 1 of tiny-llama edited by rome: " in out and "1 fact is now what" in out
    assert Delta.load(saved).provenance["settings"]["steps"] == 2


@pytest.mark.parametrize("method", ["pmet", "encore", "alphaedit"])
def test_relatives_of_memit_from_options(place: Place, capsys: pytest.CaptureFixture[str], method: str) -> None:
    set_to = "null_relative=0.5" if method == "alphaedit" else "ridge=0.5"
    own = ("--method", method, "--set", set_to)
    saved = place.edit(capsys, f"{method}.st", *own)
    settings = Delta.load(saved).provenance["settings"]
    assert settings["method"] == method and settings[set_to.partition("=")[0]] == 0.5
    assert settings.keys() == CONFIGS[method].settings().keys() | {"method", "preset"}
    assert (settings["spread"], settings["stop"]) == {
        "pmet": ("sqrt", "loss"), "encore": ("linear", "most-probable"),
        "alphaedit": ("linear", "loss"),
    }[method]  # fmt: skip
    out = run(capsys, "evaluate", *place.model, *EDIT, *own, "--facts", place.records,
              "--batch-size", "2", "--num-batches", "1")  # fmt: skip
    assert f", {method}, 2 records in 1 batch" in out


def test_the_settings_of_a_method_are_listed_without_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    for line, inside, outside in (
        (["--method", "emmet", "--set", "help"], "lambda_e (0.1)", "null_threshold"),
        (["--set", "help"], "null_threshold (0.02)", "nonsense"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["edit", *line])
        out = capsys.readouterr().out
        assert ended.value.code == 0 and inside in out and outside not in out


def test_a_former_file_is_replaced_and_several_edits_are_applied(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = place.edit(capsys, "a.st"), place.edit(capsys, "b.st", "--set", "steps=1")
    assert Delta.load(first).digest() != Delta.load(second).digest()
    out = run(capsys, "apply", *place.model, "--edit", first, "--edit", second)
    assert "2 edits with 4 facts applied" in out
    place.edit(capsys, "a.st", "--set", "steps=1")
    assert Delta.load(first).digest() == Delta.load(second).digest()


def test_the_dtype_is_that_of_the_option(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "edit", *place.model, *EDIT, "--dtype", "bfloat16", "--device", "cpu", "--corpus",
        place.corpus, "--multiplier", "4", "--facts", place.requests, "--save-model",
        place.at / "bf16")  # fmt: skip
    weights = load_file(place.at / "bf16" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


def test_an_edit_of_another_model_goes_on_by_force(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    saved = place.edit(capsys, "edit.st")
    other = place.other_model()
    assert main(["apply", *other, "--edit", str(saved)]) == 2
    capsys.readouterr()
    out = run(capsys, "apply", *other, "--edit", saved, "--force")
    assert "1 edit with 2 facts applied" in out and " of 2 facts are now what" in out


def test_python_dash_m(place: Place) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastmemit", "apply", "--model", "./none", "--edit", "x"],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": ":".join(p for p in sys.path if p), "PATH": "", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 2
    assert done.stdout == "" and done.stderr.startswith("fastmemit: error: There is no model folder")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_unwinds_the_run_and_is_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int, code: int
) -> None:
    unwound = []

    def run(_args: object) -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        finally:
            unwound.append(True)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setitem(VERBS, "experiment report", dataclasses.replace(VERBS["experiment report"], run=run))
    # What a shell starts behind it ignores Ctrl-C, and so would the run in these tests.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main(["experiment", "report", "nowhere"]) == code
    finally:
        signal.signal(signal.SIGINT, inherited)
    assert unwound == [True] and signal.getsignal(signal.SIGTERM) is before
    word = "interrupted" if code == 130 else "terminated"
    assert capsys.readouterr().err == f"\nfastmemit: {word}; nothing was left half written.\n"
