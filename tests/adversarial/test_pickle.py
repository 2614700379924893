"""Files are data: no source unpickles, and a pickle under any name is refused without being run."""

from __future__ import annotations

import ast
import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.fuzz_readers import Absent, readers
from fastcov import FastcovError
from fastmemit.errors import FastmemitError

ROOT = Path(__file__).resolve().parents[2]
RUN: list[str] = []


def run_by_a_pickle(what: str) -> None:
    RUN.append(what)


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return run_by_a_pickle, ("run",)


def plain() -> bytes:
    return pickle.dumps(Malicious())


def of_torch() -> bytes:
    file = io.BytesIO()
    torch.save({"sum": Malicious()}, file)
    return file.getvalue()


def of_numpy() -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([Malicious()], dtype=object), allow_pickle=True)
    return file.getvalue()


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(zipfile.ZipInfo("mom2.mom2.npy"), of_numpy())  # without the time, which may hold a line's end
    return file.getvalue()


PAYLOADS = {"pickle": plain, "torch": of_torch, "npy": of_numpy, "npz": zipped}


def test_the_payloads_would_run() -> None:
    RUN.clear()
    pickle.loads(plain())
    torch.load(io.BytesIO(of_torch()), weights_only=False)
    np.load(io.BytesIO(of_numpy()), allow_pickle=True)
    np.load(io.BytesIO(zipped()), allow_pickle=True)["mom2.mom2"]
    assert RUN == ["run"] * 4


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("name", readers())
def test_no_reader_runs_a_pickle(name: str, payload: str, tmp_path: Path) -> None:
    path = readers()[name].make(tmp_path)
    path.write_bytes(PAYLOADS[payload]())
    RUN.clear()
    refused = False
    said = None
    try:
        said = readers()[name].read(path)
    except (FastcovError, FastmemitError, Absent):
        refused = True
    assert RUN == []
    # To a file of lines it is one line without its end, which a killed process may have left.
    if name == "shown-requests":  # of a command, whose refusal is what it prints
        refused = "r.jsonl is not UTF-8 text" in said
    assert refused or name in ("results", "report-timings")


# What can run code that a file brings with it, and the argument that forbids it.
UNPICKLE = {
    "pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal",
}  # fmt: skip
SAFE = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False), "numpy.load": ("allow_pickle", False)}
NEVER = {"eval", "exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "pd.read_pickle",
         "torch.hub.load", "torch.jit.load", "torch.package.PackageImporter"}  # fmt: skip


def offences(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in UNPICKLE]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module for _ in [0] if (node.module or "").split(".")[0] in UNPICKLE]
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            said = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
            if name in NEVER or (name in SAFE and said.get(SAFE[name][0]) is not SAFE[name][1]):
                found.append(ast.unparse(node))
    return [str(one) for one in found]


@pytest.mark.parametrize(
    ("source", "bad"),
    [
        ("import pickle", True),
        ("from pickle import loads", True),
        ("torch.load(path)", True),
        ("torch.load(path, weights_only=False)", True),
        ("torch.load(path, weights_only=True)", False),
        ("np.load(path)", True),
        ("np.load(path, allow_pickle=False)", False),
        ("yaml.safe_load(text)", False),
        ("yaml.load(text)", True),
        ("model.eval()", False),
        ("eval(text)", True),
    ],
)
def test_the_search_finds_what_it_looks_for(source: str, bad: bool) -> None:
    assert bool(offences(source)) is bad


def test_no_source_unpickles() -> None:
    files = [*ROOT.glob("fastcov/**/*.py"), *ROOT.glob("python/**/*.py")]
    assert len(files) > 50
    found = {str(f): bad for f in files if (bad := offences(f.read_text(encoding="utf-8")))}
    assert not found
