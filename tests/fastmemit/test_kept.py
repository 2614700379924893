"""What is used is what is on record: sound files of something else are refused, field by field."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastcov
from fastmemit.files import OWN, copy_moments, provenances_in
from fastmemit.statistics import Collection, Statistics
from tiny_editors import FACTS, tiny_corpus, tiny_editor
from tiny_models import tiny_model

LAYERS = (0, 1)
Change = Callable[[dict[str, Any]], None]


@pytest.fixture(autouse=True)
def _bfloat_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastmemit.statistics.why_no_bfloat", lambda: None)


def collected(
    folder: Path, *, layers: tuple[int, ...] = LAYERS, first: float | None = None, **changed: Any
) -> Statistics:
    """Statistics of the tiny model, all as always but for what is changed."""
    known = {n: changed.pop(n) for n in ("model", "tokenizer") if n in changed}
    settings = {
        "corpus": tiny_corpus(), "multiplier": 4.0, "allow_fewer": False, "max_length": None,
        **changed,
    }  # fmt: skip
    editor = tiny_editor(folder, layers=None, **known)
    after = None
    if first is not None:
        less = {**settings, "multiplier": first}
        after = editor.store.collect(Collection(layers=layers, **less))
    return editor.store.collect(Collection(layers=layers, **settings), after=after)


def rewritten(path: Path, change: Change) -> None:
    """A sound file with another provenance."""
    moment, provenance = fastcov.load_moment(path)
    change(provenance)
    fastcov.save_moment(path, moment, provenance)


def refusals(folder: Path, found: Statistics) -> list[fastcov.FastcovError]:
    """What becomes of statistics that were handed out, found, asked for again or edited with."""
    fresh = tiny_editor(folder, layers=None)
    weights = [tensor.clone() for tensor in fresh.model.state_dict().values()]
    refused = []
    for ask in (
        lambda: [found.moment(name) for name in found.paths],
        lambda: fresh.store.find(LAYERS),
        lambda: fresh.store.find(None),
        lambda: fresh.edit(FACTS[:1], "memit", layers=LAYERS, steps=2),
        lambda: fresh.precompute(tiny_corpus(), multiplier=4, layers=LAYERS),
    ):
        with pytest.raises((fastcov.StoreMismatch, fastcov.StoreDamaged)) as caught:
            ask()
        refused.append(caught.value)
    now = fresh.model.state_dict().values()
    assert all(torch.equal(a, b) for a, b in zip(weights, now, strict=True))
    return refused


SWAPPED: dict[str, tuple[dict[str, Any], str]] = {
    "corpus": ({"corpus": tiny_corpus(seed=5)}, "corpus"),
    "multiplier": ({"multiplier": 1.0}, "multiplier"),
    "seed": ({"seed": 7}, "seed"),
    "max_length": ({"max_length": 20}, "context"),
    "bos": ({"bos": False}, "bos"),
    "quartic": ({"quartic": True}, "quartic"),
    "forward": ({"forward": "bfloat16"}, "forward"),
    "way": ({"first": 2.0}, "snapshots"),
    "fewer": ({"allow_fewer": True}, "allow_fewer"),
    "tokenizer": ({"tokenizer": "bpe_bos"}, "tokenizer"),
    "model": ({"model": tiny_model("llama", seed=1)}, "model"),
    "dtype": ({"model": tiny_model("llama").to(torch.bfloat16)}, "model"),
}


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(("changed", "field"), SWAPPED.values(), ids=SWAPPED.keys())
def test_a_sound_file_of_something_else_is_refused(
    tmp_path: Path, changed: dict[str, Any], field: str, which: int
) -> None:
    found = collected(tmp_path / "mine")
    other = collected(tmp_path / "other", **changed)
    name = list(found.paths)[which]
    shutil.copyfile(other.paths[name], found.paths[name])
    stored, wanted = fastcov.read_provenance(other.paths[name]), found.provenance
    for refused in refusals(tmp_path / "mine", found):
        assert isinstance(refused, fastcov.StoreMismatch) and refused.field == field
        assert str(found.paths[name]) in str(refused)
        values = [about.get(field) for about in (stored, wanted)]
        if field == "corpus":
            values = [value["fingerprint"] for value in values]
        assert [refused.stored, refused.expected] == values
        said = ["nothing" if value is None else f"{value!r:.80}" for value in values]
        assert f"another {field} ({said[0]}, not {said[1]})" in str(refused)


def test_a_file_of_another_layer_is_refused(tmp_path: Path) -> None:
    found = collected(tmp_path)
    one, two = found.paths.values()
    shutil.copyfile(one, two)
    for refused in refusals(tmp_path, found):
        assert isinstance(refused, fastcov.StoreMismatch)
        assert (refused.field, refused.stored) == ("module", next(iter(found.paths)))
        assert refused.expected == list(found.paths)[1] and str(two) in str(refused)


def test_all_files_of_a_folder_together_are_not_those_of_another(tmp_path: Path) -> None:
    found, other = collected(tmp_path), collected(tmp_path, multiplier=1.0, seed=7)
    home, elsewhere = (next(iter(s.paths.values())).parent for s in (found, other))
    for name, path in found.paths.items():
        shutil.copyfile(other.paths[name], path)
    os.utime(home)
    fresh = tiny_editor(tmp_path, layers=None)
    wanted = f"of the corpus 'tiny0', .*multiplier 1.0, seed 7.* named .*{elsewhere.name[-12:]}"
    with pytest.raises(fastcov.StoreMismatch, match=wanted) as caught:
        fresh.store.find(LAYERS)
    assert caught.value.field == "folder" and caught.value.expected == home.name[-12:]
    with pytest.raises(fastcov.StoreMismatch, match=r"another multiplier \(1\.0, not 4\.0\)"):
        found.moment(next(iter(found.paths)))
    # A folder that no key is the name of has the files to compare with one another alone.
    shutil.copytree(elsewhere, home.parent / "mine")
    assert len(provenances_in(home.parent / "mine", list(found.paths), fresh.fingerprint)) == 2


@pytest.mark.parametrize("field", ["model", "tokenizer", "module", "corpus", "multiplier", "budget",
                                   "seed", "context", "allow_fewer"])  # fmt: skip
@pytest.mark.parametrize("which", [0, 1])
def test_a_field_that_is_missing_is_named(tmp_path: Path, field: str, which: int) -> None:
    found = collected(tmp_path)
    path = list(found.paths.values())[which]
    rewritten(path, lambda provenance: provenance.pop(field))
    for refused in refusals(tmp_path, found):
        assert str(path) in str(refused) and "precompute again" in str(refused)
        assert any(
            said in str(refused) for said in (f"their {field} (not on record)", f"another {field} (nothing, not ")
        )


def test_what_older_files_do_not_say_may_be_missing(tmp_path: Path) -> None:
    found = collected(tmp_path)
    for path in found.paths.values():
        rewritten(path, lambda about: [about.pop(n) for n in ("keys", "versions", "model_name")])
    fresh = tiny_editor(tmp_path, layers=None)
    again = fresh.store.find(LAYERS)
    assert again is not None and again.keys == 256
    assert again.moment(next(iter(again.paths))).count == 256


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("corpus", "text"),
        ("corpus", ["name"]),
        ("corpus", {"name": "tiny0"}),
        ("corpus", {"fingerprint": "f", "name": 3}),
        ("multiplier", "4"),
        ("multiplier", None),
        ("multiplier", True),
        ("multiplier", 10**400),
        ("budget", 256.0),
        ("budget", -1),
        ("keys", "256"),
        ("keys", 0),
        ("seed", "0"),
        ("context", [256]),
        ("snapshots", 3),
        ("bos", 0),
        ("quartic", 1),
        ("forward", "float16"),
        ("allow_fewer", "no"),
        ("module", {}),
        ("tokenizer", 3),
        ("model", ""),
    ],
)
def test_a_field_of_another_kind_is_named(tmp_path: Path, field: str, value: Any) -> None:
    found = collected(tmp_path)
    path = next(iter(found.paths.values()))
    rewritten(path, lambda provenance: provenance.update({field: value}))
    for refused in refusals(tmp_path, found):
        assert isinstance(refused, fastcov.StoreDamaged)
        assert f"do not say their {field} ({value!r:.80})" in str(refused)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"keys": 255}, "their keys are 255, .* must be 256"),
        ({"budget": 255}, "their budget are 255, .* must be 256"),
        ({"keys": 300, "budget": 300}, "their keys are 300, .* must be 256"),
    ],
)
def test_numbers_that_contradict_the_sum_are_refused(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    found = collected(tmp_path)
    name, path = next(iter(found.paths.items()))
    rewritten(path, lambda provenance: provenance.update(changed))
    with pytest.raises(fastcov.StoreDamaged, match=said):
        found.moment(name)


def test_a_sound_sum_of_fewer_keys_is_refused(tmp_path: Path) -> None:
    """The provenance of one file on the sum of another."""
    found, other = collected(tmp_path / "a"), collected(tmp_path / "b", multiplier=2.0)
    name, path = next(iter(found.paths.items()))
    moment, _ = fastcov.load_moment(other.paths[name])
    fastcov.save_moment(path, moment, fastcov.read_provenance(path))
    with pytest.raises(fastcov.StoreDamaged, match=r"their keys are 256, .* must be 128"):
        found.moment(name)
    # Where fewer were allowed, they are those that the file says.
    fewer = collected(tmp_path / "c", multiplier=4.0, allow_fewer=True)
    rewritten(fewer.paths[name], lambda provenance: provenance.update(keys=200))
    with pytest.raises(fastcov.StoreDamaged, match=r"their keys are 200, .* must be 256"):
        fewer.moment(name)


@pytest.mark.parametrize("text", ['{"model": "m"', "", "[]", "null", '{"a": 1, "a": 2}', "NaN"])
def test_a_provenance_that_is_cut_or_no_object_is_refused(tmp_path: Path, text: str) -> None:
    found = collected(tmp_path)
    path = next(iter(found.paths.values()))
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    about = {**header["__metadata__"], "provenance": text}
    del about["check"]
    about["check"] = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    head = json.dumps({**header, "__metadata__": about}).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + data[8 + size :])
    for refused in refusals(tmp_path, found):
        assert isinstance(refused, fastcov.StoreDamaged) and str(path) in str(refused)
        assert "provenance" in str(refused)


def test_a_copy_that_is_there_already_is_compared(tmp_path: Path) -> None:
    found, other = collected(tmp_path / "a"), collected(tmp_path / "b", seed=7)
    paths = copy_moments(found.paths, found.provenance, tmp_path / "to")
    assert copy_moments(found.paths, found.provenance, tmp_path / "to") == paths
    name = next(iter(paths))
    shutil.copyfile(other.paths[name], paths[name])
    with pytest.raises(fastcov.StoreMismatch, match=r"another seed \(7, not 0\)"):
        copy_moments(found.paths, found.provenance, tmp_path / "to")


def test_sums_on_the_way_are_compared_before_they_are_gone_on_from(tmp_path: Path) -> None:
    """A sweep's snapshot under the name of another one."""
    editor = tiny_editor(tmp_path, layers=None)

    def at(multiplier: float, after: Statistics | None = None, seed: int = 0) -> Statistics:
        return editor.store.collect(Collection(tiny_corpus(), [1], multiplier, seed=seed), after=after, aside=True)

    first, other = at(1.0), at(1.0, seed=7)
    (path,), (wrong,) = first.paths.values(), other.paths.values()
    shutil.copyfile(wrong, path)
    with pytest.raises(fastcov.StoreMismatch, match=r"another seed \(7, not 0\)"):
        at(2.0, after=first)
    with pytest.raises(fastcov.StoreMismatch, match=r"another seed \(7, not 0\)"):
        editor.store.keep(first)


def test_the_fields_of_one_file_alone_are_no_part_of_the_key(tmp_path: Path) -> None:
    found = collected(tmp_path)
    one, two = (fastcov.read_provenance(path) for path in found.paths.values())
    assert {name for name in one if one[name] != two[name]} == {"module"} <= set(OWN)
