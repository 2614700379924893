"""``fastmemit experiment sweep``: killed by the system and started again, divided, put together, refused."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tiny_commands import Place, refused, run

GRID = ("--methods", "emmet,memit", "--multipliers", "0.5,2,full", "--batch-sizes", "1,2",
        "--num-batches", "2,1", "--vary", "layers=1,steps=3", "--vary", "layers=1,steps=3,relative_ridge=0.01",
        "--only-varied")  # fmt: skip


def argv(place: Place, out: Path, *more: Any) -> list[Any]:
    return ["experiment", "sweep", *place.model, "--facts", place.records, "--corpus", place.corpus, *GRID,
            "--out", out, *more]  # fmt: skip


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


@pytest.fixture
def unbroken(place: Place, capsys: pytest.CaptureFixture[str]) -> Path:
    out = place.at / "unbroken"
    said = run(capsys, *argv(place, out))
    assert "24 cells in" in said and "emmet/b1x2/x0.5+layers=[1]+steps=3" in said
    assert said.splitlines()[0].split() == [
        "ES", "PS", "NS", "S", "EA", "PA", "NA", "perplexity",
    ]  # fmt: skip
    return out


def test_it_divides_its_cells_and_puts_them_together(
    place: Place, unbroken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = place.at / "shards"
    assert "shard 1 of 2 is done: 12 of 24 cells" in run(capsys, *argv(place, out, "--shard", "1/2"))
    assert "shard 2 of 2 is done: 24 of 24 cells" in run(capsys, *argv(place, out, "--shard", "2/2"))
    run(capsys, *argv(place, out))
    assert (out / "results.jsonl").read_bytes() == (unbroken / "results.jsonl").read_bytes()
    assert (out / "sweep.json").read_bytes() == (unbroken / "sweep.json").read_bytes()
    header = json.loads((out / "sweep.json").read_text())
    assert header["data"]["name"] == place.records.name and len(header["data"]["sha256"]) == 64
    assert str(place.at) not in (out / "sweep.json").read_text()


def test_a_fixed_list_of_records_is_edited_in_its_order(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    out, cases = place.at / "fixed", place.at / "cases.txt"
    numbers = [record["case_id"] for record in json.loads(place.records.read_text())][3:0:-1]
    cases.write_text("\n".join(map(str, numbers)))
    one = (
        "--methods",
        "emmet",
        "--multipliers",
        "0.5",
        "--batch-sizes",
        "1",
        "--num-batches",
        "3",
        "--vary",
        "steps=1",
    )
    run(capsys, *argv(place, out, *one, "--cases", cases))
    assert {tuple(record["case_id"] for record in cell["records"]) for cell in lines(out)} == {tuple(numbers)}
    assert json.loads((out / "sweep.json").read_text())["data"]["cases"]["name"] == "cases.txt"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is not there")
def test_killed_by_the_system_it_goes_on_to_the_same_lines(place: Place, unbroken: Path) -> None:
    out = place.at / "killed"
    root = Path(__file__).resolve().parents[3]
    paths = os.pathsep.join((str(root), str(root / "python")))
    command = [sys.executable, "-m", "fastmemit", *map(str, argv(place, out))]
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    draw = random.Random(1)
    for attempt in range(30):
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        if attempt < 2:
            # Killed at some moment after some more cells were finished.
            wanted = draw.randrange(1, 5)
            before = _finished(out)
            while process.poll() is None and _finished(out) < before + wanted:
                time.sleep(0.01)
            time.sleep(draw.random() * 0.1)
            process.send_signal(signal.SIGKILL)
        err = process.communicate()[1]
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, err
    assert attempt >= 2, "it was never killed"
    assert lines(out) == lines(unbroken)


def _finished(out: Path) -> int:
    path = out / "results.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--methods", "memit,mend"), "'mend'"),
        (("--multipliers", "0"), "'0'"),
        (("--num-batches", "16:1"), "'16:1'"),
        (("--batch-sizes", "7"), "2 numbers of batches for 1 batch sizes"),
        (("--batch-sizes", "64", "--num-batches", "5"), "too few"),
        (("--shard", "3/2"), "'3/2'"),
        (("--seeds", "x"), "'x'"),
        (("--vary", "clamp"), "'clamp'"),
        (("--vary", "clamp=-1"), "clamp must be"),
        (("--vary", "layers=1,steps=3"), "twice"),
        (("--corpus", "self"), "many times"),
        (("--corpus", "nowhere.txt"), "nowhere.txt"),
        (("--facts", "nowhere.json"), "nowhere.json"),
        (("--text", "nowhere.txt"), "nowhere.txt"),
    ],
)
def test_bad_input_is_refused_before_any_work(
    place: Place, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], said: str
) -> None:
    assert said in refused(capsys, place, *argv(place, place.at / "out", *more))


def test_a_file_is_no_folder_for_results(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is a file; name a folder" in refused(capsys, place, *argv(place, place.records))
