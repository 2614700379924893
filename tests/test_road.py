"""The roads of an edit and of a precompute stay short: a new storey has to be worth its stairs.

The bounds are those of CONTRIBUTING.md. Where a road grows past one, look for a function that only hands its arguments
on, or for a file that is entered for one function.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from road import Road, roads

FILES, DEPTH, BOTH = {"precompute": 16, "edit": 22}, {"precompute": 16, "edit": 11}, 27


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Road]:
    return roads(tmp_path_factory.mktemp("road"))


@pytest.mark.parametrize("name", FILES)
def test_a_road_is_no_longer_than_it_was(found: dict[str, Road], name: str) -> None:
    assert len(found[name].files) <= FILES[name], sorted(found[name].files)
    assert found[name].depth <= DEPTH[name]


def test_both_roads_share_their_files(found: dict[str, Road]) -> None:
    files = set().union(*(road.files for road in found.values()))
    assert len(files) <= BOTH, sorted(files)


def test_what_is_counted_is_what_runs(tmp_path: Path) -> None:
    from fastcov import budget

    road = Road.of(lambda: budget(2.0, 8))
    assert road.files == {"fastcov/moments.py"} and road.depth >= 1
    assert Road.of(lambda: len("nothing of ours")).files == set()
