"""Other codebases' files for our edits: taken over, found again, and refused where wrong."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastcov
import their_loader
from fastmemit.compat import StatsPlace, export_statistics, files_of, import_statistics
from fastmemit.editor import Editor
from fastmemit.errors import BadConfig, WrongModel
from tiny_editors import FACTS, tiny_corpus, tiny_editor
from tiny_models import tiny_model

MODULES = [f"model.layers.{i}.mlp.down_proj" for i in (0, 1, 2)]


@pytest.fixture
def editor(tmp_path: Path) -> Editor:
    """An editor with statistics of all three layers of its own."""
    return tiny_editor(tmp_path / "own", layers=(0, 1, 2), name="me/tiny")


@pytest.fixture
def place(editor: Editor, tmp_path: Path) -> StatsPlace:
    """Those statistics in another codebase's files."""
    place = StatsPlace(tmp_path / "stats", "memit", "me/tiny")
    export_statistics(editor.store.covering([0, 1, 2]), place)
    return place


def fresh(tmp_path: Path, **settings: Any) -> Editor:
    """The same model with an empty cache."""
    return tiny_editor(tmp_path / "cache", layers=None, name="me/tiny", **settings)


def test_there_and_back_is_the_same_second_moment(editor: Editor, place: StatsPlace, tmp_path: Path) -> None:
    mine = fresh(tmp_path)
    found = import_statistics(mine, files_of(mine, place))
    before = editor.store.covering([0, 1, 2])
    assert list(found.paths) == MODULES
    for name in MODULES:
        assert torch.equal(found.second_moment(name), before.second_moment(name))
        assert found.moment(name).count == 256
    assert found.describe() == "corpus imported:wikipedia_stats, multiplier 4, 256 keys"
    # And so are the edits that they lead to.
    settings: dict[str, Any] = {"layers": (0, 1), "steps": 3}
    one, two = (e.plan(FACTS[:2], "memit", **settings).delta for e in (editor, mine))
    assert one.digest() == two.digest()
    assert two.provenance["statistics"]["corpus"]["name"] == "imported:wikipedia_stats"


def test_where_they_came_from_is_on_record(place: StatsPlace, tmp_path: Path) -> None:
    mine = fresh(tmp_path)
    files = files_of(mine, place, [1, 2])
    found = import_statistics(mine, files)
    for name, path in files.items():
        stored = fastcov.read_provenance(found.paths[name])
        assert stored["source"] == {
            "file": path.name,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "sample_size": 100000,
        }
        assert stored["model"] == mine.fingerprint and stored["model_name"] == "me/tiny"
        assert stored["module"] == name
        assert (stored["keys"], stored["budget"], stored["multiplier"]) == (256, 256, 4.0)
        assert stored["seed"] is None and len(stored["tokenizer"]) == 64
        assert str(tmp_path) not in str(stored)


def test_later_edits_find_what_was_imported_last(place: StatsPlace, tmp_path: Path) -> None:
    mine = fresh(tmp_path)
    imported = import_statistics(mine, files_of(mine, place))
    later = fresh(tmp_path)
    assert later.store.covering([0, 2]).provenance == imported.provenance
    own = later.precompute(tiny_corpus(seed=1), multiplier=2, layers=(0, 1, 2))
    for age, found in enumerate([imported, own]):
        os.utime(next(iter(found.paths.values())).parent, (1000 + age, 1000 + age))
    assert fresh(tmp_path).store.covering([0]).provenance["multiplier"] == 2
    assert import_statistics(later, files_of(later, place)).paths == imported.paths
    assert fresh(tmp_path).store.covering([0]).provenance["multiplier"] == 4
    assert later.store.find([0], 4) is not None


def test_files_say_by_their_names_which_module_they_are_of(place: StatsPlace, tmp_path: Path) -> None:
    mine = fresh(tmp_path)
    one = import_statistics(mine, [place.path(MODULES[1])])
    assert list(one.paths) == [MODULES[1]]
    alone = tmp_path / "elsewhere" / place.path(MODULES[2]).name
    alone.parent.mkdir()
    shutil.copy(place.path(MODULES[2]), alone)
    named = import_statistics(mine, [alone]).provenance["corpus"]["name"]
    assert named == f"imported:{alone.name}"
    assert list(import_statistics(mine, {MODULES[2]: alone}).paths) == [MODULES[2]]


def test_a_file_of_44_million_keys_as_they_write_it(place: StatsPlace, tmp_path: Path) -> None:
    mine = fresh(tmp_path)
    before = np.load(place.path(MODULES[0]))["mom2.mom2"]
    their_loader.save(place.path(MODULES[0]), before * (44_000_000 / 256), 44_000_000)
    found = import_statistics(mine, files_of(mine, place, [0]))
    assert found.keys == 44_000_000 and found.provenance["multiplier"] == 687_500
    expected = torch.from_numpy(before / 256)
    assert torch.allclose(found.second_moment(MODULES[0]), expected, rtol=1e-5)


def refused(mine: Editor, files: Any, error: type[Exception], match: str, **more: Any) -> None:
    with pytest.raises(error, match=match):
        import_statistics(mine, files, **more)
    assert mine.store.find([0], None) is None  # nothing was kept


def test_statistics_of_another_layer_or_model_are_refused(place: StatsPlace, tmp_path: Path) -> None:
    mine = fresh(tmp_path)
    swapped = {MODULES[0]: place.path(MODULES[1]), MODULES[1]: place.path(MODULES[0])}
    refused(mine, swapped, WrongModel, r"layers\.0\..* not of this model's keys: .* \(--no-check\)")
    other = fresh(tmp_path, model=tiny_model("llama", seed=1))
    refused(other, files_of(other, place), WrongModel, "not of this model's keys")
    assert import_statistics(other, files_of(other, place), check=False).keys == 256


def test_a_count_that_is_not_that_of_the_sum_is_refused(place: StatsPlace, tmp_path: Path) -> None:
    mine, path = fresh(tmp_path), place.path(MODULES[0])
    total = np.load(path)["mom2.mom2"]
    their_loader.save(path, total / 256, 256)  # a mean instead of a sum
    match = r"0\.00\d+ times what this model's keys have, so their count \(256\) is not"
    refused(mine, files_of(mine, place, [0]), WrongModel, match)


def test_files_that_do_not_belong_together(place: StatsPlace, tmp_path: Path) -> None:
    mine = fresh(tmp_path)
    paths = [place.path(name) for name in MODULES]
    copy = {MODULES[0]: paths[0], MODULES[1]: paths[0]}
    refused(mine, copy, BadConfig, "are the same file, but .*layers.0.* different keys")
    total = np.load(paths[1])["mom2.mom2"]
    their_loader.save(paths[1], total, 300)
    refused(mine, paths[:2], BadConfig, "counts 300 keys but others 256|counts 256 .* others 300")
    twice = tmp_path / "again" / paths[0].name
    twice.parent.mkdir()
    shutil.copy(paths[0], twice)
    refused(mine, [paths[0], twice], BadConfig, r"are of model\.layers\.0\..*name one of them")


def test_names_that_lead_nowhere(place: StatsPlace, tmp_path: Path) -> None:
    mine = fresh(tmp_path)
    odd = tmp_path / "layer4.npz"
    shutil.copy(place.path(MODULES[0]), odd)
    refused(mine, [odd], BadConfig, r"'layer4\.npz' does not say which module")
    refused(mine, [], BadConfig, "no file to import")
    gpt2 = place.folder / "transformer.h.0.mlp.c_proj_float32_mom2_100000.npz"
    match = r"is of transformer\.h\.0\.mlp\.c_proj, but .* me/tiny are model\.layers\.\{\}\.mlp"
    refused(mine, [gpt2], BadConfig, match)
    gone = {MODULES[0]: tmp_path / "gone.npz"}
    refused(mine, gone, fastcov.FastcovError, r"no file '.*gone\.npz'")


def test_a_missing_file_says_what_is_there(place: StatsPlace, tmp_path: Path) -> None:
    mine = fresh(tmp_path)
    place.path(MODULES[1]).unlink()
    with pytest.raises(fastcov.FastcovError, match=r"layers\.1\.mlp.*wikipedia_stats' holds model"):
        files_of(mine, place, [0, 1])
    assert list(files_of(mine, place)) == [MODULES[0], MODULES[2]]
    wrong = StatsPlace(place.stats_dir, "easyedit", "me/tiny")
    with pytest.raises(fastcov.FastcovError, match=r"stats' holds me_tiny\); correct --stats-dir"):
        files_of(mine, wrong)
    nowhere = StatsPlace(tmp_path / "nowhere", "easyedit", "me/tiny")
    with pytest.raises(fastcov.FastcovError, match=r"no file '.*nowhere/tiny/wikipedia_stats"):
        files_of(mine, nowhere)


def test_keys_of_another_width(place: StatsPlace, tmp_path: Path) -> None:
    wide = fresh(tmp_path, model=tiny_model("llama", intermediate_size=80))
    refused(wide, files_of(wide, place, [0]), fastcov.BadInput, "of width 64 .* have 80")


def test_files_belong_to_the_unedited_model(place: StatsPlace, editor: Editor) -> None:
    edit = editor.edit(FACTS[:1], "rome", layers=(1,), steps=2)
    with pytest.raises(WrongModel, match="1 edit is in the weights"):
        import_statistics(editor, files_of(editor, place))
    edit.undo()
    import_statistics(editor, files_of(editor, place))


def test_a_file_under_the_name_of_another_sample_is_refused(place: StatsPlace, tmp_path: Path) -> None:
    mine = fresh(tmp_path)
    path = place.path(MODULES[1])
    renamed = path.with_name(path.name.replace("100000", "5000"))
    shutil.copy(path, renamed)
    with pytest.raises(
        fastcov.StoreMismatch, match=r"_mom2_5000\.npz' is of another sample_size \(100000, not 5000"
    ) as caught:
        import_statistics(mine, [renamed])
    assert (caught.value.stored, caught.value.expected) == (100000, 5000)
    assert import_statistics(mine, {MODULES[1]: path}).keys == 256
