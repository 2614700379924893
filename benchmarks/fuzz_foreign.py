"""Files of other codebases: moments as ``.npz``, hyper-parameters, and adapters of PEFT."""

from __future__ import annotations

import functools
import io
import json
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.fuzz_mutations import Payload, odd_values
from benchmarks.fuzz_readers import Absent, Reader
from fastcov import SecondMoment
from fastcov.npz import load_npz, save_npz
from fastmemit.compat import load_hparams
from fastmemit.delta import Delta
from fastmemit.models import fingerprint
from fastmemit.sharing import load_adapter, save_adapter
from fastmemit.sharing.adapter import CONFIG, WEIGHTS
from tiny_models import D_K, D, tiny_model

_SUM = "mom2.mom2.npy"
_SHAPES = (
    "(1000000000000,)", "(1000000, 1000000)", "(4294967296, 4294967296)", "(0, 0)", "(5, -5)",
    "(-1,)", "()", "(25,)", "(1, 5, 5)", "(5, 6)", "(5.0, 5)", "(True, 5)", "[5, 5]", "None",
    "(5,) * 99", "(" * 500 + ")" * 500, "(9" + "9" * 5000 + ",)",
)  # fmt: skip
_DTYPES = ("|O", "<f2", "<f16", "<i4", "<c8", ">f4", "|S8", "<U5", "|V4", "<M8[s]", "", "f4,O", "<f9")
_BOMB = 1 << 27  # bytes of zeros


def foreign_readers() -> list[Reader]:
    """The readers of files that other codebases write."""
    return [
        Reader("npz", "npz", _npz, lambda path: load_npz(path).moment, True, damage=_damaged_npz),
        Reader("hparams-json", "json", _hparams_json, load_hparams),
        Reader("hparams-yaml", "yaml", _hparams_yaml, load_hparams, damage=_damaged_yaml),
        # Of ours a digest is on record; of others only that they can be read.
        Reader("adapter-config", "json", _adapter(CONFIG), _read_ours, True),
        Reader("adapter-weights", "safetensors", _adapter(WEIGHTS), _read_ours, True),
        Reader("lora-config", "json", _adapter(CONFIG, ours=False), _read_lora),
        Reader("lora-weights", "safetensors", _adapter(WEIGHTS, ours=False), _read_lora),
    ]


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
        text = _text(array).replace("(5, 5)", draw.choice(("(5, 5)", "(5792, 5792)")))
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


def _text(array: bytes) -> str:
    return array[10 : 10 + int.from_bytes(array[8:10], "little")].decode("latin-1")


def _with_header(array: bytes, *, shape: str | None = None, dtype: str | None = None) -> bytes:
    """An array with another header, and its numbers as they were."""
    known = np.lib.format.read_array_header_1_0(io.BytesIO(array[8:]))
    shape = str(known[0]) if shape is None else shape
    dtype = known[2].str if dtype is None else dtype
    text = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}"
    return npy_of(text, array[10 + len(_text(array)) :])


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
