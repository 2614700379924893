"""What the fuzz found, one test each: the file as small as can be, and the sentence it gets now."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from benchmarks import recorded
from benchmarks.fuzz_mutations import with_header
from benchmarks.fuzz_readers import readers
from fastcov import StoreDamaged, load_moment, read_provenance
from fastcov.files import MAX_DEPTH, parse_json
from fastmemit.data import load_requests
from fastmemit.delta import Delta
from fastmemit.errors import BadData, DamagedFile
from fastmemit.experiments.results import check_header, collect, read_lines, read_unedited
from fastmemit.targets import Target, TargetKey, TargetStore
from tiny_sweeps import SWEEP, cell, write


def deep(levels: int, inner: str = "0") -> str:
    return "[" * levels + inner + "]" * levels


def sealed(name: str, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A file whose metadata were changed by somebody who also made the checksums fit."""
    reader = readers()[name]
    path = reader.make(folder)
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    change(header["__metadata__"])
    assert reader.seal is not None
    reader.seal(header, body)
    path.write_bytes(with_header(json.dumps(header), body))
    return path


# -- JSON that is deeper than Python goes ---------------------------------------------------------


@pytest.mark.parametrize("kind", ["list", "object"])
def test_depth_is_bounded_where_json_is_read(kind: str) -> None:
    opening, closing = {"list": ("[", "]"), "object": ('{"a":', "}")}[kind]
    for levels in (1, MAX_DEPTH):
        parse_json(opening * levels + "0" + closing * levels)
    for levels in (MAX_DEPTH + 1, *range(900, 1000), 100_000):
        with pytest.raises(ValueError, match=f"more than {MAX_DEPTH} deep"):
            parse_json(opening * levels + "0" + closing * levels)
    wide = "[" + ", ".join([deep(3)] * 5000) + "]"
    assert len(parse_json(wide)) == 5000


def test_json_is_utf_8_and_nothing_else() -> None:
    assert parse_json('"é"'.encode()) == "é"
    for encoding in ("utf-16", "utf-32", "latin-1"):
        with pytest.raises(ValueError):
            parse_json('"é"'.encode(encoding))


@pytest.mark.parametrize("levels", [200, 480, 950, 990, 5000])
def test_deep_values_are_refused_by_every_reader(tmp_path: Path, levels: int) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"key": {deep(levels)}}}\n')
    with pytest.raises(BadData, match=r"Line 1 of .* is not a result .*100 deep"):
        read_lines(path)
    path.write_text(f'{{"prompt": {deep(levels)}}}\n')
    with pytest.raises(BadData, match=r"Line 1 of .* cannot be read as JSON .*100 deep"):
        load_requests(path)
    folder = write(tmp_path / "sweep", [cell()], data="HERE")
    header = (folder / "sweep.json").read_text()
    (folder / "sweep.json").write_text(header.replace('"HERE"', deep(levels)))
    with pytest.raises(DamagedFile, match=r"sweep\.json is not JSON .*100 deep"):
        collect([folder])
    with pytest.raises(BadData, match=r"not the header of a sweep .*100 deep"):
        check_header(folder / "sweep.json", SWEEP)
    path.write_text(deep(levels))
    with pytest.raises(BadData, match=r"not what was written .*100 deep"):
        read_unedited(path, "f", [1])
    with pytest.raises(recorded.BadInput, match=r"is not JSON .*100 deep"):
        recorded.load(path)
    for name, read, error in (("moment", load_moment, StoreDamaged), ("delta", Delta.load, DamagedFile)):
        home = tmp_path / name
        home.mkdir()
        bad = sealed(name, home, lambda about: about.update(provenance=f'{{"a":{deep(levels)}}}'))
        with pytest.raises(error, match="has no readable provenance"):
            read(bad)


# -- what is no file ------------------------------------------------------------------------------


def test_nobody_waits_for_a_pipe_or_reads_a_device_to_its_end(tmp_path: Path) -> None:
    pipe, device = tmp_path / "results.jsonl", tmp_path / "zero"
    os.mkfifo(pipe)
    device.symlink_to("/dev/zero")
    for path in (pipe, device, tmp_path):
        with pytest.raises(StoreDamaged, match="is not a file"):
            load_moment(path)
        with pytest.raises(StoreDamaged, match="is not a file"):
            read_provenance(path)
        with pytest.raises(BadData, match="is not a file"):
            read_lines(path)
        with pytest.raises(recorded.BadInput, match="is not a file"):
            recorded.load(path)


# -- headers that somebody made -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d": None}, "says None for its d"),
        ({"d": "x"}, "says 'x' for its d"),
        ({"d": "-5"}, "says '-5' for its d"),
        ({"d": "9" * 5000}, "says '9999.* for its d"),
        ({"d": "0"}, r"holds a sum of shape \(15,\) for a width of 0"),
        ({"count": "-1"}, "says '-1' for its count"),
        ({"count": "²"}, "says '²' for its count"),
        ({"format": "²", "count": None}, "says None for its count"),
        ({"dtype": None}, "and says None"),
        ({"dtype": "9" * 5000}, "and says '999"),
        ({"provenance": None}, "no readable provenance"),
        ({"provenance": "[]"}, "not an object"),
        ({"provenance": "{"}, "no readable provenance"),
    ],
)
def test_forged_metadata_of_a_moment(tmp_path: Path, changes: dict, message: str) -> None:
    def change(about: dict[str, Any]) -> None:
        about.update(changes)
        for name in [name for name, value in changes.items() if value is None]:
            del about[name]

    path = sealed("moment", tmp_path, change)
    with pytest.raises(StoreDamaged, match=message) as caught:
        load_moment(path)
    assert len(str(caught.value)) < 400


def test_the_seal_of_a_target_covers_shapes_and_dtypes(tmp_path: Path, caplog) -> None:
    target, key = Target(torch.randn(8), torch.randn(8), (3.0, 2.5)), TargetKey("{}")

    def put(header_change: Callable[[dict[str, Any]], None]) -> Target | None:
        TargetStore(tmp_path).put(key, target)
        (path,) = tmp_path.rglob("*.safetensors")
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        header_change(header)
        path.write_bytes(with_header(json.dumps(header), data[8 + size :]))
        return TargetStore(tmp_path).get(key)

    assert put(lambda header: None) is not None
    changes: list[dict[str, Any]] = [
        {"shape": [2, 4]}, {"dtype": "I32"}, {"dtype": "BF16", "shape": [16]},
        {"shape": [1] * 70 + [8]},
    ]  # fmt: skip
    for entry in changes:
        assert put(lambda header, e=entry: header["vector"].update(e)) is None
    assert put(lambda header: header["losses"].update(shape=[2, 1])) is None
    # The same bytes in the same order, with the border between two tensors moved.
    path = next(tmp_path.rglob("*.safetensors"))
    seal = json.loads(path.read_bytes()[8:].partition(b"}}")[0] + b"}}")["__metadata__"]
    parts = torch.cat([target.start, target.vector])
    moved = {"losses": torch.tensor([3.0], dtype=torch.float64), "start": parts[:9].clone(),
             "vector": parts[7:].clone()}  # fmt: skip
    path.write_bytes(save(moved, {name: str(value) for name, value in seal.items()}))
    assert TargetStore(tmp_path).get(key) is None
    assert "has changed on the disk and is made again" in caplog.text


# -- fields of another type -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "5", "null", '"x"', "[]", "{}", '{"fingerprint": "f"}',
        '{"fingerprint": "f", "cases": [1]}',
        '{"fingerprint": "f", "cases": [1], "scores": 5}',
        '{"fingerprint": "f", "cases": [1], "scores": "x"}',
        '{"fingerprint": "f", "cases": [1], "scores": [5]}',
        '{"fingerprint": "f", "cases": [1], "scores": [{}]}',
        '{"fingerprint": "f", "cases": [1], "scores": [{"case_id": [1]}]}',
        '{"fingerprint": "f", "cases": [1], "scores": [{"case_id": 2}]}',
        '{"fingerprint": "f", "cases": [1], "scores": []}',
    ],
)  # fmt: skip
def test_unedited_scores_that_are_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "unedited.json"
    path.write_text(text)
    with pytest.raises(BadData, match=r"is not what was written .*; delete it"):
        read_unedited(path, "f", [1])
    path.write_text('{"fingerprint": "f", "cases": [1], "scores": [{"case_id": 1, "es": 1}]}')
    assert read_unedited(path, "f", [1]) == {1: {"case_id": 1, "es": 1}}
    assert read_unedited(path, "g", [1]) is None and read_unedited(path, "f", [2]) is None
