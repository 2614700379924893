"""The Python blocks of docs/ run, each in a folder of its own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks() -> list[Any]:
    found = []
    for page in sorted((ROOT / "docs").rglob("*.md")):
        text = page.read_text(encoding="utf-8")
        for match in BLOCK.finditer(text):
            line = text.count("\n", 0, match.start(1))  # so that a traceback has the page's lines
            marks = [pytest.mark.real, pytest.mark.slow] if "smollm2" in match[1] else []
            name = f"{page.name}:{line + 1}"
            found.append(pytest.param(page, "\n" * line + match[1], marks=marks, id=name))
    return found


@pytest.mark.parametrize(("page", "source"), blocks())
def test_a_block_of_a_page_runs(
    page: Path, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if "smollm2" in source:
        request.getfixturevalue("smollm2_pristine")  # skips where it is not installed
        monkeypatch.setenv("FASTMEMIT_CACHE", str(ROOT / ".cache" / "fastmemit"))
    if "FASTMEMIT_DATA" in source:
        monkeypatch.setenv("FASTMEMIT_DATA", str(request.getfixturevalue("data_dir")))
    monkeypatch.chdir(tmp_path)
    exec(compile(source, page, "exec"), {"__name__": f"block of {page.name}"})


def test_there_are_blocks() -> None:
    assert {param.values[0].name for param in blocks()} >= {"second-moment.md", "store-format.md"}
