"""The readers that are fuzzed: how a valid file is made, and what a program gets from it.

A new reader is one more entry of `readers`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fastcov
from benchmarks import fuzz_samples as samples
from fastcov.bench import schema as bench
from fastmemit.data import load_corpus, load_records, load_requests, load_zsre
from fastmemit.delta import Delta
from fastmemit.evaluation.perplexity import read_text
from fastmemit.experiments.report import page
from fastmemit.experiments.results import check_header, collect, read_lines, read_unedited
from fastmemit.experiments.tables import (
    cells_csv,
    cells_table,
    comparison_tables,
    difference_tables,
    group_cells,
    latex,
    markdown,
)
from fastmemit.targets import Target, TargetKey, TargetStore
from tiny_sweeps import made, record, write
from tiny_tokenizers import SENTENCES, tiny_tokenizer


class Absent(Exception):
    """The reader said that there is nothing to use, and went on."""


@dataclass(frozen=True)
class Reader:
    """One reader of files.

    Attributes:
        name: Of the reader.
        family: What the file is: "safetensors", "json", "lines" (of JSON), or another word for what only `damage`
            knows.
        make: Writes a valid file into an empty folder; its path.
        read: Reads a file; something that `described` can tell from others.
        strict: The file has a checksum, so that what is accepted must be what was written.
        seal: Of a damaged safetensors file, one whose checksums fit it: a forgery, which may be accepted and must do no
            harm.
        damage: What else can be done to such a file; what it makes counts as a forgery.
    """

    name: str
    family: str
    make: Callable[[Path], Path]
    read: Callable[[Path], Any]
    strict: bool = False
    seal: Callable[[dict[str, Any], bytes], None] | None = None
    damage: Callable[[random.Random, bytes], tuple[str, bytes]] | None = None


def described(value: Any) -> Any:
    """Something with an equality, in which every number of a tensor counts."""
    if isinstance(value, torch.Tensor):
        raw = value.detach().contiguous().numpy().tobytes()
        return (str(value.dtype), tuple(value.shape), hashlib.sha256(raw).hexdigest())
    if isinstance(value, fastcov.SecondMoment):
        return (described(value.lower), value.count, described(value.quartic))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return (type(value).__name__, described({f.name: getattr(value, f.name) for f in dataclasses.fields(value)}))
    if isinstance(value, Mapping):
        return {repr(key): described(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [described(inner) for inner in value]
    return repr(value)  # so that NaN equals itself, and 1 is neither 1.0 nor True


def readers() -> dict[str, Reader]:
    """All readers by their names."""
    # Their entries are of this file's type.
    from benchmarks.fuzz_consumers import consumer_readers
    from benchmarks.fuzz_foreign import foreign_readers
    from benchmarks.fuzz_resumed import resumed_readers

    found = [
        Reader("moment", "safetensors", _moment, fastcov.load_moment, True, seal_moment),
        Reader("provenance", "safetensors", _moment, fastcov.read_provenance, True, seal_moment),
        Reader("delta", "safetensors", _delta, Delta.load, True, seal_delta),
        Reader("target", "safetensors", _target, _read_target, True),
        Reader("counterfact", "json", _written("a.json", samples.counterfact()), load_records),
        Reader("counterfact-flat", "lines", _lined("a.jsonl", samples.flat()), load_records),
        Reader("counterfact-skipping", "json", _written("a.json", samples.counterfact()), _skipping),
        Reader("zsre", "json", _written("a.json", samples.zsre()), load_zsre),
        Reader("requests", "lines", _lined("a.jsonl", samples.requests()), load_requests),
        Reader("corpus-text", "text", _text, _read_corpus),
        Reader("corpus-lines", "lines", _lined("c.jsonl", samples.documents()), _read_corpus),
        Reader("corpus-list", "json", _written("c.json", samples.documents()), _read_corpus),
        Reader("perplexity", "text", _text, _read_perplexity),
        Reader("results", "lines", _folder("results.jsonl"), read_lines),
        Reader("report-cells", "lines", _folder("results.jsonl"), _read_report),
        Reader("report-timings", "lines", _folder("timings.jsonl"), _read_report),
        Reader("report-sweep", "json", _folder("sweep.json"), _read_report),
        Reader("sweep-header", "json", _folder("sweep.json"), _read_header),
        Reader("unedited", "json", _written("unedited.json", samples.UNEDITED), _read_unedited),
        Reader("bench-run", "json", _run, bench.load),
    ]
    found += [*foreign_readers(), *resumed_readers(), *consumer_readers()]
    return {reader.name: reader for reader in found}


# -- safetensors ----------------------------------------------------------------------------------


def _moment(folder: Path) -> Path:
    keys = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    about = {"model": "tiny", "module": "layers.4.down_proj", "seed": 3, "corpus": {"name": "w"}}
    fastcov.save_moment(folder / "m.safetensors", fastcov.SecondMoment(5).update(keys), about)
    return folder / "m.safetensors"


def seal_moment(header: dict[str, Any], body: bytes) -> None:
    """The checksums of a moment."""
    about = header.get("__metadata__")
    if isinstance(about, dict):
        about["sha256"] = hashlib.sha256(body).hexdigest()
        about.pop("check", None)
        text = json.dumps(about, sort_keys=True)
        about["check"] = hashlib.sha256(text.encode()).hexdigest()


def _delta(folder: Path) -> Path:
    draw = torch.Generator().manual_seed(0)
    factors = {
        f"layers.{i}.weight": (torch.randn(3, 2, generator=draw), torch.randn(4, 2, generator=draw)) for i in range(2)
    }
    Delta(factors, {"model": "f" * 64, "method": "memit"}).save(folder / "e.safetensors")
    return folder / "e.safetensors"


def seal_delta(header: dict[str, Any], body: bytes) -> None:
    """The seal over names, shapes and bytes, as far as the header makes sense."""
    about = header.get("__metadata__")
    if not isinstance(about, dict):
        return
    digest = hashlib.sha256()
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    try:
        for weight in sorted({name.rpartition(":")[0] for name in entries}):
            for side in ("left", "right"):
                entry = entries[f"{weight}:{side}"]
                start, stop = entry["data_offsets"]
                digest.update(f"{weight}{tuple(entry['shape'])}".encode() + body[start:stop])
        text = f"{digest.hexdigest()}{about.get('provenance')}"
    except (KeyError, TypeError, ValueError):
        return
    about["sha256"] = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


_KEY = TargetKey('{"model": "m", "recipe": 3, "settings": {"layer": 1}}')


def _target(folder: Path) -> Path:
    draw = torch.Generator().manual_seed(0)
    vectors = torch.randn(2, 8, generator=draw)
    TargetStore(folder).put(_KEY, Target(vectors[0], vectors[1], (3.0, 2.5, 2.25)))
    return folder / _KEY.digest[:2] / f"{_KEY.digest}.safetensors"


def _read_target(path: Path) -> Target:
    found = TargetStore(path.parents[1]).get(_KEY)
    if found is None:
        raise Absent
    return found


# -- text and JSON --------------------------------------------------------------------------------


def _lined(name: str, values: list[Any]) -> Callable[[Path], Path]:
    return _saved(name, "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values))


def _written(name: str, value: Any) -> Callable[[Path], Path]:
    return _saved(name, json.dumps(value, ensure_ascii=False, indent=1))


def _saved(name: str, text: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_text(text, encoding="utf-8")
        return folder / name

    return make


def _text(folder: Path) -> Path:
    text = "\n\n".join((*SENTENCES, "Ein Caf\u00e9.\nZwei \U0001f469\u200d\U0001f52c \u05d0\u05d1."))
    return _saved("c.txt", text + "\n")(folder)


def _skipping(path: Path) -> Any:
    return load_records(path, skip_malformed=True)


def _read_corpus(path: Path) -> Any:
    corpus = load_corpus(path)
    documents = list(corpus.documents(0))
    if len(documents) != len(corpus) or not all(text.strip() for text in documents):
        raise AssertionError(f"{len(corpus)} documents were promised and {documents!r} read")
    return corpus.fingerprint, documents


def _read_perplexity(path: Path) -> Any:
    return read_text(path, tiny_tokenizer())


# -- folders of sweeps, and runs of the bench -----------------------------------------------------


def _folder(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        sizes = ((1, 2), (2, 1))
        cells = [
            made("memit", d, size, [record(0, 1.0), record(1, 0.0, 0.5, None)], worse=1.5)
            for size in sizes
            for d in (2.0, 10.0, None)
        ]
        return write(folder, cells, methods=samples.HEADER["methods"]) / name

    return make


def _read_report(path: Path) -> Any:
    found = collect([path.parent])
    groups = group_cells(found.cells, resamples=20)
    tables = [*comparison_tables(groups), *difference_tables(groups)]
    html = page(found, [], {"comparisons": tables, "differences": [], "paper": [], "all": [cells_table(groups)]})
    return html, markdown(tables), latex(tables), cells_csv(groups)


def _read_header(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(path)  # a header would be written, and none was read
    check_header(path, samples.HEADER)
    return json.loads(path.read_text(encoding="utf-8"))


def _read_unedited(path: Path) -> Any:
    found = read_unedited(path, "f" * 64, [3, 5])
    if found is None:
        raise Absent
    return found


def _run(folder: Path) -> Path:
    machine = bench.Machine(cpu="a CPU", cores=2, isa=("avx2",), system="Linux x86_64")
    row = bench.Row(
        suite="rank_k", case="C", contender="fastcov", kind="ours", device="cpu",
        dtype="float32", n=8, d=4, status="ok", kernel="avx2", p20=0.1, p50=0.2, p80=0.3,
    )  # fmt: skip
    run = bench.Run(
        machine=machine, versions={"torch": "2.13.0"}, threads=2, command="bench", date="2026",
        rows=[row], steps=[bench.Step("build", "ok", 1.5, "done")],
    )  # fmt: skip
    bench.save(run, folder / "run.json")
    return folder / "run.json"
