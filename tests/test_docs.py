"""The Python blocks of docs/ run, each in a folder of its own."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from fastmemit import Edit
from fastmemit.cli import VERBS, parser
from fastmemit.cli.options import FLAGS
from fastmemit.statistics import StatisticsStore

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


def named(text: str) -> Any:
    """What a dotted name of ours is; AttributeError or ImportError where there is no such thing."""
    parts = text.split(".")
    found: Any = importlib.import_module(parts[0])
    for at, part in enumerate(parts[1:], 2):
        if not hasattr(found, part):
            importlib.import_module(".".join(parts[:at]))
        found = getattr(found, part)
    return found


def test_every_new_name_of_the_changelog_exists() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+) \| (.+) \|$", text[text.index("### Renamed") :], re.MULTILINE)
    assert len(rows) > 200
    verbs, stores = set(VERBS), {"editor.store": StatisticsStore, "edit": Edit}
    for _, now in rows:
        for name in re.findall(r"(?<![\w/.-])(?:fastcov|fastmemit)(?:\.\w+)+", now):
            assert named(name) is not None, name
        for name in re.findall(r"benchmarks/\w+\.py", now):
            assert (ROOT / name).is_file(), name
        for word in re.findall(r"--[a-z][\w-]+", now):
            assert any(word in flags for flags in FLAGS.values()) or word in ("--load", "--adopt"), word
        for verb in re.findall(r"fastmemit ((?:stats|adapter|hub|experiment) \w+)", now):
            assert verb in verbs, verb
        for owner, method in re.findall(r"(editor\.store|(?<!\.)\bedit)\.(\w+)", now):
            assert hasattr(stores[owner], method), method


def commands() -> list[Any]:
    """Every command of fastmemit in a block of the README or of a page, one line each."""
    found = []
    for page in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "examples" / "README.md",
        *sorted((ROOT / "docs").rglob("*.md")),
    ]:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in re.findall(r"^(?: {4})?(?:\$ )?(?:python -m )?fastmemit ([a-z].*)$", text, re.MULTILINE):
            if " ... " not in line:  # one that leaves out what was said before
                found.append(pytest.param(line, id=f"{page.name}: {line:.60}"))
    return found


@pytest.mark.parametrize("line", commands())
def test_a_command_of_a_page_parses(line: str) -> None:
    words = shlex.split(line.replace("METHOD", "memit"), comments=True)
    words = words[: next((at for at, word in enumerate(words) if word in ("|", ">", "&&", "&")), len(words))]
    parser().parse_args(words)
