"""How far a reader has to walk: the files, functions and levels that one edit and one precompute enter.

    PYTHONPATH=.:python:tests python tests/road.py [--list]

Two facts are written into two layers of a tiny random GPT-2 by MEMIT, and every function of `fastcov` and `fastmemit`
that is entered is counted. Nothing is downloaded.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import fastcov
import fastmemit

ROOTS = tuple(str(Path(str(package.__file__)).parent) for package in (fastcov, fastmemit))


@dataclass
class Road:
    """What was entered while something ran.

    Attributes:
        files: The files, as they are named in their packages.
        functions: The functions, by their code.
        depth: How many functions of ours lay upon one another at most.
    """

    files: set[str] = field(default_factory=set)
    functions: set[CodeType] = field(default_factory=set)
    depth: int = 0

    @classmethod
    def of(cls, work: Callable[[], Any]) -> Road:
        """Run something and count."""
        road = cls()
        before = sys.getprofile()
        sys.setprofile(road._note)
        try:
            work()
        finally:
            sys.setprofile(before)
        return road

    def _note(self, frame: FrameType, event: str, _: Any) -> None:
        if event != "call" or not _ours(frame):
            return
        code = frame.f_code
        root = next(root for root in ROOTS if code.co_filename.startswith(root))
        self.files.add(str(Path(code.co_filename).relative_to(Path(root).parent)))
        self.functions.add(code)
        levels, below = 0, frame
        while below is not None:
            levels += _ours(below)
            below = below.f_back  # type: ignore[assignment]  # None ends the walk
        self.depth = max(self.depth, levels)

    def __str__(self) -> str:
        return f"{len(self.files)} files, {len(self.functions)} functions, {self.depth} deep"


def _ours(frame: FrameType) -> bool:
    """Whether a function of ours runs; what a decorator puts around it is no level of its own."""
    code = frame.f_code
    return code.co_filename.startswith(ROOTS) and not (
        code.co_name == "inside" and code.co_filename.endswith("hooks.py")
    )


def roads(folder: Path) -> dict[str, Road]:
    """The roads of a precompute and of an edit after it."""
    from tiny_editors import FACTS, tiny_corpus, tiny_editor

    editor = tiny_editor(folder, "gpt2", layers=None)
    layers = (0, 1)
    return {
        "precompute": Road.of(lambda: editor.precompute(tiny_corpus(), multiplier=2.0, layers=layers)),
        "edit": Road.of(lambda: editor.edit(FACTS[:2], "memit", layers=layers, steps=3)),
    }


def main() -> None:
    """Print the roads, and with --list their files."""
    with tempfile.TemporaryDirectory() as folder:
        found = roads(Path(folder))
    for name, road in found.items():
        print(f"{name}: {road}")
        if "--list" in sys.argv:
            print(*(f"    {file}" for file in sorted(road.files)), sep="\n")
    print(f"both: {len(set().union(*(road.files for road in found.values())))} files")


if __name__ == "__main__":
    main()
