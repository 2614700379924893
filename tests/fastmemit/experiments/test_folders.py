from __future__ import annotations

import json
import logging
import lzma
from pathlib import Path
from typing import Any

import pytest

from fastmemit.errors import BadData, DamagedFile, FastmemitError, WrongModel
from fastmemit.experiments.results import collect, settings_name
from tiny_sweeps import cell, grid, record, sequences, write


def test_shards_and_folders_become_one_ordered_set(tmp_path: Path) -> None:
    cells = grid()
    whole = collect([write(tmp_path / "whole", cells)])
    shared = collect([write(tmp_path / "shards", cells[::-1], shards=4)])
    halves = [write(tmp_path / "a", cells[20:]), write(tmp_path / "b", cells[:24])]
    assert collect(halves).cells == shared.cells == whole.cells
    keys = [found["key"] for found in whole.cells]
    assert sorted(keys) == sorted(found["key"] for found in cells)
    assert keys[:6] == [f"emmet/b1x40/{m}" for m in ("x1", "x2", "x3", "x4", "x10", "full")]
    assert len(whole.timings) == len(cells)


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write(tmp_path, [cell(multiplier=m) for m in (1.0, 2.0)])
    path = folder / "results.jsonl"
    path.write_bytes(path.read_bytes()[:-100])
    with caplog.at_level(logging.WARNING):
        assert [found["multiplier"] for found in collect([folder]).cells] == [1.0]
    assert "results.jsonl ends in the middle of a line" in caplog.text


def test_a_damaged_line_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, [cell(multiplier=m) for m in (1.0, 2.0)])
    path = folder / "results.jsonl"
    first, second = path.read_text().splitlines()
    path.write_text(f"{first[:-100]}\n{second}\n")
    with pytest.raises(BadData, match=r"Line 1 of '.*results.jsonl' is not a result"):
        collect([folder])


def test_one_cell_with_two_results_is_refused(tmp_path: Path) -> None:
    one, other = cell(), cell()
    other["keys"] += 1
    folders = [write(tmp_path / "a", [one]), write(tmp_path / "b", [other])]
    with pytest.raises(BadData, match=r"different results of memit/b4x10/x2; .* report on them apart"):
        collect(folders)


def test_folders_of_two_models_are_refused(tmp_path: Path) -> None:
    folders = [
        write(tmp_path / "a", [cell()], model="gpt2"),
        write(tmp_path / "b", [cell(multiplier=3.0)], model="gpt2-xl", fingerprint="0" * 64),
    ]
    with pytest.raises(WrongModel, match=r"the model gpt2 and .* of gpt2-xl"):
        collect(folders)


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("dtype", "bfloat16", "dtype"),
        ("data", {"name": "other.json", "sha256": "0"}, "data"),
        ("seed", 1, "seed"),
        ("methods", {"memit": {"layers": [3], "clamp": 1.0}}, "settings of memit"),
    ],
)
def test_folders_that_cannot_be_compared_are_refused(tmp_path: Path, field: str, value: Any, named: str) -> None:
    folders = [write(tmp_path / "a", [cell()]), write(tmp_path / "b", [cell()], **{field: value})]
    with pytest.raises(BadData, match=f"The {named} of .* cannot be compared"):
        collect(folders)


def test_another_method_or_text_may_be_in_another_folder(tmp_path: Path) -> None:
    rome = {"methods": {"rome": {"layers": [5]}}, "perplexity": {"name": "text"}}
    folders = [write(tmp_path / "a", [cell()]), write(tmp_path / "b", [cell("rome")], **rome)]
    assert [found["method"] for found in collect(folders).cells] == ["memit", "rome"]


def test_folders_without_results_are_refused(tmp_path: Path) -> None:
    for folders, message in (
        ([], "No folder to report on"),
        ([tmp_path / "nowhere"], "nowhere' does not exist"),
        ([tmp_path], "holds neither sweep.json nor sequential.json"),
        ([write(tmp_path / "empty", [])], "No finished cell in"),
    ):
        with pytest.raises(BadData, match=message):
            collect(folders)


@pytest.mark.parametrize(("text", "said"), [("{", "is not JSON"), ("[]", "lacks the field 'format'")])
def test_a_damaged_description_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (write(tmp_path, [cell()]) / "sweep.json").write_text(text)
    with pytest.raises(DamagedFile, match=said):
        collect([tmp_path])


def _without(name: str) -> dict[str, Any]:
    return {key: value for key, value in cell().items() if key != name}


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (_without("settings"), "lacks the field 'settings'"),
        (cell() | {"bos": 1}, "has bos = 1;"),
        (cell() | {"seed": True}, "has seed = True;"),
        (cell() | {"multiplier": -2}, "has multiplier = -2"),
        (cell() | {"records": []}, "has no records"),
        (cell() | {"records": [record(3, 1.0)] * 2}, "has case 3 twice"),
        (cell() | {"records": [record(3, 1.5)]}, "after the edit of case 3, has es = 1.5"),
        (cell() | {"batch_size": 0}, "has batch_size = 0"),
        (cell() | {"batch_size": -1}, "has batch_size = -1"),
        (cell() | {"batches": 10**18}, "has batches = 1000000000000000000"),
        (cell() | {"batch_size": 5}, "has 40 records, and its batches make 50"),
        (cell() | {"batch_size": 2**30, "batches": 2**30}, "make 1,152,921,504,606,846,976"),
        (cell() | {"keys": -1}, "has keys = -1"),
        (cell() | {"keys": 10**400}, "has keys = 1000"),
        (cell() | {"seed": -1}, "has seed = -1"),
        (cell() | {"seed": 10**40}, "has seed = 1000"),
        (cell() | {"method": ""}, "has no method"),
        (cell() | {"perplexity": {"before": 0, "after": 3.0}}, "before = 0, which is not from 1 "),
        (cell() | {"perplexity": {"before": 2.0, "after": -1}}, "after = -1, which is not from 1 "),
        (cell() | {"perplexity": {"before": 2.0, "after": 0.99}}, "after = 0.99, which"),
        (cell() | {"perplexity": {"before": 10**400, "after": 2.0}}, "before = 1000"),
        (cell() | {"perplexity": {"before": 2.0, "after": 2, "tokens": 0}}, "has tokens = 0"),
        (cell() | {"jitter": {"3": -1}}, "jitter, has 3 = -1"),
        (cell() | {"records": [7]}, "lacks the field 'case_id'"),
        (cell() | {"perplexity": {"before": 3.0}}, "perplexity, lacks the field 'after'"),
        (cell() | {"scores": dict(es=1, ps=2, ns=3, s=4)}, "says that ES after the edits is 1, and"),
        (cell() | {"before": dict(es=None)}, "says that ES before the edits is None, and"),
    ],
)
def test_a_cell_that_no_sweep_writes_is_refused(tmp_path: Path, value: Any, said: str) -> None:
    write(tmp_path, [])
    (tmp_path / "results.jsonl").write_text(json.dumps(value) + "\n")
    with pytest.raises(DamagedFile) as error:
        collect([tmp_path])
    assert said in str(error.value)
    assert "'memit/b4x10/x2'" in str(error.value)
    assert str(error.value).endswith("delete the line, and the sweep will run its cell again.")
    assert isinstance(error.value, FastmemitError)


def test_nan_is_no_number_of_a_result(tmp_path: Path) -> None:
    write(tmp_path, [cell() | {"records": [record(3, float("nan"))]}])
    with pytest.raises(BadData, match="NaN is no number"):
        collect([tmp_path])


def test_a_perplexity_without_bound_is_read(tmp_path: Path) -> None:
    write(tmp_path, [cell() | {"perplexity": {"before": 36.5, "after": "inf"}}])
    found = collect([tmp_path]).cells[0]["perplexity"]
    assert found == {"before": 36.5, "after": float("inf")}


def test_sequences_of_several_folders_are_told_apart_by_their_settings(tmp_path: Path) -> None:
    folders = [sequences(tmp_path / name, {"ridge": ridge, "clamp": 1}) for name, ridge in (("a", 0.0), ("b", 0.1))]
    found = collect(folders)
    assert found.sequential and [line["settings"] for line in found.cells] == [{"ridge": 0.0}, {"ridge": 0.1}]
    assert [timing["seconds"] for timing in found.timings] == [{"sequences": 1.5}] * 2
    assert collect(folders[:1]).cells[0]["settings"] == {}
    with pytest.raises(BadData, match="some are of sweeps and some of sequences; report on these apart"):
        collect([folders[0], write(tmp_path / "sweep", [cell()])])


@pytest.mark.parametrize(("name", "value"), [("failed", "0"), ("method", {}), ("run", 5), ("keys", -1)])
def test_a_step_that_no_run_writes_is_refused(tmp_path: Path, name: str, value: Any) -> None:
    folder = sequences(tmp_path / "a", {}, **{name: value})
    with pytest.raises(DamagedFile, match=rf"The step 'memit/b2x1/x2/plain/1' of .* has {name} = .*; delete the lines"):
        collect([folder])


def test_a_bad_line_of_a_sequence_names_its_run_as_what_goes(tmp_path: Path) -> None:
    """Without the one step its run would count as finished."""
    folder = sequences(tmp_path / "a", {}, perplexity="HERE")
    path = folder / "sequential.jsonl"
    path.write_text(path.read_text().replace('"HERE"', "NaN"))
    said = r"Line 1 of .* is not a result \(NaN is no number\); delete the lines of its run, which is then run again"
    with pytest.raises(BadData, match=said):
        collect([folder])


def test_a_folder_that_is_named_twice_is_read_once(tmp_path: Path) -> None:
    for folder in (sequences(tmp_path / "a", {}), write(tmp_path / "sweep", [cell()])):
        found = collect([folder, folder / ".." / folder.name])
        assert len(found.headers) == len(found.cells) == 1 and found.folders == (folder,)


def test_perplexities_on_unlike_texts_are_not_compared(tmp_path: Path) -> None:
    text = {"name": "text", "sha256": "a" * 64, "tokens": 512}
    one = write(tmp_path / "a", [cell()], perplexity={**text, "batches": 1})
    same = write(tmp_path / "b", [cell(multiplier=None)], perplexity={**text, "name": "renamed", "batches": 2})
    none = write(tmp_path / "c", [cell(multiplier=4.0)])
    assert len(collect([one, same, none]).cells) == 3
    other = write(tmp_path / "d", [cell(multiplier=4.0)], perplexity={**text, "tokens": 1024})
    with pytest.raises(BadData, match=r"The text of perplexity of .*'tokens': 512} and of .*'tokens': 1024}, so their"):
        collect([one, other])


def test_each_folder_is_held_against_every_other(tmp_path: Path) -> None:
    """The first one may have nothing of what two others have unlike."""
    memit, (few, more) = {"clamp": 1.0}, ({"layers": [5]}, {"layers": [6]})
    every = [
        write(tmp_path / "a", [cell()], methods={"memit": memit}),
        write(tmp_path / "b", [cell("emmet", 2.0)], methods={"emmet": few}),
        write(tmp_path / "c", [cell("emmet", None)], methods={"emmet": more}),
    ]
    with pytest.raises(BadData, match=r"The settings of emmet of .*b' is .*\[5\].* and of .*c' .*\[6\]"):
        collect(every)


def test_sequences_without_a_step_are_refused(tmp_path: Path) -> None:
    folder = sequences(tmp_path / "a", {})
    (folder / "sequential.jsonl").unlink()
    with pytest.raises(BadData, match="No finished step of a sequence in"):
        collect([folder])


@pytest.mark.parametrize("kind", ["cell", "step of a sequence"])
def test_a_folder_without_results_beside_one_with_some_is_named(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    if kind == "cell":
        folders = [write(tmp_path / "a", [cell()]), write(tmp_path / "b", [])]
    else:
        folders = [sequences(tmp_path / name, {}) for name in "ab"]
        (folders[1] / "sequential.jsonl").write_bytes(b"")
    assert len(collect(folders).cells) == 1
    assert f"There is no finished {kind} in '{folders[1]}', so the report has nothing of it." in caplog.text
    assert f"'{folders[0]}'" not in caplog.text


@pytest.mark.parametrize("name", ["sequential", "results"])
def test_a_file_and_the_same_compressed_are_one(tmp_path: Path, name: str) -> None:
    folder = sequences(tmp_path / "a", {}) if name == "sequential" else write(tmp_path / "a", [cell()])
    alone = collect([folder])
    for path in list(folder.glob("*.jsonl")):
        path.with_suffix(".jsonl.xz").write_bytes(lzma.compress(path.read_bytes()))
    both = collect([folder])
    assert len(both.cells) == 1 and both == alone
    path = folder / f"{name}.jsonl"
    path.write_text(path.read_text().replace('"before"', '"was": 1, "before"', 1))
    with pytest.raises(BadData, match=rf"{name}.jsonl' and .*{name}.jsonl.xz' have different results of memit/"):
        collect([folder])


def test_runs_that_a_report_has_named_may_share_a_key(tmp_path: Path) -> None:
    folder = sequences(tmp_path / "a", {}, run="first")
    path = folder / "sequential.jsonl"
    path.write_text(path.read_text() + path.read_text().replace('"first"', '"second"'))
    assert [line["run"] for line in collect([folder]).cells] == ["first", "second"]


def test_settings_have_one_name_in_any_order() -> None:
    assert settings_name({}) == ""
    assert settings_name({"shrinkage": "oas", "layers": [3, 4]}) == "layers=[3, 4], shrinkage=oas"
