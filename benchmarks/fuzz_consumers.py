"""What is done with files once they are read: found, composed, applied, reported, and shown."""

from __future__ import annotations

import contextlib
import functools
import io
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

import fastcov
from benchmarks.fuzz_readers import Absent, Reader, seal_delta, seal_moment
from fastmemit.cli import main
from fastmemit.delta import Delta
from fastmemit.edits import Edit, EditStack
from fastmemit.experiments import report
from fastmemit.files import write_moments
from fastmemit.sharing import compose, compressed, parts, remove
from fastmemit.statistics import StatisticsStore
from tiny_models import D_K, D, tiny_model
from tiny_sweeps import made, record, write

_MODEL = "f" * 64
_MODULES = tuple(f"model.layers.{layer}.mlp.down_proj" for layer in range(2))
_WEIGHT = f"{_MODULES[0]}.weight"


def consumer_readers() -> list[Reader]:
    """What is done with each kind of file, as readers of one of its files."""
    sealed = (seal_moment, seal_delta)
    return [
        Reader("find", "safetensors", _statistics, _find, True, sealed[0]),
        Reader("compose", "safetensors", _edit, _compose, True, sealed[1]),
        Reader("composition", "safetensors", _composition, _taken_apart, True, sealed[1]),
        Reader("apply", "safetensors", _edit, _apply, True, sealed[1]),
        Reader("report", "lines", _sweep("results.jsonl"), _report),
        Reader("report-page", "json", _sweep("sweep.json"), _report),
        Reader("shown-compose", "safetensors", _edit, _shown_compose, False, sealed[1]),
        Reader("shown-requests", "lines", _requests, _shown_requests),
    ]


# -- statistics -----------------------------------------------------------------------------------


def _statistics(folder: Path) -> Path:
    shared = {
        "model": _MODEL,
        "model_name": "tiny",
        "tokenizer": "t" * 64,
        "corpus": {"name": "corpus", "fingerprint": "c" * 64},
        "seed": 0,
        "multiplier": 4.0,
        "context": 64,
        "allow_fewer": False,
    }
    moments = {}
    for number, module in enumerate(_MODULES):
        keys = torch.randn(20, 5, generator=torch.Generator().manual_seed(number))
        own = {"budget": 20, "keys": 20, "versions": {"torch": "2.13.0"}}
        moments[module] = (fastcov.SecondMoment(5).update(keys), own)
    return write_moments(folder / _MODEL[:16], shared, moments)[_MODULES[0]]


class _Store(StatisticsStore):
    """The statistics in a folder, of a model that is not there."""

    def __init__(self, home: Path) -> None:
        self._place, self._tokenizer_is = home, "t" * 64
        self._adapter: Any = SimpleNamespace(projection_name=_MODULES.__getitem__)
        self._stack: Any = SimpleNamespace(fingerprint=_MODEL)

    @property
    def _home(self) -> Path:
        return self._place


def _find(path: Path) -> Any:
    store = _Store(path.parents[1])
    found, whatever = store.find(range(len(_MODULES))), store.find(None, 4.0)
    for one in (found, whatever):
        if one is not None:
            _ = one.describe(), one.keys, one.exhausted, one.multiplier_of(5)
    if found is None:
        raise Absent
    return found.provenance, [found.moment(module) for module in _MODULES]


# -- edits ----------------------------------------------------------------------------------------


def _delta(seed: int) -> Delta:
    draw = torch.Generator().manual_seed(seed)
    pair = torch.randn(D, 2, generator=draw) / 8, torch.randn(D_K, 2, generator=draw) / 8
    fact = {"prompt": "{} is", "subject": f"Rome {seed}", "target": " x", "target_true": None}
    about = {"model": _MODEL, "model_name": "tiny", "method": "memit", "requests": [fact]}
    return Delta({_WEIGHT: pair}, about)


def _edit(folder: Path) -> Path:
    _delta(1).save(folder / "other")
    _delta(0).save(folder / "e.safetensors")
    return folder / "e.safetensors"


def _composition(folder: Path) -> Path:
    compose([_delta(0), _delta(1)]).save(folder / "c.safetensors")
    return folder / "c.safetensors"


def _compose(path: Path) -> Any:
    deltas = [Delta.load(path), Delta.load(path.parent / "other")]
    whole = compose(deltas)
    again = path.parent / "whole"
    compressed(whole, rank=1).save(again)
    whole.save(again)
    assert Delta.load(again).digest() == whole.digest()
    return [part.factors for part in parts(whole)]


def _taken_apart(path: Path) -> Any:
    whole = Delta.load(path)
    found = parts(whole)
    rest = remove(whole, found[0].digest()) if len(found) > 1 else whole
    return [part.factors for part in found], rest.factors


@functools.cache
def _half() -> Any:
    """A model whose weights reach no further than 65504."""
    return tiny_model("llama").half()


def _apply(path: Path) -> Any:
    model = _half()
    weight = model.get_parameter(_WEIGHT)
    before = weight.detach().clone()
    try:
        delta = Delta.load(path)
        edit = Edit(delta, EditStack(model)).apply()
        if not bool(torch.isfinite(weight).all()):
            raise AssertionError("the weight is not finite with the edit")
        _ = repr(edit)
        edit.undo()
    finally:
        same = torch.equal(weight, before)
        with torch.no_grad():
            weight.copy_(before)
        if not same:
            raise AssertionError("the weight is not what it was")
    return delta.factors


# -- sweeps ---------------------------------------------------------------------------------------


def _sweep(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        cells = [made("memit", d, (1, 2), [record(0, 1.0), record(1, 0.0, 0.5, None)], worse=1.5) for d in (2.0, None)]
        return write(folder, cells) / name

    return make


def _report(path: Path) -> Any:
    """The report's texts; its figures take seconds, and `pictures` has tests of its own."""
    with mock.patch.object(report, "pictures", lambda *_: []):
        found = report.write_report([path.parent], resamples=20)
    texts = {file.name: file.read_bytes() for file in found.files if file.suffix != ".png"}
    for name, text in texts.items():
        check_shown(text.decode("utf-8"), name)
    return texts


# -- the command line -----------------------------------------------------------------------------


def check_shown(text: str, what: str) -> None:
    """Refuse text with a control that a terminal would obey."""
    for character in text:
        code = ord(character)
        if (code < 32 and character not in "\n\t") or 127 <= code < 160 or 0x202A <= code < 0x202F:
            raise AssertionError(f"{what} shows {character!r}")


def _shown(*args: object) -> tuple[int, str]:
    """A verb's exit and what it says."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(arg) for arg in args])
        except SystemExit as end:
            code = int(end.code or 0)
    check_shown(out.getvalue(), "stdout")
    check_shown(err.getvalue(), "stderr")
    if code not in (0, 2):
        raise AssertionError(f"{args[0]} ended with {code}")
    return code, out.getvalue() + err.getvalue()


def _shown_compose(path: Path) -> Any:
    whole = path.parent / "whole"
    code, said = _shown("compose", "--edit", path, "--edit", path.parent / "other", "--out", whole)
    if code:
        raise Absent
    return said.replace(str(path.parent), "")


def _requests(folder: Path) -> Path:
    facts = [{"prompt": "{} is", "subject": f"Rome {i}", "target_new": "x"} for i in range(2)]
    path = folder / "r.jsonl"
    path.write_text("".join(json.dumps(fact) + "\n" for fact in facts), encoding="utf-8")
    return path


def _shown_requests(path: Path) -> Any:
    """Refused in the end in any case: the file is read before the model is looked for."""
    folder = path.parent
    code, said = _shown("edit", "--model", folder / "none", "--facts", path, "--out", folder / "e")
    assert code == 2
    return said.replace(str(folder), "")
