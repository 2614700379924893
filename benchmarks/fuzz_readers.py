"""The readers that are fuzzed: how a valid file is made, and what a program gets from it.

A new reader is one more entry of `readers`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import lzma
import random
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastcov
from benchmarks import fuzz_samples as samples
from benchmarks.fuzz_mutations import Payload, damaged_header, odd_values
from benchmarks.recorded import load
from fastcov import SecondMoment
from fastcov.bench.report import Row, Run, save
from fastcov.machine import Machine
from fastcov.npz import load_npz, save_npz
from fastcov.store import Taken, read_checkpoint, write_checkpoint
from fastmemit.compat import load_hparams
from fastmemit.data import load_corpus, load_records, load_requests, load_zsre
from fastmemit.delta import Delta
from fastmemit.evaluation.perplexity import read_text
from fastmemit.experiments.frame import measure, measure_steps
from fastmemit.experiments.report import page
from fastmemit.experiments.results import STEPS, check_header, collect, read_lines, read_unedited
from fastmemit.experiments.sequential import read_sequences
from fastmemit.experiments.tables import (
    cells_csv,
    cells_table,
    comparison_tables,
    difference_tables,
    latex,
    markdown,
    step_tables,
)
from fastmemit.models import fingerprint
from fastmemit.sharing import load_adapter, save_adapter
from fastmemit.sharing.adapter import CONFIG, WEIGHTS
from fastmemit.targets import Target, TargetKey, TargetStore
from tiny_models import D_K, D, tiny_model
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
    from benchmarks.fuzz_consumers import consumer_readers  # their entries are of this file's type

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
        Reader("results-packed", "xz", _packed, read_lines),
        Reader("bench-run", "json", _run, load),
        Reader("npz", "npz", _npz, lambda path: load_npz(path).moment, True, damage=_damaged_npz),
        Reader("hparams-json", "json", _hparams_json, load_hparams),
        Reader("hparams-yaml", "yaml", _hparams_yaml, load_hparams, damage=_damaged_yaml),
        # Of ours a digest is on record; of others only that they can be read.
        Reader("adapter-config", "json", _adapter(CONFIG), _read_ours, True),
        Reader("adapter-weights", "safetensors", _adapter(WEIGHTS), _read_ours, True),
        Reader("lora-config", "json", _adapter(CONFIG, ours=False), _read_lora),
        Reader("lora-weights", "safetensors", _adapter(WEIGHTS, ours=False), _read_lora),
        Reader("checkpoint", "checkpoint", _checkpoint, read_checkpoint, True, damage=_damaged_inside),
        Reader("sequential-header", "json", _sequence_header, _read_sequence_header),
        Reader("sequential-steps", "lines", _steps, _read_steps),
        *consumer_readers(),
    ]
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


def _packed(folder: Path) -> Path:
    path = folder / "results.jsonl.xz"
    path.write_bytes(lzma.compress(_folder("results.jsonl")(folder).read_bytes()))
    return path


def _read_report(path: Path) -> Any:
    found = collect([path.parent])
    groups = measure(found.cells, resamples=20)
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
    machine = Machine(cpu="a CPU", cores=2, isa=("avx2",), system="Linux x86_64")
    row = Row(
        suite="rank_k", case="C", contender="fastcov", kind="ours", device="cpu",
        dtype="float32", n=8, d=4, status="ok", kernel="avx2", p20=0.1, p50=0.2, p80=0.3,
    )  # fmt: skip
    save(Run(machine, {"torch": "2.13.0"}, 2, "bench", "2026", rows=[row]), folder / "run.json")
    return folder / "run.json"


# -- other codebases: moments as ``.npz``, hyper-parameters, and adapters of PEFT ------------------

_SUM = "mom2.mom2.npy"
_SHAPES = (
    "(1000000000000,)", "(1000000, 1000000)", "(4294967296, 4294967296)", "(0, 0)", "(5, -5)",
    "(-1,)", "()", "(25,)", "(1, 5, 5)", "(5, 6)", "(5.0, 5)", "(True, 5)", "[5, 5]", "None",
    "(5,) * 99", "(" * 500 + ")" * 500, "(9" + "9" * 5000 + ",)",
)  # fmt: skip
_DTYPES = ("|O", "<f2", "<f16", "<i4", "<c8", ">f4", "|S8", "<U5", "|V4", "<M8[s]", "", "f4,O", "<f9")
_BOMB = 1 << 27  # bytes of zeros


def _npz(folder: Path) -> Path:
    keys = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    save_npz(folder / "a.npz", SecondMoment(5).update(keys), sample_size=100)
    return folder / "a.npz"


def _damaged_npz(draw: random.Random, data: bytes) -> tuple[str, bytes]:
    """Another header of an array, other members, or other ways to pack them."""
    members = _members(data)
    place = draw.randrange(len(members))
    name, array = members[place]
    kind = draw.choice(
        ("shape", "dtype", "header", "object", "missing", "twice", "renamed", "bomb", "values",
         "packed", "length", "many", "version")
    )  # fmt: skip
    packing = zipfile.ZIP_STORED
    if kind == "shape":
        members[place] = (name, _with_header(array, shape=draw.choice(_SHAPES)))
    elif kind == "dtype":
        members[place] = (name, _with_header(array, dtype=draw.choice(_DTYPES)))
    elif kind == "header":
        text = draw.choice(("", "{", "{}", "[" * 3000, "__import__('os')", "\0" * 90, "9" * 9000))
        members[place] = (name, npy_of(text, array[-100:]))
    elif kind == "object":
        file = io.BytesIO()
        np.save(file, np.array([Payload()], dtype=object), allow_pickle=True)
        members[place] = (name, file.getvalue())
    elif kind == "missing":
        del members[place]
    elif kind == "twice":
        members.append(draw.choice(members))
    elif kind == "renamed":
        members[place] = (draw.choice(("../../x.npy", "/x", "", "a" * 60_000, "\u202e.npy")), array)
    elif kind == "bomb":
        text = _header_text(array).replace("(5, 5)", draw.choice(("(5, 5)", "(5792, 5792)")))
        members[place] = (name, npy_of(text, bytes(_BOMB)))
        packing = draw.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    elif kind == "values":
        odd = draw.choice((np.nan, np.inf, -1.0, 1e38, 0.0, 0.5))
        start = len(array) - 4 * draw.randrange(1, 3)
        members[place] = (name, array[:start] + np.float32(odd).tobytes() + array[start + 4 :])
    elif kind == "packed":
        packing = draw.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    elif kind == "length":
        members[place] = (name, array + b"\0" * draw.choice((1, 4, 100_000)))
    elif kind == "many":
        members += [(f"{i}.npy", b"") for i in range(2000)]
    elif kind == "version":
        members[place] = (name, array[:6] + draw.randbytes(2) + array[8:])
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", packing) as archive:
        for member, content in members:
            archive.writestr(zipfile.ZipInfo(member or "_"), content, packing)
    return f"npz: {kind}", file.getvalue()


def _members(data: bytes) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


def npz_of(folder: Path) -> dict[str, bytes]:
    """The members of a valid file, which is written into a folder."""
    return dict(_members(_npz(folder).read_bytes()))


def _header_text(array: bytes) -> str:
    return array[10 : 10 + int.from_bytes(array[8:10], "little")].decode("latin-1")


def _with_header(array: bytes, *, shape: str | None = None, dtype: str | None = None) -> bytes:
    """An array with another header, and its numbers as they were."""
    known = np.lib.format.read_array_header_1_0(io.BytesIO(array[8:]))
    shape = str(known[0]) if shape is None else shape
    dtype = known[2].str if dtype is None else dtype
    text = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}"
    return npy_of(text, array[10 + len(_header_text(array)) :])


def npy_of(text: str, body: bytes) -> bytes:
    """An array of a header's text and what follows it."""
    text += " " * (-(len(text) + 11) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode("latin-1") + body


_HPARAMS: dict[str, Any] = {
    "layers": [13, 14, 15],
    "clamp_norm_factor": 0.75,
    "layer_selection": "all",
    "fact_token": "subject_last",
    "v_num_grad_steps": 20,
    "v_lr": 5e-1,
    "v_loss_layer": 47,
    "v_weight_decay": 0.5,
    "kl_factor": 0.0625,
    "mom2_adjustment": True,
    "mom2_update_weight": 20000,
    "rewrite_module_tmp": "transformer.h.{}.mlp.c_proj",
    "mom2_dataset": "wikipedia",
    "mom2_n_samples": 100000,
}


def _hparams_json(folder: Path) -> Path:
    path = folder / "gpt2-xl.json"
    path.write_text(json.dumps(_HPARAMS, indent=1), encoding="utf-8")
    return path


def _hparams_yaml(folder: Path) -> Path:
    path = folder / "gpt2-xl.yaml"
    lines = [f"{name}: {json.dumps(value)}" for name, value in _HPARAMS.items()]
    path.write_text("alg_name: MEMIT\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return path


def _damaged_yaml(draw: random.Random, data: bytes) -> tuple[str, bytes]:
    """Another value on one line, YAML's own ways to be clever included."""
    lines = data.decode().splitlines()
    place = draw.randrange(len(lines))
    name = lines[place].partition(":")[0]
    levels = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9 if i else ['lol'])}]" for i in range(9))
    clever = (
        "!!python/object/apply:os.system ['exit 7']", "!!python/name:os.system", "!!binary aGk=",
        "!!set {a, b}", "!!timestamp 2001-01-01", "2001-13-45", "0x1F", "0o17", "1:30:00",
        "*nowhere", "&x [*x]", "? [a, b]\n: c", "<<: {a: 1}", "|\n  text", "{" * 400, "[" * 5000,
        "%TAG ! x", "\t", "---", "...", ".nan", ".inf", "5e-1", "yes", "~", "!", "&", "'", '"\\x',
        "1_000", "- - - -",
    )  # fmt: skip
    kind = draw.choice(("value", "clever", "missing", "twice", "bomb", "key", "document"))
    if kind == "value":
        lines[place] = f"{name}: {draw.choice(odd_values())}"
    elif kind == "clever":
        lines[place] = f"{name}: {draw.choice(clever)}"
    elif kind == "missing":
        del lines[place]
    elif kind == "twice":
        lines.append(f"{name}: {draw.choice(odd_values())}")
    elif kind == "bomb":
        lines.append(levels)
    elif kind == "key":
        lines[place] = f"{draw.choice(('1', '~', '[a]', '{a: b}', '? ', '2001-01-01'))}: 1"
    elif kind == "document":
        lines.insert(place, draw.choice(("---", "...", "--- 5", "%YAML 9.9")))
    return f"yaml: {kind}", ("\n".join(lines) + "\n").encode("utf-8")


_MODULE = "model.layers.1.mlp.down_proj"


@functools.cache
def _model() -> Any:
    return tiny_model("llama")


def _adapter(name: str, *, ours: bool = True) -> Callable[[Path], Path]:
    """An adapter's folder, of which one file is damaged; without what is on record of ours."""

    def make(folder: Path) -> Path:
        from safetensors.torch import load, save

        draw = torch.Generator().manual_seed(0)
        pair = torch.randn(D, 2, generator=draw), torch.randn(D_K, 2, generator=draw)
        about = {"model": fingerprint(_model()), "method": "memit", "requests": []}
        home = save_adapter(Delta({f"{_MODULE}.weight": pair}, about), _model(), folder / "adapter")
        if not ours:
            tensors = load((home / WEIGHTS).read_bytes())
            (home / WEIGHTS).write_bytes(save(tensors, {"format": "pt"}))
        return home / name

    return make


def _read_ours(path: Path) -> Any:
    """The change alone. Without the record of it, which may be cut out, it is somebody else's: whatever its numbers."""
    delta = load_adapter(path.parent, _model())
    if delta.provenance.get("method") == "lora" and path.name == WEIGHTS:
        raise Absent
    return delta.factors


def _read_lora(path: Path) -> Delta:
    return load_adapter(path.parent, _model())


# -- interrupted work: checkpoints, and the folder of sequences ------------------------------------

_BATCHES = 2
_DIGEST = 32  # bytes, the last ones of a checkpoint


def _checkpoint(folder: Path) -> Path:
    draw = torch.Generator().manual_seed(0)
    keys = torch.randn(20, 5, generator=draw)
    taken = {
        "down.0": Taken(SecondMoment(5).update(keys), 30, 20, None, -1, torch.device("cpu")),
        "down.1": Taken(SecondMoment(5).update(keys[:15]), 30, 20, keys[15:], 3, torch.device("cpu")),
    }
    state = {
        "identity": {"model": "f" * 64, "seed": 3},
        "sums": {"dtype": "torch.float32", "launch_rows": 8192},
        "machine": {"threads": 1, "kernels": ["avx2"]},
        "batches": 4,
        "stream": "ab" * 32,
    }
    path = folder / "sums.checkpoint"
    with path.open("wb") as file:
        write_checkpoint(file, state, taken)
    return path


def _damaged_inside(draw: random.Random, data: bytes) -> tuple[str, bytes]:
    """Another header or state, under a digest that fits."""
    kind, made = damaged_header(draw, data)
    kept = made[:-_DIGEST]
    return f"{kind}, sealed", kept + hashlib.sha256(kept).digest()


_SEQUENCE = {**samples.HEADER, "batches": [[1, 2], [3]], "score_every": 1}


def _sequence_header(folder: Path) -> Path:
    path = folder / "sequential.json"
    check_header(path, _SEQUENCE)
    return path


def _read_sequence_header(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(path)  # a header would be written, and none was read
    check_header(path, _SEQUENCE)
    return json.loads(path.read_text(encoding="utf-8"))


def _steps(folder: Path) -> Path:
    path = folder / STEPS
    scores = {"es": 90.0, "ps": 80.0, "ns": None, "s": 79.5}
    lines = [
        {
            "key": f"memit/b2x2/{name}/plain/{edits}",
            "method": "memit",
            "batch_size": 2,
            "multiplier": multiplier,
            "preserve": False,
            "keys": 128,
            "edits": edits,
            "facts": 2 * edits,
            "failed": 0,
            "scores": scores,
            "before": scores,
            "by_batch": [scores] * edits,
            "perplexity": 36.5,
        }
        for name, multiplier in (("x2", 2.0), ("full", None))
        for edits in range(1, _BATCHES + 1)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (folder / "sequential.json").write_text(json.dumps(_SEQUENCE), encoding="utf-8")
    return path


def _read_steps(path: Path) -> Any:
    found = read_sequences(path, _BATCHES)
    if not found:
        raise Absent
    steps = measure_steps(collect([path.parent]).cells, resamples=20)
    return found, markdown([*step_tables(steps), *difference_tables(steps)]), cells_csv(steps)
