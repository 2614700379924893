"""What goes to the hub, and what never does: against a hub in a folder, and offline for real."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

import fastcov
from fastmemit.delta import Delta
from fastmemit.errors import BadConfig, DamagedFile, FastmemitError
from fastmemit.sharing import push_edit, push_statistics
from fastmemit.statistics import Statistics
from stand_in_hub import StandInHub, stand_in_hub
from tiny_editors import tiny_editor


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> StandInHub:
    return stand_in_hub(monkeypatch, tmp_path)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    return tiny_editor(tmp_path_factory.mktemp("cache")).store.covering([0, 1])


def delta() -> Delta:
    return Delta({"h.1.weight": (torch.randn(4, 2), torch.randn(6, 2))}, {"method": "memit"})


def test_an_edit_and_its_card(hub: StandInHub) -> None:
    made = delta()
    assert push_edit(made, "me/edit", license="mit") == "https://huggingface.co/me/edit"
    assert hub.list_repo_files("me/edit") == [".gitattributes", "README.md", "edit.safetensors"]
    assert Delta.load(hub.repos["me/edit"] / "edit.safetensors").digest() == made.digest()
    assert "\nlicense: mit\n" in (hub.repos["me/edit"] / "README.md").read_text()
    assert hub.private["me/edit"] is False
    newer = delta()
    push_edit(newer, "me/edit")
    assert Delta.load(hub.repos["me/edit"] / "edit.safetensors").digest() == newer.digest()


def test_statistics_and_their_card(hub: StandInHub, found: Statistics) -> None:
    push_statistics(next(iter(found.paths.values())).parent, "me/moments", private=True)
    assert hub.private["me/moments"] is True
    assert hub.list_repo_files("me/moments") == [
        ".gitattributes",
        "README.md",
        "moments/model.layers.0.mlp.down_proj.safetensors",
        "moments/model.layers.1.mlp.down_proj.safetensors",
    ]
    for module, path in found.paths.items():
        stored = hub.repos["me/moments"] / "moments" / f"{module}.safetensors"
        assert stored.read_bytes() == path.read_bytes()


def test_a_dry_run_asks_nobody(tmp_path: Path, found: Statistics) -> None:
    assert push_edit(delta(), "me/edit", dry_run=tmp_path / "a") == str(tmp_path / "a")
    assert sorted(os.listdir(tmp_path / "a")) == ["README.md", "edit.safetensors"]
    push_statistics(found, "me/moments", dry_run=tmp_path / "b")
    assert sorted(os.listdir(tmp_path / "b")) == ["README.md", "moments"]
    assert len(os.listdir(tmp_path / "b" / "moments")) == 2
    with pytest.raises(FileExistsError, match="not an empty folder"):
        push_edit(delta(), "me/edit", dry_run=tmp_path / "a")


def test_what_is_private_is_not_put_where_everybody_looks(hub: StandInHub) -> None:
    hub.repo("me/edit", private=False)
    with pytest.raises(FastmemitError, match="exists and is public, so nothing was put there"):
        push_edit(delta(), "me/edit", private=True)
    assert hub.list_repo_files("me/edit") == [".gitattributes"]


@pytest.mark.parametrize("name", ["model.safetensors", "moments/x.safetensors"])
def test_what_others_put_there_stays(name: str, hub: StandInHub) -> None:
    file = hub.repo("me/edit") / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("theirs")
    with pytest.raises(FastmemitError, match=f"holds '{name}' already"):
        push_edit(delta(), "me/edit")
    assert hub.list_repo_files("me/edit") == [".gitattributes", name]


def test_bad_names_are_refused_before_anything(hub: StandInHub, found: Statistics) -> None:
    for options in ({"repo": "edit"}, {"repo": "me/edit", "license": "no licence"},
                    {"repo": "me/edit", "base_model": "/home/me"}):  # fmt: skip
        given: dict[str, Any] = dict(options)
        with pytest.raises(BadConfig):
            push_edit(delta(), **given)
        with pytest.raises(BadConfig):
            push_statistics(found, **given)
    assert hub.repos == {}


def test_damaged_statistics_do_not_travel(hub: StandInHub, found: Statistics, tmp_path: Path) -> None:
    path = next(iter(found.paths.values()))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    (tmp_path / path.name).write_bytes(data)
    with pytest.raises(fastcov.StoreDamaged):
        push_statistics(tmp_path, "me/moments")
    with pytest.raises(FileNotFoundError, match="no moment in"):
        push_statistics(tmp_path / "nothing", "me/moments")
    (tmp_path / path.name).unlink()
    (tmp_path / "other.safetensors").write_bytes(path.read_bytes())
    with pytest.raises(DamagedFile, match="is of the module"):
        push_statistics(tmp_path, "me/moments")
    assert hub.repos == {}


def test_offline_for_real() -> None:
    with pytest.raises(FastmemitError, match="because HF_HUB_OFFLINE is set"):
        push_edit(delta(), "me/edit")


def test_not_logged_in(hub: StandInHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(FastmemitError, match="not logged in to the hub; run hf auth login"):
        push_edit(delta(), "me/edit")
    push_edit(delta(), "me/edit", token="hf_given")
    hub.error = ConnectionError("no route")
    with pytest.raises(FastmemitError, match="could not be written, because the hub cannot be reached"):
        push_edit(delta(), "me/edit", token="hf_given")
