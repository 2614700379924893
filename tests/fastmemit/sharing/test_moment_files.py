"""A folder of moments from a stranger: sound and of one thing, or refused; no name is a path."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fastcov
from fastmemit.errors import DamagedFile
from fastmemit.sharing.hub import cache_statistics, open_statistics


def moment(folder: Path, file: str, **about: object) -> None:
    """A sound moment with any provenance."""
    provenance = {
        "model": "a" * 64, "tokenizer": "b" * 64, "module": "m.0", "seed": 0, "multiplier": 2.0,
        "budget": 4, "corpus": {"name": "c", "fingerprint": "d"}, "context": 8, **about,
    }  # fmt: skip
    d = 3 if provenance["budget"] == 6 else 2
    held = fastcov.SecondMoment(d).update(torch.eye(d)).update(torch.eye(d))
    fastcov.save_moment(folder / file, held, provenance)


def test_a_sound_folder(tmp_path: Path) -> None:
    moment(tmp_path / "from", "m.0.safetensors", versions={"torch": "1"})
    moment(tmp_path / "from", "m.1.safetensors", module="m.1", budget=6, keys=6)
    found = open_statistics(tmp_path / "from")
    assert sorted(found.paths) == ["m.0", "m.1"] and found.keys == 6
    kept = cache_statistics(found, tmp_path / "to")
    assert {p.name for p in kept.paths.values()} == {"m.0.safetensors", "m.1.safetensors"}
    for module, path in kept.paths.items():
        assert path.parent.parent == tmp_path / "to" / ("a" * 16)
        assert path.read_bytes() == found.paths[module].read_bytes()


@pytest.mark.parametrize(
    ("file", "about", "words"),
    [
        ("x.safetensors", {"module": "../../x"}, "does not say its module"),
        ("x.safetensors", {"module": "/etc/x"}, "does not say its module"),
        ("m..0.safetensors", {"module": "m..0"}, "does not say its module"),
        ("m.1.safetensors", {}, "is of the module 'm.0'"),
        ("m.0.safetensors", {"model": "../../../../x" + "a" * 51}, "does not say its model"),
        ("m.0.safetensors", {"model": None}, "does not say its model"),
        ("m.0.safetensors", {"tokenizer": 3}, "does not say its tokenizer"),
        ("m.0.safetensors", {"seed": "../x"}, "does not say its seed"),
        ("m.0.safetensors", {"keys": "../x"}, "does not say its keys"),
        ("m.0.safetensors", {"snapshots": 3}, "does not say its snapshots"),
        ("m.0.safetensors", {"snapshots": [1.0, "x"]}, "does not say its snapshots"),
        ("m.0.safetensors", {"multiplier": 10**400}, "does not say its multiplier"),
        ("m.0.safetensors", {"multiplier": "../x"}, "does not say its multiplier"),
        ("m.0.safetensors", {"multiplier": 0}, "does not say its multiplier"),
        ("m.0.safetensors", {"corpus": "text"}, "does not say its corpus"),
        ("m.0.safetensors", {"budget": None}, "does not say its budget"),
    ],
)
def test_what_is_not_said_or_is_no_name_is_refused(
    file: str, about: dict[str, object], words: str, tmp_path: Path
) -> None:
    moment(tmp_path, file, **about)
    with pytest.raises(DamagedFile, match=words):
        open_statistics(tmp_path)


def test_imported_statistics_and_those_of_other_settings_travel(tmp_path: Path) -> None:
    """Of imported ones nobody knows the seed, and each file has a source of its own."""
    for number, about in enumerate(({"seed": None}, {"bos": False, "snapshots": [0.5, 1.0]})):
        folder, to = tmp_path / f"from{number}", tmp_path / "to"
        for name in ("m.0", "m.1"):
            own = {"source": {"file": f"{name}.npz"}} if number == 0 else {}
            moment(folder, f"{name}.safetensors", module=name, keys=4, **about, **own)
        kept = cache_statistics(open_statistics(folder), to)
        assert sorted(kept.paths) == ["m.0", "m.1"] and len(set(kept.paths.values())) == 2
        assert all(kept.provenance[field] == value for field, value in about.items())
        assert kept.describe().startswith("corpus c, multiplier 2, 4 keys")
    assert len(list((to / ("a" * 16)).iterdir())) == 2  # two statistics, two folders


@pytest.mark.parametrize("name", ["../../../x/..", "/etc/passwd", "a\\b", "..", ""])
def test_a_corpus_name_is_no_path(name: str, tmp_path: Path) -> None:
    moment(tmp_path / "from", "m.0.safetensors", corpus={"name": name, "fingerprint": "d"})
    kept = cache_statistics(open_statistics(tmp_path / "from"), tmp_path / "to")
    (path,) = kept.paths.values()
    assert path.resolve().parent.parent == (tmp_path / "to" / ("a" * 16)).resolve()


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ({"seed": 3}, r"seed \(3\) than m\.0\.safetensors \(0\)"),
        ({"model": "c" * 64}, r"model \('c+'\) than m\.0\.safetensors \('a+'\)"),
        ({"corpus": {"name": "c", "fingerprint": "e"}}, r"corpus \('e'\) than .* \('d'\)"),
        ({"bos": False}, r"bos \(False\) than .* \(None\)"),
        ({"context": 9}, r"context \(9\) than .* \(8\)"),
    ],
)
def test_files_belong_together(about: dict[str, object], said: str, tmp_path: Path) -> None:
    moment(tmp_path, "m.0.safetensors")
    moment(tmp_path, "m.1.safetensors", module="m.1", **about)
    with pytest.raises(DamagedFile, match=f"m.1.safetensors' is of another {said}"):
        open_statistics(tmp_path)


def test_no_folder_and_no_moment(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match="There is no moment in"):
            open_statistics(folder)
    (tmp_path / "m.0.safetensors").write_bytes(b"nothing")
    with pytest.raises(fastcov.StoreDamaged):
        open_statistics(tmp_path)


@pytest.mark.parametrize("about", [{"keys": 3}, {"budget": 8}, {"multiplier": 3.0}])
def test_numbers_that_contradict_the_sum_are_refused(about: dict[str, object], tmp_path: Path) -> None:
    moment(tmp_path, "m.0.safetensors", **about)
    with pytest.raises(fastcov.StoreDamaged, match="with all else that they say it must be"):
        open_statistics(tmp_path)


def test_what_is_there_already_is_compared(tmp_path: Path) -> None:
    moment(tmp_path / "from", "m.0.safetensors")
    found = open_statistics(tmp_path / "from")
    (path,) = cache_statistics(found, tmp_path / "to").paths.values()
    moment(path.parent, path.name, seed=7)
    with pytest.raises(fastcov.StoreMismatch, match=r"another seed \(7, not 0\)"):
        cache_statistics(found, tmp_path / "to")
