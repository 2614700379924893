"""Our statistics in other codebases' files, read back by a loader such as theirs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastcov
import their_loader
from fastmemit.compat import StatsPlace, export_null_space, export_statistics
from fastmemit.errors import BadConfig
from fastmemit.statistics import Statistics
from tiny_editors import tiny_corpus, tiny_editor

MODULES = [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]


@pytest.fixture
def found(tmp_path: Path) -> Statistics:
    return tiny_editor(tmp_path / "cache").store.covering([0, 1])


@pytest.mark.parametrize(("layout", "folder"), [("rome", "me_tiny"), ("memit", "me_tiny"), ("easyedit", "tiny")])
def test_their_loader_takes_ours(found: Statistics, tmp_path: Path, layout: Any, folder: str) -> None:
    paths = export_statistics(found, StatsPlace(tmp_path, layout, "me/tiny"))
    assert list(paths) == MODULES
    for name in MODULES:
        path = their_loader.their_path(tmp_path, folder, name)
        assert paths[name] == path
        theirs = their_loader.load(path)
        ours = found.moment(name)
        assert theirs.count == ours.count == 256
        assert theirs.mom2.dtype == torch.float32 and torch.equal(theirs.mom2, ours.sum)
        assert torch.equal(theirs.mom2, theirs.mom2.T)
        assert torch.equal(theirs.moment(), found.second_moment(name))
        with np.load(path) as data:
            assert {key: (data[key].dtype.str, data[key].shape) for key in data} == {
                "mom2.count": ("<i8", ()),
                "mom2.mom2": ("<f4", (64, 64)),
                "sample_size": ("<i8", ()),
            }
        with pytest.raises(their_loader.Recompute, match="100000, not 5"):
            their_loader.load(path, sample_size=5)


def test_another_sample_size_and_data_set_are_those_of_the_settings(found: Statistics, tmp_path: Path) -> None:
    place = StatsPlace(tmp_path, "memit", "tiny", dataset="pile", sample_size=5)
    export_statistics(found, place, MODULES[1:])
    path = their_loader.their_path(tmp_path, "tiny", MODULES[1], "pile", 5)
    assert their_loader.load(path, sample_size=5).count == 256
    assert [p for p in tmp_path.joinpath("tiny").rglob("*") if p.is_file()] == [path]


def test_float64_sums_are_rounded_once(found: Statistics, tmp_path: Path) -> None:
    wide = fastcov.SecondMoment(64, dtype=torch.float64).update(torch.randn(256, 64).double())
    own = {**fastcov.read_provenance(found.paths[MODULES[0]])}
    fastcov.save_moment(found.paths[MODULES[0]], wide, own)
    for precision in ("float32", "float64"):
        place = StatsPlace(tmp_path, "memit", "tiny", precision=precision)
        with np.load(export_statistics(found, place, MODULES[:1])[MODULES[0]]) as data:
            assert torch.equal(torch.from_numpy(data["mom2.mom2"]), wide.sum.to(getattr(torch, precision)))


def test_files_that_are_there_are_not_written_over(found: Statistics, tmp_path: Path) -> None:
    place = StatsPlace(tmp_path, "memit", "tiny")
    theirs = their_loader.save(place.path(MODULES[1]), np.eye(64), 44_000_000)
    before = theirs.read_bytes()
    with pytest.raises(BadConfig, match=r"layers\.1.* exists and may be the work of days"):
        export_statistics(found, place)
    assert theirs.read_bytes() == before
    assert not place.path(MODULES[0]).exists()  # looked at before any was written
    export_statistics(found, place, overwrite=True)
    assert their_loader.load(theirs).count == 256


def test_a_module_that_was_not_precomputed(found: Statistics, tmp_path: Path) -> None:
    with pytest.raises(fastcov.FastcovError, match=r"no second moment of model\.layers\.2\."):
        export_statistics(found, StatsPlace(tmp_path, "memit", "tiny"), [MODULES[0], "model.layers.2.mlp.down_proj"])
    assert not (tmp_path / "tiny").exists()


def test_the_projectors_are_those_of_the_eigenvectors(found: Statistics, tmp_path: Path) -> None:
    path = tmp_path / "null_space_project.pt"
    eigenvalues = [torch.linalg.eigvalsh(found.second_moment(n).double()) for n in MODULES]
    threshold = float(eigenvalues[0][9] + eigenvalues[0][10]) / 2  # ten below it
    ranks = export_null_space(found, path, threshold=threshold)
    assert ranks[MODULES[0]] == 10
    assert ranks[MODULES[1]] == int((eigenvalues[1] < threshold).sum()) > 0
    P = torch.load(path, weights_only=True)
    assert (P.dtype, P.shape, type(P)) == (torch.float32, (2, 64, 64), torch.Tensor)
    for layer, name in enumerate(MODULES):
        # As AlphaEdit does it: singular vectors of C, of a symmetric matrix the eigenvectors.
        U, S, _ = torch.linalg.svd(found.second_moment(name).double())
        small = U[:, threshold > S]
        assert torch.allclose(P[layer].double(), small @ small.T, atol=1e-6)
    # A relative threshold counts in the mean of the diagonal.
    mean = float(found.second_moment(MODULES[0]).double().diagonal().mean())
    again = export_null_space(found, path, MODULES[:1], relative=threshold / mean, overwrite=True)
    assert again == {MODULES[0]: 10}
    assert torch.load(path, weights_only=True).shape == (1, 64, 64)


@pytest.mark.parametrize(
    ("threshold", "match"),
    [(1e-30, "none of the 64 .* nothing could be edited"), (1e30, "all of the 64 .* nothing woul")],
)
def test_a_threshold_that_leaves_nothing_is_said(
    found: Statistics, tmp_path: Path, threshold: float, match: str, caplog: pytest.LogCaptureFixture
) -> None:
    ranks = export_null_space(found, tmp_path / "p.pt", MODULES[:1], threshold=threshold)
    assert ranks == {MODULES[0]: 0 if threshold < 1 else 64}
    assert len(caplog.records) == 1 and re.search(match, caplog.text)


def test_what_cannot_be_projected(found: Statistics, tmp_path: Path) -> None:
    path = tmp_path / "p.pt"
    with pytest.raises(BadConfig, match="must be a finite number above 0 but is -1"):
        export_null_space(found, path, threshold=-1.0)
    with pytest.raises(BadConfig, match="no layer to project"):
        export_null_space(found, path, [])
    narrow = fastcov.SecondMoment(3).update(torch.eye(3).repeat(4, 1))
    own = {**fastcov.read_provenance(found.paths[MODULES[1]]), "budget": 12, "keys": 12}
    fastcov.save_moment(found.paths[MODULES[1]], narrow, own)
    with pytest.raises(BadConfig, match=r"3 wide but those of .* are 64, and one tensor cannot"):
        export_null_space(found, path)
    assert not path.exists()
    path.write_bytes(b"precious")
    with pytest.raises(BadConfig, match="exists and may be the work of days"):
        export_null_space(found, path)
    assert path.read_bytes() == b"precious"


def test_statistics_with_more_modules_give_those_that_are_named(tmp_path: Path) -> None:
    editor = tiny_editor(tmp_path / "cache", "gpt2", layers=None)
    found = editor.precompute(tiny_corpus(), multiplier=4, layers=(0, 1, 2))
    name = "transformer.h.1.mlp.c_proj"
    paths = export_statistics(found, StatsPlace(tmp_path, "rome", "gpt2"), [name])
    assert list(paths) == [name]
    assert torch.equal(their_loader.load(paths[name]).moment(), found.second_moment(name))
