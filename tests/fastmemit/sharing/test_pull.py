"""What comes from the hub: only what is looked for, verified, and to where it belongs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fastcov
from fastmemit.delta import Delta
from fastmemit.editor import Editor
from fastmemit.errors import BadConfig, DamagedFile, FastmemitError, WrongModel
from fastmemit.sharing import pull_edit, pull_statistics, push_edit, push_statistics
from stand_in_hub import StandInHub, stand_in_hub
from tiny_editors import FACTS, QUICK, tiny_corpus, tiny_editor
from tiny_models import tiny_model, tiny_tokenizer


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> StandInHub:
    return stand_in_hub(monkeypatch, tmp_path)


@pytest.fixture(scope="module")
def editor(tmp_path_factory: pytest.TempPathFactory) -> Editor:
    return tiny_editor(tmp_path_factory.mktemp("cache"))


def elsewhere(folder: Path, seed: int = 0) -> Editor:
    """The same model on another machine, without statistics."""
    return Editor(tiny_model("llama", seed=seed), tiny_tokenizer(), cache_dir=folder)


def test_an_edit_arrives_and_is_applied(hub: StandInHub, editor: Editor, tmp_path: Path) -> None:
    made = editor.plan(FACTS, **QUICK).delta
    push_edit(made, "me/edit")
    (hub.repos["me/edit"] / "pytorch_model.bin").write_text("never fetched")
    (hub.repos["me/edit"] / "model.safetensors").write_text("never fetched")
    other = elsewhere(tmp_path / "cache")
    found = pull_edit("me/edit", revision="v1", model=other.fingerprint)
    assert found.digest() == made.digest()
    fetched = sorted(p.name for p in (tmp_path / "snapshot1").rglob("*"))
    assert fetched == ["README.md", "edit.safetensors"]
    assert hub.asked[0]["revision"] == "v1"
    found.save(tmp_path / "edit.safetensors")
    other.load(tmp_path / "edit.safetensors").apply().undo()


def test_an_edit_of_another_model_is_refused(hub: StandInHub, editor: Editor) -> None:
    push_edit(editor.plan(FACTS[:1], **QUICK).delta, "me/edit")
    with pytest.raises(WrongModel, match="was made for the model"):
        pull_edit("me/edit", model="0" * 64)


def test_statistics_arrive_where_edits_find_them(hub: StandInHub, editor: Editor, tmp_path: Path) -> None:
    push_statistics(editor.store.covering([0, 1]), "me/moments")
    other = elsewhere(tmp_path / "cache")
    with pytest.raises(fastcov.FastcovError):
        other.store.covering([0, 1])
    found = pull_statistics("me/moments", model=other.fingerprint, cache=tmp_path / "cache")
    assert other.store.covering([0, 1]) == found
    assert found.provenance == editor.store.covering([0, 1]).provenance
    for module, path in editor.store.covering([0, 1]).paths.items():
        assert found.paths[module].read_bytes() == path.read_bytes()
        assert found.paths[module].parent.name == path.parent.name
    made = other.plan(FACTS, **QUICK).delta
    assert made.digest() == editor.plan(FACTS, **QUICK).delta.digest()
    # A precompute with the same settings has nothing left to do.
    again = other.precompute(tiny_corpus(), multiplier=4, layers=[0, 1])
    assert again.paths == found.paths and again.throughput is None


def test_a_kept_file_stays(hub: StandInHub, editor: Editor, tmp_path: Path) -> None:
    push_statistics(editor.store.covering([0, 1]), "me/moments")
    first = pull_statistics("me/moments", cache=tmp_path / "cache")
    times = {path: path.stat().st_mtime_ns for path in first.paths.values()}
    again = pull_statistics("me/moments", cache=tmp_path / "cache")
    assert {path: path.stat().st_mtime_ns for path in again.paths.values()} == times


def test_statistics_of_something_else_are_refused(hub: StandInHub, editor: Editor, tmp_path: Path) -> None:
    push_statistics(editor.store.covering([0, 1]), "me/moments")
    for field in ("model", "tokenizer"):
        with pytest.raises(fastcov.StoreMismatch, match=f"of another {field}") as raised:
            pull_statistics("me/moments", cache=tmp_path / "cache", **{field: "0" * 64})
        assert raised.value.field == field
    assert not (tmp_path / "cache").exists()


def test_a_repository_without_it(hub: StandInHub, editor: Editor, tmp_path: Path) -> None:
    hub.repo("me/empty")
    with pytest.raises(FastmemitError, match=r"holds no edit\.safetensors"):
        pull_edit("me/empty")
    with pytest.raises(FastmemitError, match="holds no second moments"):
        pull_statistics("me/empty", cache=tmp_path / "cache")
    with pytest.raises(BadConfig, match="write USER/NAME"):
        pull_edit("../../etc")


def test_an_altered_edit_is_refused(hub: StandInHub, editor: Editor) -> None:
    push_edit(editor.plan(FACTS[:1], **QUICK).delta, "me/edit")
    file = hub.repos["me/edit"] / "edit.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(DamagedFile, match="other bytes"):
        pull_edit("me/edit")


def test_offline_for_real(tmp_path: Path) -> None:
    with pytest.raises(FastmemitError, match="HF_HUB_OFFLINE is set and no copy is kept"):
        pull_edit("nobody/nothing-here")
    with pytest.raises(FastmemitError, match="HF_HUB_OFFLINE is set and no copy is kept"):
        pull_statistics("nobody/nothing-here", cache=tmp_path)


def test_offline_a_copy_that_was_fetched_before_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layout of the hub's own cache, read by the hub's own library."""
    from huggingface_hub import constants

    delta = Delta({"h.1.weight": (torch.ones(4, 1), torch.ones(6, 1))}, {"model": "f" * 64})
    commit = "0" * 40
    repo = tmp_path / "models--me--edit"
    delta.save(repo / "snapshots" / commit / "edit.safetensors")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert pull_edit("me/edit").digest() == delta.digest()
