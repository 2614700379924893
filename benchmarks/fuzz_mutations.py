"""Ways to damage a file: bytes, JSON, the header of safetensors, and what else may have its name.

A mutant is drawn from a `random.Random` alone, so that its seed and number make it again.
"""

from __future__ import annotations

import json
import math
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: What may stand under a name in place of a file.
PLACES = ("folder", "fifo", "loop", "dangling", "missing", "device")

# Written into JSON as text, for values that json.dumps has no way to write.
_HOLE = "HOLE-5f0c1d"
_ODD = (
    "null", "true", "false", "0", "-1", "1.5", "NaN", "Infinity", "-Infinity", "1e999", "-1e999",
    "9" * 25, "1" + "0" * 400, "9" * 5000, '""', '" "', '"\\ud800"', '"\\udc00x"', '"\\u0000"',
    '"a\\nb"', '"\\ufeff"', '"{}"', '"{} {}"', '"' + "x" * 20_000 + '"', "[]", "{}", "[[]]",
    '[{"str": "x"}]', '{"str": "x"}', '{"str": null}', '{"": ""}', '"caf\u00e9"', '"\u202eabc"',
    '"\U0001f469\u200d\U0001f52c"',
)  # fmt: skip
_DEPTHS = (20, 95, 102, 200, 480, 1000, 3000, 100_000)
_HUGE = (10**12, 2**31, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30)
_NUMBERS = (math.nan, math.inf, -math.inf, 3e38, -3e38, 1e30, 1e6, 300.0, 1e-45, 0.0, -0.0)
_DTYPES = (
    "BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F4", "F6_E2M3", "F6_E3M2", "I16", "U16",
    "F16", "BF16", "I32", "U32", "F32", "F64", "I64", "U64", "C64", "", "f32", "F128",
)  # fmt: skip


def damaged_bytes(draw: random.Random, data: bytes, others: list[bytes]) -> tuple[str, bytes]:
    """Damage that knows nothing of the format; `others` are valid files of other readers."""
    place = draw.randrange(len(data) + 1)
    size = draw.choice((1, 1, 2, 8, 64, 512))
    kinds: dict[str, Callable[[], bytes]] = {
        "bit flip": lambda: _flipped(draw, data),
        "truncated": lambda: data[:place],
        "inserted": lambda: data[:place] + draw.randbytes(size) + data[place:],
        "deleted": lambda: data[:place] + data[place + size :],
        "duplicated": lambda: data[:place] + data[place : place + size] * 2 + data[place + size :],
        "zeroed": lambda: data[:place] + b"\0" * len(data[place:][:size]) + data[place + size :],
        "appended": lambda: data + draw.randbytes(size),
        "doubled": lambda: data + data,
        "empty": lambda: b"",
        "swapped": lambda: draw.choice(others),
        "noise": lambda: draw.randbytes(draw.randrange(1, 2000)),
        "not UTF-8": lambda: data[:place] + b"\xff\xfe\xc3" + data[place:],
        "half a surrogate": lambda: data[:place] + b"\xed\xa0\x80" + data[place:],
        "NUL": lambda: data[:place] + b"\0" + data[place:],
        "BOM": lambda: b"\xef\xbb\xbf" * draw.choice((1, 2)) + data,
        "BOM within": lambda: data[:place] + b"\xef\xbb\xbf" + data[place:],
        "CRLF": lambda: data.replace(b"\n", b"\r\n"),
        "CR": lambda: data.replace(b"\n", b"\r"),
        "UTF-16": lambda: data.decode("latin-1").encode("utf-16"),
        "pickle": lambda: _pickled(draw),
        "white space": lambda: b" \n\t\r\n" * draw.randrange(1, 50),
    }
    kind = draw.choice(list(kinds))
    return kind, kinds[kind]()


def damaged_json(draw: random.Random, data: bytes, *, lines: bool) -> tuple[str, bytes]:
    """A JSON text, or one line of a file of them, with one value changed in the tree."""
    texts = data.decode().splitlines() if lines else [data.decode()]
    index = draw.randrange(len(texts))
    kind, texts[index] = _changed(draw, texts[index])
    text = "\n".join(texts) + ("\n" if lines else "")
    return kind, text.encode("utf-8")


def damaged_header(draw: random.Random, data: bytes) -> tuple[str, bytes]:
    """A safetensors file with another length, header or metadata; checksums stay as they were."""
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    name = draw.choice([key for key in header if key != "__metadata__"])
    entry = header[name]
    huge = draw.choice(_HUGE)
    kind = draw.choice(
        ("length", "shape", "shape", "offsets", "dtype", "entry", "metadata", "metadata",
         "metadata", "record", "record", "record", "values", "tree", "twice", "extra", "renamed",
         "exchanged", "bare")
    )  # fmt: skip
    if kind == "length":
        length = draw.choice((0, 1, 7, size - 8, size + 8, 10**8, 10**8 + 1, 2**63, 2**64 - 1))
        return kind, length.to_bytes(8, "little") + data[8:]
    if kind == "shape":
        shape = entry["shape"]
        numbers = 1
        for extent in shape:
            numbers *= extent
        entry["shape"] = draw.choice(
            ([huge], [huge, huge], [0], [0, huge], [], [numbers, 1], [1, numbers], [-1], [1.5],
             [1] * 70 + shape, [numbers + 1], shape[::-1], ["3"], None, [[3]], [huge, 0, huge])
        )  # fmt: skip
        if draw.random() < 0.3:
            entry["data_offsets"] = draw.choice(([0, 0], [0, huge % 2**64], [0, len(body)]))
    elif kind == "offsets":
        start, stop = entry["data_offsets"]
        entry["data_offsets"] = draw.choice(
            ([stop, start], [start, huge], [huge, huge], [start + 4, stop + 4], [start, stop - 4],
             [0, len(body)], [0, 0], [-4, stop], [start], [start, stop, stop], [], None, "0")
        )  # fmt: skip
    elif kind == "dtype":
        entry["dtype"] = draw.choice(_DTYPES)
    elif kind == "entry":
        header[name] = draw.choice((None, [], {}, "x", 1, {**entry, "more": 1}))
    elif kind == "metadata":
        about = header.get("__metadata__", {})
        field = draw.choice([*about, "more"])
        if draw.random() < 0.3:
            about.pop(field, None)
        else:
            values = ("", "0", "-1", "x", "2", "\u00b2", str(huge), "9" * 5000, "nan", "F64", "{}")
            about[field] = draw.choice((*values, "[" * 10_000, "null", 7, None, {}))
    elif kind == "record":
        # What a file says of itself is JSON in one field of its metadata.
        about = header.get("__metadata__", {})
        texts = [field for field, text in about.items() if str(text).startswith("{")]
        if texts:
            field = draw.choice(texts)
            kind, about[field] = _changed(draw, about[field])
            kind = f"record, {kind}"
    elif kind == "values" and len(body) >= 4:
        start = 4 * draw.randrange(len(body) // 4)
        odd = struct.pack("<f", draw.choice(_NUMBERS))
        body = body[:start] + odd + body[start + 4 :]
    elif kind == "extra":
        header["more"] = {"dtype": "F32", "shape": [0], "data_offsets": [len(body)] * 2}
    elif kind == "renamed":
        header[draw.choice(("", ":", "sum", "x:left", "\u202e", "a" * 5000))] = header.pop(name)
    elif kind == "exchanged":
        other = draw.choice([key for key in header if key != "__metadata__"])
        header[name], header[other] = header[other], header[name]
    elif kind == "bare":
        header.pop("__metadata__", None)
    text = json.dumps(header)
    if kind == "twice":
        more = json.dumps({draw.choice(list(header)): draw.choice(list(header.values()))})
        text = draw.choice((more[:-1] + "," + text[1:], text[:-1] + "," + more[1:]))
    if kind == "tree":
        kind, text = _changed(draw, text)
    return f"header: {kind}", with_header(text, body)


def with_header(text: str, body: bytes) -> bytes:
    """A safetensors file of a header's text and what follows it."""
    raw = text.encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw + body


def put(place: str, path: Path) -> None:
    """Let something that is no file stand under a name."""
    if place == "folder":
        path.mkdir()
    elif place == "fifo":
        os.mkfifo(path)
    elif place == "loop":
        path.symlink_to(path.name)
    elif place == "dangling":
        path.symlink_to("nowhere")
    elif place == "device":
        path.symlink_to("/dev/zero")


def odd_values() -> list[str]:
    """The texts that stand for one JSON value in `damaged_json`, nesting aside."""
    return list(_ODD)


def _flipped(draw: random.Random, data: bytes) -> bytes:
    flipped = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 8))):
        flipped[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(flipped)


class Payload:
    """Unpickled, it calls a function: `sys.exit`, which no reader could hide."""

    def __reduce__(self) -> tuple[Any, ...]:
        """What a pickle of it runs."""
        import sys

        return sys.exit, ("a pickle was run",)


def _pickled(draw: random.Random) -> bytes:
    import io
    import pickle

    import torch

    if draw.random() < 0.5:
        return pickle.dumps(Payload())
    file = io.BytesIO()
    torch.save(Payload(), file)
    return file.getvalue()


def _changed(draw: random.Random, text: str) -> tuple[str, str]:
    """A JSON text with one value replaced, removed, renamed, or there twice."""
    whole = [json.loads(text)]
    places = list(_places(whole))
    parent, key = draw.choice(places)
    odd, kind = draw.choice(_ODD), draw.choice(("value", "value", "missing", "twice", "deep"))
    if kind == "deep":
        depth = draw.choice((*_DEPTHS, draw.randrange(900, 1000)))
        opening, closing = draw.choice((("[", "]"), ('{"a":', "}")))
        odd = opening * depth + "0" + closing * depth
        kind = f"nested {depth}"
    if kind == "missing" and parent is not whole:
        del parent[key]
    elif kind == "twice" and isinstance(parent, dict):
        # A second value of the same name, before or behind the first one.
        first = {key: parent[key]}
        parent[key] = _HOLE
        changed = json.dumps(whole[0])
        pair = f"{json.dumps(key)}: {odd}, {json.dumps(first)[1:-1]}"
        return kind, changed.replace(f'{json.dumps(key)}: "{_HOLE}"', pair, 1)
    else:
        parent[key] = _HOLE
    return kind, json.dumps(whole[0]).replace(f'"{_HOLE}"', odd, 1)


def _places(value: Any) -> Any:
    """Every place in a tree of JSON: what holds it, and its key or index there."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(items):
        yield value, key
        if isinstance(inner, dict | list):
            yield from _places(inner)
