"""What the fuzz found in reports, requests and corpora; `test_found` has the rest."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks import recorded
from benchmarks.fuzz_readers import readers
from fastmemit.data import load_corpus
from fastmemit.errors import BadData, BadRequest, DamagedFile
from fastmemit.experiments.results import collect
from fastmemit.request import EditRequest
from tiny_sweeps import cell, write


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"multiplier": 10**400}, "has multiplier = 1000"),
        ({"jitter": "x"}, "has jitter = 'x'"),
        ({"jitter": {"3": None}}, "jitter, has 3 = None"),
        ({"scores": {"es": 10**400, "ps": None, "ns": None, "s": None}}, "says that ES after"),
        ({"scores": {"es": "x" * 20_000}}, "says that ES after"),
        ({"keys": {"a": "x" * 20_000}}, "has keys = {'a': 'xxx"),
    ],
)
def test_cells_that_no_sweep_wrote(tmp_path: Path, changes: dict, message: str) -> None:
    made: dict[str, Any] = {**cell(), **changes}
    with pytest.raises(DamagedFile, match=message) as caught:
        collect([write(tmp_path, [made])])  # type: ignore[list-item]  # a cell that is none is what it refuses
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("seconds", ["x", None, [], {}, True, -1, 10**400])
def test_seconds_that_are_none(tmp_path: Path, seconds: object) -> None:
    folder = write(tmp_path, [cell()])
    timing = json.loads((folder / "timings.jsonl").read_text())
    timing["seconds"]["plan"] = seconds
    (folder / "timings.jsonl").write_text(json.dumps(timing) + "\n")
    with pytest.raises(DamagedFile, match="seconds, has plan = "):
        collect([folder])


@pytest.mark.parametrize("seconds", [math.nan, math.inf])
def test_seconds_that_are_no_number_of_json(tmp_path: Path, seconds: float) -> None:
    folder = write(tmp_path, [cell()])
    timing = json.loads((folder / "timings.jsonl").read_text())
    timing["seconds"]["plan"] = seconds
    (folder / "timings.jsonl").write_text(json.dumps(timing) + "\n")
    with pytest.raises(BadData, match=r"Line 1 of .*timings\.jsonl.* is not a result .*no number"):
        collect([folder])


@pytest.mark.parametrize(("field", "value"), [("model", 5), ("fingerprint", None), ("methods", []), ("format", "1")])
def test_a_sweep_with_a_field_of_another_type(tmp_path: Path, field: str, value: object) -> None:
    folder = write(tmp_path, [cell()], **{field: value})
    with pytest.raises(DamagedFile, match=f"has {field} = .*; restore it"):
        collect([folder])


def test_a_sweep_with_settings_that_are_none(tmp_path: Path) -> None:
    folder = write(tmp_path, [cell()], methods={"memit": 5})
    with pytest.raises(DamagedFile, match=r"methods, has memit = 5; restore it"):
        collect([folder])


def test_a_run_of_the_bench_with_numbers_that_are_none(tmp_path: Path) -> None:
    path = readers()["bench-run"].make(tmp_path)
    content = json.loads(path.read_text())
    for changes in ({"threads": "x"}, {"machine": "ab"}, {"rows": [5]}, {"versions": 5}):
        path.write_text(json.dumps({**content, **changes}))
        with pytest.raises(recorded.BadInput, match="is damaged"):
            recorded.load(path)


def test_messages_about_requests_stay_short() -> None:
    with pytest.raises(BadRequest) as caught:
        EditRequest(prompt=["x" * 50_000], subject="a", target_new="b")  # type: ignore[arg-type]  # refused for its kind
    assert len(str(caught.value)) < 300
    with pytest.raises(BadRequest) as caught:
        EditRequest.from_dict({"x" * 50_000: 1, "prompt": "{}"})
    assert len(str(caught.value)) < 300


def test_a_byte_order_mark_is_dropped_at_the_start_of_a_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "c.txt"
    path.write_bytes("\ufeffone\n\n\ufefftwo\n\n\ufeff\n".encode())
    corpus = load_corpus(path)
    assert sorted(corpus.documents(0)) == ["one", "\ufeff", "\ufefftwo"]
    assert len(corpus) == 3
