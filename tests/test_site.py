"""The site that `make docs` builds: what its pages take from the code, and that no page is left out."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from fastmemit.cli import VERBS

ROOT = Path(__file__).resolve().parents[1]


SITE: dict[str, Any] = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def hook(markdown: str) -> str:
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return str(module.on_page_markdown(markdown, page=SimpleNamespace()))


def pages(nav: Any = SITE["nav"]) -> list[str]:
    """The files that the navigation names."""
    if isinstance(nav, str):
        return [nav]
    return [page for part in (nav.values() if isinstance(nav, dict) else nav) for page in pages(part)]


def test_the_navigation_has_every_page() -> None:
    found = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md") if path.name != "tables.md"}
    assert sorted(pages()) == sorted(found)


def test_every_public_package_has_its_page() -> None:
    said = re.findall(r"^::: (\S+)$", "\n".join((ROOT / "docs" / page).read_text() for page in pages()), re.MULTILINE)
    folders = [path.parent.name for path in (ROOT / "python" / "fastmemit").glob("*/__init__.py")
               if "__all__" in path.read_text()]  # fmt: skip
    assert sorted(said) == sorted(["fastcov", "fastcov.errors", "fastmemit", "fastmemit.errors",
                                   *(f"fastmemit.{name}" for name in folders)])  # fmt: skip


def test_the_page_of_the_command_line_has_every_verb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    made = hook((ROOT / "docs" / "reference" / "command-line.md").read_text())
    assert sorted(re.findall(r"^## fastmemit (.*)$", made, re.MULTILINE)) == sorted(VERBS)
    assert made.count("usage: fastmemit ") == made.count("examples:\n") == len(VERBS)
    assert max(map(len, made.splitlines()[4:])) <= 100


def test_a_link_out_of_the_pages_becomes_the_name_of_a_file() -> None:
    said = "[lines](../../benchmarks/results/x.json), [there](../results/README.md)"
    assert hook(said) == "lines (`benchmarks/results/x.json`), [there](../results/README.md)"
    for page in pages():  # none that the hook does not know
        for link in re.findall(r"\]\(((?:\.\./)+[^)#]*)", hook((ROOT / "docs" / page).read_text())):
            target = (ROOT / "docs" / page).parent.joinpath(link).resolve()
            assert target.is_relative_to(ROOT / "docs") and target.exists(), (page, link)


def test_nothing_is_fetched_to_read_it() -> None:
    assert SITE["theme"]["font"] is False
    assert [name for name in SITE if name.startswith("extra_")] == []
