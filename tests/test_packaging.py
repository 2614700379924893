"""What the project says about itself, against what is on disk."""

from __future__ import annotations

import re
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]
SOURCES = {name: ROOT / folder for name, folder in SETUPTOOLS["package-dir"].items()}


def folder_of(package: str) -> Path:
    top, _, rest = package.partition(".")
    return SOURCES[top].joinpath(*rest.split(".")) if rest else SOURCES[top]


def files_of(root: Path) -> list[Path]:
    return [p for p in root.rglob("*") if p.is_file() and "__pycache__" not in p.parts]


def shipped_data() -> set[Path]:
    """The files that the wheel takes besides modules: matches of each package's patterns."""
    return {
        path
        for package, patterns in SETUPTOOLS["package-data"].items()
        for pattern in patterns
        for path in folder_of(package).glob(pattern)
    }


def listed_requirements() -> dict[str, list[Requirement]]:
    """Every requirement of the project, by name; an extra may repeat one of another."""
    found: dict[str, list[Requirement]] = {}
    extras = PROJECT["project"]["optional-dependencies"]
    for line in [*PROJECT["project"]["dependencies"], *(x for part in extras.values() for x in part)]:
        requirement = Requirement(line)
        found.setdefault(requirement.name, []).append(requirement)
    return found


def pins() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("top", SOURCES)
def test_every_folder_with_modules_is_a_listed_package(top: str) -> None:
    folders = {path.parent for path in files_of(SOURCES[top]) if path.suffix == ".py"}
    listed = {folder_of(name) for name in SETUPTOOLS["packages"] if name.split(".")[0] == top}
    assert listed == folders, "pyproject.toml [tool.setuptools] packages is not what is on disk"
    bare = [str(f.relative_to(ROOT)) for f in folders if not (f / "__init__.py").is_file()]
    assert not bare, "a package without __init__.py"


@pytest.mark.parametrize("top", SOURCES)
def test_every_other_file_is_package_data(top: str) -> None:
    # An editable installation leaves the native module beside the sources; wheels build their own.
    others = {path for path in files_of(SOURCES[top]) if path.suffix != ".py" and not path.name.startswith("_native.")}
    forgotten = sorted(str(path.relative_to(ROOT)) for path in others - shipped_data())
    assert not forgotten, "not in the wheel: add to [tool.setuptools.package-data]"


@pytest.mark.parametrize(
    ("package", "pattern"), [(name, pattern) for name, part in SETUPTOOLS["package-data"].items() for pattern in part]
)
def test_every_pattern_of_package_data_finds_a_file(package: str, pattern: str) -> None:
    assert list(folder_of(package).glob(pattern)), f"{package}: {pattern} matches nothing"


def test_the_console_script_exists_and_fastcov_has_none() -> None:
    scripts = PROJECT["project"]["scripts"]
    assert set(scripts) == {"fastmemit"}, "fastcov is the script of another distribution"
    module, _, attribute = scripts["fastmemit"].partition(":")
    source = folder_of(module) / "__init__.py"
    assert re.search(rf"\b{attribute}\b", source.read_text(encoding="utf-8")), f"no {attribute}"


def test_torch_is_pinned_first_and_not_needed_to_build() -> None:
    assert str(pins()[0]) == "torch==2.13.0"
    assert not any("torch" in line for line in PROJECT["build-system"]["requires"])


def test_pins_lie_within_what_the_project_asks_for() -> None:
    listed = listed_requirements()
    for pin in pins():
        (specifier,) = pin.specifier
        assert specifier.operator == "==", f"{pin} is not a pin"
        for requirement in listed.get(pin.name, []):
            assert requirement.specifier.contains(specifier.version), f"{pin} against {requirement}"


def test_all_that_the_commands_install_is_pinned() -> None:
    # pre-commit and build are for people, not for `make`: no result depends on their version.
    unpinned = set(listed_requirements()) - {pin.name for pin in pins()} - {"pre-commit", "build"}
    assert not unpinned


@pytest.mark.parametrize("version", ["3.10", "3.11", "3.13"])
def test_every_python_gets_one_pin_of_each(version: str) -> None:
    chosen = [p.name for p in pins() if not p.marker or p.marker.evaluate({"python_version": version})]
    assert len(chosen) == len(set(chosen))
    assert set(chosen) == {pin.name for pin in pins()}


def test_the_version_is_the_same_everywhere() -> None:
    version = PROJECT["project"]["version"]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {version}\n" in citation
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## \[([^\]]+)\]", changelog, re.MULTILINE)
    assert newest and newest.group(1) == version
    for top, folder in SOURCES.items():
        said = re.search(r'^__version__ = "([^"]+)"', (folder / "__init__.py").read_text("utf-8"), re.MULTILINE)
        assert said is None or said.group(1) == version, f"{top}.__version__"


YAML = sorted([*(ROOT / ".github").rglob("*.yml"), ROOT / ".pre-commit-config.yaml"])


@pytest.mark.parametrize("path", YAML, ids=lambda path: path.name)
def test_a_file_of_the_host_is_what_it_reads(path: Path) -> None:
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    if path.parent.name == "workflows":
        assert found["permissions"]["contents"] == "read" and True in found  # yaml's name for "on"
        for job in found["jobs"].values():
            assert job["timeout-minutes"] <= 120 and all(("run" in step) != ("uses" in step) for step in job["steps"])
            for step in job["steps"]:
                assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step.get("uses", "a/b@v1"))
                for target in re.findall(r"\bmake ([a-z]+)", step.get("run", "")):
                    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    elif path.name in ("bug.yml", "wish.yml"):
        assert found["name"] and found["description"]
        fields = [field for field in found["body"] if field["type"] != "markdown"]
        assert len({field["id"] for field in fields}) == len(fields)
        assert any(field.get("validations", {}).get("required") for field in fields)
        assert all(field["attributes"]["label"] for field in fields)


def test_the_same_pythons_are_promised_tested_and_built() -> None:
    line = "Programming Language :: Python :: 3."
    promised = [f"3.{name.removeprefix(line)}" for name in PROJECT["project"]["classifiers"] if name.startswith(line)]
    assert promised == ["3.10", "3.11", "3.12", "3.13", "3.14"]
    tests = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8"))
    assert tests["jobs"]["quick"]["strategy"]["matrix"]["python"] == promised
    built = PROJECT["tool"]["cibuildwheel"]["build"].split()
    assert built == [f"cp{version.replace('.', '')}-*" for version in promised]


def test_make_help_names_every_target() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    (phony,) = re.findall(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    assert set(phony.split()) == set(re.findall(r"^([a-z-]+):.*## ", text, re.MULTILINE))


def test_source_files_keep_the_house_rules() -> None:
    # Of sources and benchmarks; a test file is as long as what it tests has behaviours.
    roots = [*SOURCES.values(), ROOT / "benchmarks"]
    for path in (p for root in roots for p in files_of(root) if p.suffix == ".py"):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= 700, f"{path.relative_to(ROOT)} has {lines} lines"
        assert not any(fnmatch(path.stem, f"*{word}*") for word in ("utils", "helpers")), path


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "SECURITY.md",
        "CODE_OF_CONDUCT.md",
        *(ROOT / "docs").rglob("*.md"),
    ],
)
def test_links_between_documents_lead_somewhere(page: str | Path) -> None:
    path = ROOT / page
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_no_address_of_the_repository_is_made_up() -> None:
    """It has none yet; pyproject.toml says what waits for one."""
    assert PROJECT["project"]["urls"].keys() == {"Paper"}
    hosts = re.compile(r"(github|gitlab|codeberg|pages)\.\w+/[\w.-]*|\w+\.readthedocs", re.IGNORECASE)
    known = ("github.com/huggingface", "github.com/google")  # formats and tools that pages link to
    files = [p for p in ROOT.glob("*.*") if p.suffix in (".md", ".toml", ".cff", ".yml")]
    files += [*(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").iterdir(), *(ROOT / ".github").rglob("*.yml")]
    found = [(p.name, m[0]) for p in files for m in hosts.finditer(p.read_text(encoding="utf-8")) if m[0] not in known]
    assert files and found == []
