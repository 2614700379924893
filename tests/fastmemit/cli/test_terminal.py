from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastmemit.cli import main
from fastmemit.cli.terminal import _Printable, show_traceback
from fastmemit.delta import Delta
from tiny_commands import EDIT, Place
from tiny_sweeps import cell, write

#: A title, a cleared screen, red, an overwritten line, an end of line, and letters the other way.
EVIL = "\x1b]0;PWNED\x07\x1b[2J\x9b31m\roverwritten\nfastmemit: all is well\u202egnp"


def stream(encoding: str = "utf-8", bars: bool = False) -> tuple[_Printable, io.BytesIO]:
    raw = io.BytesIO()
    return _Printable(io.TextIOWrapper(raw, encoding, write_through=True), bars=bars), raw


def test_what_is_written_is_printable() -> None:
    out, raw = stream()
    print("safe\ttext", EVIL, "\ud800", file=out)
    lines = raw.getvalue().decode().split("\n")
    assert lines == [
        r"safe\x09text \x1b]0;PWNED\x07\x1b[2J\x9b31m\x0doverwritten".replace(r"\x09", "\t"),
        r"fastmemit: all is well\u202egnp \ud800",
        "",
    ]


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("ascii", b"Caf\\xe9 \\u65e5 \\U0001f469\n"),
        ("latin-1", b"Caf\xe9 \\u65e5 \\U0001f469\n"),
        ("utf-8", "Caf\u00e9 \u65e5 \U0001f469\n".encode()),
    ],
)
def test_what_an_encoding_does_not_have_is_spelled_out(encoding: str, shown: bytes) -> None:
    out, raw = stream(encoding)
    print("Caf\u00e9 \u65e5 \U0001f469", file=out)
    assert raw.getvalue() == shown


def test_bars_move_the_cursor_and_what_they_say_does_not() -> None:
    from tqdm import tqdm

    out, raw = stream(bars=True)
    for _ in tqdm(range(2), desc="a\x1b[2J", file=out, mininterval=0, position=1, ascii=True):  # type: ignore[call-overload]  # a stream of our own
        pass
    said = raw.getvalue().decode()
    assert "\r" in said and "\x1b[A" in said and r"a\x1b[2J" in said
    assert "\x1b" not in said.replace("\x1b[A", "")
    out, raw = stream(bars=True)
    out.write("error: \r\x1b[A\n")
    assert raw.getvalue() == b"error: \\x0d\\x1b[A\n"


def test_an_unexpected_traceback_is_printable(monkeypatch: pytest.MonkeyPatch) -> None:
    out, raw = stream(bars=True)
    monkeypatch.setattr(sys, "stderr", out)
    try:
        raise RuntimeError("\r" + EVIL)
    except RuntimeError as error:
        show_traceback(RuntimeError, error, error.__traceback__)
    said = raw.getvalue().decode()
    assert "RuntimeError: \\x0d\\x1b]0;PWNED" in said and "\x1b" not in said and "\r" not in said


def silent(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str]:
    """A verb's exit and all that it says, in which there may be no control but line ends."""
    try:
        code = main([str(arg) for arg in args])
    except SystemExit as end:
        code = int(end.code or 0)
    said = capsys.readouterr()
    text = said.out + said.err
    assert not [c for c in text if (ord(c) < 32 or 127 <= ord(c) < 160) and c != "\n"]
    assert "\u202e" not in text and "\nfastmemit: all is well" not in text
    return code, text


def evil_delta(model: str, seed: int = 0, **about: object) -> Delta:
    draw = torch.Generator().manual_seed(seed)
    factors = {
        about.pop("weight", "model.layers.0.mlp.down_proj.weight"): (
            torch.randn(32, 1, generator=draw),
            torch.randn(64, 1, generator=draw),
        )
    }
    facts = [{"prompt": "{} is" + EVIL, "subject": f"Rome {seed}" + EVIL, "target": " x" + EVIL,
              "target_true": None}]  # fmt: skip
    provenance = {"model": model, "model_name": "m" + EVIL, "method": "rome" + EVIL,
                  "requests": facts, **about}  # fmt: skip
    return Delta(factors, provenance)  # type: ignore[arg-type]  # a dict for a Provenance


def test_no_field_of_an_edit_reaches_the_terminal_raw(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    from fastmemit.models import fingerprint, load_model

    model = fingerprint(load_model(place.model[1])[0])
    a, b, c, d = (place.at / f"{name}\x1b[2J.safetensors" for name in "abcd")
    evil_delta(model).save(a)
    evil_delta(model, 1).save(b)
    evil_delta("e" * 64, 2).save(c)
    evil_delta(model, 3, weight="model\x1b[2J.weight").save(d)
    both = place.at / "both.safetensors"
    capsys.readouterr()
    code, text = silent(capsys, "compose", "--edit", a, "--edit", b, "--out", both)
    assert code == 0 and r"by rome\x1b]0;PWNED\x07" in text
    code, text = silent(capsys, "compose", "--edit", a, "--edit", c, "--out", both)
    assert code == 2 and "m\\x1b]0;PWNED" in text
    code, text = silent(capsys, "apply", *place.model, "--edit", c)
    assert code == 2 and "made for the model" in text
    code, text = silent(capsys, "apply", *place.model, "--edit", d)
    assert code == 2 and r"model\x1b[2J.weight" in text
    code, text = silent(capsys, "apply", *place.model, "--edit", place.at / "no\x1b[2J")
    assert code == 2 and "no edit file" in text
    code, _ = silent(capsys, "hub", "push", "--repo", "a/b", "--edit", a, "--dry-run", place.at / "dry")
    assert code == 0
    code, text = silent(capsys, "adapter", "export", "--model", place.model[1], "--edit", a,
                        "--out", place.at / "adapter\x1b[2J")  # fmt: skip
    assert code == 0 and r"adapter\x1b[2J" in text


def test_no_field_of_other_files_reaches_the_terminal_raw(
    place: Place, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    sweep = write(tmp_path / "sweep\x1b[2J", [cell("memit", d, (2, 2)) for d in (2.0, None)],
                  model="m" + EVIL)  # fmt: skip
    code, text = silent(capsys, "experiment", "report", sweep)
    assert code == 0 and r"m\x1b]0;PWNED" in text and r"sweep\x1b[2J" in text
    requests = tmp_path / "r\x1b[2J.jsonl"
    requests.write_text(json.dumps({"prompt": "x", "subject": EVIL, "target_new": EVIL}) + "\n")
    code, text = silent(capsys, "edit", *place.model, "--facts", requests, "--out",
                        tmp_path / "e")  # fmt: skip
    assert code == 2 and r"r\x1b[2J.jsonl" in text
    hparams = tmp_path / "h.json"
    hparams.write_text(json.dumps({"alg_name": "MEMIT", "layers": [0], "field" + EVIL: 1}))
    code, text = silent(capsys, "edit", *place.model, "--facts", place.requests, "--config",
                        hparams, "--out", tmp_path / "e")  # fmt: skip
    assert code == 2
    code, text = silent(capsys, "edit", "--model", "x", "--no-such" + EVIL)
    assert code == 2 and r"--no-such\x1b]0;PWNED" in text
    code, text = silent(capsys, "edit", "--model", "nowhere" + EVIL, "--facts", place.requests,
                        "--out", tmp_path / "e")  # fmt: skip
    assert code == 2


@pytest.mark.parametrize("encoding", ["ascii", "cp437"])
def test_an_output_that_is_not_utf8_loses_no_edit(place: Place, encoding: str) -> None:
    fact = {"prompt": "{} liegt \u65e5", "subject": "Z\u00fcrich", "target_new": "Z\u00e9"}
    place.requests.write_text(json.dumps(fact, ensure_ascii=False), encoding="utf-8")
    saved = place.at / f"{encoding}.safetensors"
    found = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-m", "fastmemit", "edit", *place.model, *EDIT, "--out", saved,
         "--facts", place.requests, "--corpus", place.corpus, "--multiplier", "4"],
        env={**os.environ, "LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0",
             "PYTHONIOENCODING": encoding, "PYTHONPATH": found},
        capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert Delta.load(saved).requests[0]["subject"] == "Z\u00fcrich"
    assert b"\\u65e5" in done.stdout


@pytest.mark.skipif(os.name == "nt", reason="descriptors are those of POSIX")
@pytest.mark.parametrize(("closed", "code"), [((1,), 0), ((1,), 2), ((1, 2), 2)])
def test_a_closed_output_is_no_error(tmp_path: Path, closed: tuple[int, ...], code: int) -> None:
    def close() -> None:
        for descriptor in closed:
            os.close(descriptor)

    verb = ["compose", "--edit", tmp_path / "gone", "--out", tmp_path / "both"] if code else ["--help"]
    found = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-m", "fastmemit", *verb],
        env={**os.environ, "PYTHONPATH": found},
        capture_output=True,
        preexec_fn=close,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert (done.stderr == b"") == (2 in closed or not code)


def unread(*words: object) -> subprocess.CompletedProcess[bytes]:
    """A command whose stdout nobody reads: its first write into the pipe is refused."""
    reader, writer = os.pipe()
    os.close(reader)
    found = os.pathsep.join(path for path in sys.path if path)
    try:
        return subprocess.run(
            [sys.executable, "-m", *map(str, words)],
            env={**os.environ, "PYTHONPATH": found},
            stdout=writer,
            stderr=subprocess.PIPE,
            check=False,
        )
    finally:
        os.close(writer)


@pytest.mark.parametrize(
    "words", [("fastcov",), ("fastcov.bench", "--help"), ("fastmemit", "--help"), ("fastmemit", "doctor")]
)
def test_a_reader_that_goes_ends_a_command_quietly(words: tuple[str, ...]) -> None:
    done = unread(*words)
    assert (done.returncode, done.stderr) == (0, b"")


def test_an_edit_is_saved_though_nobody_reads_what_is_said(place: Place) -> None:
    saved = place.at / "unread.safetensors"
    done = unread("fastmemit", "edit", *place.model, *EDIT, "--corpus", place.corpus, "--multiplier", "4",
                  "--facts", place.requests, "--out", saved)  # fmt: skip
    assert done.returncode == 0 and b"ipe" not in done.stderr
    assert len(Delta.load(saved).requests) == 2


def test_a_place_that_is_no_file_is_written_into(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    edit = place.edit(capsys, "for-pipe.safetensors")
    pipe = place.at / "pipe"
    os.mkfifo(pipe)
    reader = subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE)
    assert silent(capsys, "compose", "--edit", edit, "--out", pipe)[0] == 0
    data = reader.communicate(timeout=30)[0]
    (place.at / "read.safetensors").write_bytes(data)
    assert Delta.load(place.at / "read.safetensors").digest() == Delta.load(edit).digest()
