"""Statistics to other codebases and from them, on the command line."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import their_loader
from fastmemit.cli import parser
from fastmemit.cli.options import LAYOUT_NAMES
from fastmemit.compat import LAYOUTS, SAMPLE_SIZE
from fastmemit.delta import Delta
from tiny_commands import EDIT, Place, refused, run

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def kept(place: Place, capsys: Capture) -> Place:
    run(capsys, "precompute", *place.model, "--corpus", place.corpus, "--multiplier", "4",
        "--layers", "0-1")  # fmt: skip
    return place


def test_the_options_name_what_there_is() -> None:
    assert LAYOUT_NAMES == LAYOUTS
    words = ["stats", "export", "--model", "m", "--layout", "rome"]
    assert parser().parse_args(words).sample_size == SAMPLE_SIZE


def test_out_and_in_again(kept: Place, capsys: Capture) -> None:
    stats = kept.at / "data" / "stats"
    out = run(capsys, "stats", "export", *kept.model, "--layout", "memit", "--stats-dir", stats)
    name = Path(kept.model[1]).name
    folder = kept.model[1].replace("/", "_")  # theirs make one of the whole path that a model is loaded from
    paths = [their_loader.their_path(stats, folder, f"model.layers.{i}.mlp.down_proj") for i in (0, 1)]
    assert [line.strip() for line in out.splitlines() if line.startswith("  ")] == list(map(str, paths))
    assert f"{name}: second moments of 2 layers, corpus corpus.jsonl, multiplier 4, 256" in out
    assert "mom2_dataset is wikipedia, mom2_n_samples 100000 and mom2_dtype float32" in out
    assert all(their_loader.load(path).count == 256 for path in paths)

    for number, corpus in enumerate([[], ["--cache", kept.at / "other"]]):
        if corpus:
            out = run(capsys, "stats", "import", *kept.model, *corpus, "--layout", "memit",
                      "--stats-dir", stats)  # fmt: skip
            assert f"{name} in float32: second moments of 2 layers taken over, corpus im" in out
        out = run(capsys, "edit", *kept.model, *corpus, *EDIT, "--facts", kept.requests,
                  "--out", kept.at / f"{number}.st")  # fmt: skip
        where = "imported:wikipedia_stats" if corpus else "corpus.jsonl"
        assert f"statistics: corpus {where}, multiplier 4, 256 keys (stored)" in out
    one, two = (Delta.load(kept.at / f"{number}.st") for number in (0, 1))
    assert one.digest() == two.digest()


def test_single_files_are_named(kept: Place, capsys: Capture) -> None:
    run(capsys, "stats", "export", *kept.model, "--layout", "rome", "--stats-dir", kept.at,
        "--model-name", "me/tiny", "--layers", "1", "--dataset", "pile", "--sample-size", "7",
        "--precision", "float64")  # fmt: skip
    path = kept.at / "me_tiny" / "pile_stats" / "model.layers.1.mlp.down_proj_float64_mom2_7.npz"
    assert np.load(path)["mom2.mom2"].dtype == np.float64
    assert len(list(path.parent.iterdir())) == 1
    out = run(capsys, "stats", "import", *kept.model, "--file", path)
    assert "1 layer taken over, corpus imported:pile_stats, multiplier 4, 256 keys" in out


def test_easyedits_alphaedit_gets_its_projectors(kept: Place, capsys: Capture) -> None:
    stats = kept.at / "repo" / "data" / "stats"
    common = ("stats", "export", *kept.model, "--layout", "easyedit", "--stats-dir", stats)
    out = run(capsys, *common, "--relative-threshold", "0.05")
    path = kept.at / "repo" / "null_space_project.pt"
    assert f"projectors onto the null spaces in {path}\n" in out
    assert "taken where P_loc is that file and layers are [0, 1]\n" in out
    ranks = [int(n) for n in re.findall(r"down_proj: (\d+) of 64 directions", out)]
    P = torch.load(path, weights_only=True)
    assert P.shape == (2, 64, 64)
    assert ranks == [round(float(p.trace())) for p in P] and all(0 < r < 64 for r in ranks)
    line = refused(capsys, kept, *common)
    assert "null_space_project.pt' exists" in line and line.endswith("or pass --overwrite.")
    path.unlink()
    line = refused(capsys, kept, *common)
    assert "mom2_100000.npz' exists" in line
    out = run(capsys, *common, "--overwrite", "--no-null-space")
    assert "projectors" not in out and not path.exists()
    elsewhere = kept.at / "p.pt"
    run(capsys, "stats", "export", *kept.model, "--layout", "easyedit", "--stats-dir", kept.at,
        "--null-space", elsewhere, "--threshold", "1000", "--layers", "1")  # fmt: skip
    assert torch.load(elsewhere, weights_only=True).shape == (1, 64, 64)


def test_alphaedits_own_code_never_reads_projectors(kept: Place, capsys: Capture) -> None:
    stats = kept.at / "repo" / "data" / "stats"
    out = run(capsys, "stats", "export", *kept.model, "--layout", "alphaedit", "--stats-dir", stats)
    assert "projectors" not in out and not list(kept.at.rglob("*.pt"))
    assert len(list((stats / "tiny-llama").rglob("*.npz"))) == 2


def test_projectors_are_of_the_layers_that_alphaedit_edits(place: Place, capsys: Capture) -> None:
    run(capsys, "precompute", *place.model, "--corpus", place.corpus, "--multiplier", "4", "--layers", "0-2")
    out = run(capsys, "stats", "export", *place.model, "--layout", "easyedit", "--stats-dir", place.at)
    assert "layers are [0, 1, 2]\n" in out
    P = torch.load(place.at / "null_space_project.pt", weights_only=True)
    assert P.shape == (3, 64, 64)


def test_they_are_collected_where_a_corpus_is_named(place: Place, capsys: Capture) -> None:
    common = ("stats", "export", *place.model, "--layout", "memit", "--layers", "1", "--stats-dir")
    line = refused(capsys, place, *common, place.at)
    assert "No second moments of the layers [1]" in line and "name a --corpus" in line
    run(capsys, *common, place.at, "--corpus", place.corpus, "--multiplier", "2")
    (path,) = place.at.rglob("*.npz")
    assert their_loader.load(path).count == 128
    line = refused(capsys, place, *common, place.at / "x", "--multiplier", "3")
    assert "No second moments of the layers [1] of" in line and "for the multiplier 3;" in line


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--layout", "rome", "--threshold", "0.1"], "--null-space and thresholds make no sense"),
        (["--layout", "easyedit", "--threshold", "-1"], "above 0 but is -1"),
        (["--layout", "easyedit", "--threshold", "nan"], "above 0 but is nan"),
        (["--layout", "easyedit", "--threshold", "1", "--relative-threshold", "1"], "either"),
        (["--layout", "easyedit", "--null-space", "x", "--no-null-space"], "make no sense"),
        (["--layout", "alphaedit", "--threshold", "0.1"], "--null-space and thresholds make no sense"),
        (["--layout", "rome", "--null-space", "."], "'.' is a folder; name a file (--null-space)"),
        (["--layout", "pmet"], "invalid choice: 'pmet'"),
        (["--layout", "rome", "--dataset", "a/x"], "no plain name"),
        ([], "required: --layout"),
    ],
)
def test_what_cannot_be_exported(place: Place, capsys: Capture, options: list[str], part: str) -> None:
    line = refused(capsys, place, "stats", "export", *place.model, *options)
    assert part in line and not (place.at / "cache").exists()


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ([], "either by --layout and --stats-dir or by --file"),
        (["--layout", "rome", "--file", "x.npz"], "either by --layout"),
        (["--file", "x.npz", "--layers", "1"], "leave --layers out"),
        (["--layout", "rome", "--stats-dir", "nowhere"], "There is no file 'nowhere/"),
        (["--file", "x.npz"], "'x.npz' does not say which module"),
    ],
)
def test_what_cannot_be_imported(place: Place, capsys: Capture, options: list[str], part: str) -> None:
    assert part in refused(capsys, place, "stats", "import", *place.model, *options)


def test_another_model_is_refused_and_taken_by_force(kept: Place, capsys: Capture) -> None:
    run(capsys, "stats", "export", *kept.model, "--layout", "rome", "--stats-dir", kept.at)
    files = sorted(kept.at.rglob("*.npz"))
    options = [word for path in files for word in ("--file", path)]
    other = kept.other_model()
    line = refused(capsys, kept, "stats", "import", *other, *options)
    assert "are not of this model's keys" in line and "or pass --no-check if" in line
    assert "2 layers taken over" in run(capsys, "stats", "import", *other, *options, "--no-check")
