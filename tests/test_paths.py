"""A place in the file system may be given as text, as a Path or as anything else that is os.PathLike, everywhere."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import pytest

import fastcov
from fastmemit import compat, data, evaluation, methods, models, sharing
from fastmemit.delta import Delta
from fastmemit.errors import FastmemitError
from fastmemit.evaluation.downstream import find_tasks
from fastmemit.evaluation.perplexity import read_text
from fastmemit.experiments.report import write_report
from fastmemit.experiments.results import Inputs, collect
from fastmemit.targets import TargetKey, TargetStore
from fastmemit.tracing_report import draw
from tiny_editors import tiny_corpus

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("fastcov", "fastmemit", "fastmemit.compat", "fastmemit.data", "fastmemit.evaluation", "fastmemit.methods",
            "fastmemit.models", "fastmemit.sharing")  # fmt: skip


class Place:
    """What is os.PathLike and neither text nor a Path."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __fspath__(self) -> str:
        return str(self._path)


def public() -> Iterator[tuple[str, Any]]:
    """What the documented packages export, and what the documents and examples import."""
    for package in PACKAGES:
        module = importlib.import_module(package)
        yield from ((f"{package}.{name}", getattr(module, name)) for name in module.__all__)
    files = [*ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.py"), ROOT / "README.md"]
    for line in re.findall(r"^ *from (fast\w+[\w.]*) import ([\w, ]+)", "\n".join(map(Path.read_text, files)), re.M):
        module = importlib.import_module(line[0])
        yield from ((f"{line[0]}.{name}", getattr(module, name)) for name in re.findall(r"\w+", line[1]))


def functions() -> dict[str, Callable[..., Any]]:
    found = {}
    for name, value in public():
        if inspect.isfunction(value):
            found[name] = value
        if inspect.isclass(value) and not is_dataclass(value):
            found[f"{name}.__init__"] = value.__init__
        if inspect.isclass(value):
            methods = {key: getattr(part, "__func__", part) for key, part in vars(value).items() if key[0] != "_"}
            found |= {f"{name}.{key}": part for key, part in methods.items() if inspect.isfunction(part)}
    return found


def test_no_public_function_asks_for_a_path_alone() -> None:
    found = functions()
    assert len(found) > 150 and "fastmemit.experiments.report.write_report" in found
    for name, function in found.items():
        for parameter in inspect.signature(inspect.unwrap(function)).parameters.values():
            if re.search(r"\bPath\b", str(parameter.annotation)):
                raise AssertionError(f"{name}({parameter}): annotate StrPath, and take all three")


#: What reads or checks a place before anything else, beside what is not looked at then.
CALLS: dict[str, Callable[[Any], Any]] = {
    "load_moment": fastcov.load_moment,
    "read_provenance": fastcov.read_provenance,
    "Delta.load": Delta.load,
    "load_records": data.load_records,
    "load_requests": data.load_requests,
    "load_zsre": data.load_zsre,
    "load_corpus": data.load_corpus,
    "open_hparams": compat.open_hparams,
    "module_of": compat.module_of,
    "StatsPlace": lambda place: compat.StatsPlace(place, "memit", "gpt2").path("x"),
    "load_references": evaluation.load_references,
    "find_tasks": lambda place: find_tasks(["x"], include_path=place),
    "read_text": lambda place: read_text(place, None),
    "PreservedText": methods.PreservedText.from_text,
    "load_model": models.load_model,
    "load_skeleton": models.load_skeleton,
    "load_adapter": lambda place: sharing.load_adapter(place, None),
    "open_statistics": sharing.open_statistics,
    "push_statistics": lambda place: sharing.push_statistics(place, "me/x"),
    "push_adapter": lambda place: sharing.push_adapter(place, "me/x"),
    "TargetStore": lambda place: TargetStore(place)._path(TargetKey("x")),
    "Inputs": lambda place: Inputs(tiny_corpus(), place, {}).folder,
    "collect": collect,
    "write_report": lambda place: write_report([place]),
    "draw": lambda place: draw({}, place),
}


@pytest.mark.parametrize("name", CALLS)
def test_text_a_path_and_what_is_like_one_are_the_same_place(tmp_path: Path, name: str) -> None:
    path = tmp_path / "model.layers.0_float32_mom2_10.npz"

    def outcome(place: Any) -> str:
        try:
            return f"gave {CALLS[name](place)!r}"
        except (FastmemitError, fastcov.FastcovError, OSError) as error:
            return f"{type(error).__name__}: {error}"

    said = outcome(path)
    assert outcome(str(path)) == outcome(Place(path)) == said
    assert "model.layers.0" in said, "of the place"
