"""Folders of a cache that several users share."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from fastmemit.files import shared_folder

pytestmark = pytest.mark.skipif(os.name != "posix", reason="modes are those of POSIX")


@pytest.mark.parametrize(
    ("above", "made"), [(0o755, 0o755), (0o700, 0o755), (0o777, 0o777), (0o1777, 0o1777), (0o775, 0o775)]
)
def test_new_folders_are_for_those_who_may_write_above(tmp_path: Path, above: int, made: int) -> None:
    root = tmp_path / "cache"
    root.mkdir()
    root.chmod(above)
    former = os.umask(0o022)
    try:
        shared_folder(root / "a" / "b")
    finally:
        os.umask(former)
    for folder in (root / "a", root / "a" / "b"):
        assert stat.S_IMODE(folder.stat().st_mode) == made
    shared_folder(root / "a" / "b")
    assert stat.S_IMODE(root.stat().st_mode) == above
