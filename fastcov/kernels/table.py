"""Which kernel is the fastest on a GPU: what was measured, and nothing else.

``measured.json`` beside this file holds, for each device that was measured, the seconds of each kernel by dtype and
width. ``python -m fastcov.kernels.table FILE`` takes over the results that ``make gpu-check`` wrote. Where a device is
not in it, the order in `fastcov.ops` holds.
"""

from __future__ import annotations

import functools
import json
import math
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from fastcov.errors import printable
from fastcov.files import atomic_file, parse_json

_NAME = "measured.json"


def order(device: torch.device, dtype: torch.dtype, d: int) -> list[str]:
    """Kernels in the order of their measured times on a CUDA device, the fastest first; empty if none was measured.

    Of the widths that were measured for this dtype of keys the nearest one to d, by ratio, decides.
    """
    return list(_order(torch.cuda.get_device_name(device), str(dtype).removeprefix("torch."), d))


@functools.cache
def _order(name: str, dtype: str, d: int) -> tuple[str, ...]:
    rows = [row for row in _table().get(name, []) if row["dtype"] == dtype]
    if not rows:
        return ()
    nearest = min(rows, key=lambda row: abs(math.log(row["d"] / d)))
    seconds: dict[str, float] = nearest["seconds"]
    return tuple(sorted(seconds, key=lambda kernel: seconds[kernel]))


@functools.cache
def _table() -> dict[str, list[dict[str, Any]]]:
    text = (files("fastcov.kernels") / _NAME).read_text(encoding="utf-8")
    devices: dict[str, list[dict[str, Any]]] = parse_json(text)["devices"]
    return devices


def adopt(results: dict[str, Any], table: dict[str, Any]) -> dict[str, Any]:
    """The table of ``measured.json`` with the measurements of one device put in place of its former ones.

    Results are ``{"device": name, "kernels": [{"dtype", "d", "seconds": {kernel: median}}]}``; ValueError is raised
    where they name no device or hold no measurement.
    """
    device, rows = results.get("device"), results.get("kernels")
    if not isinstance(device, str) or not isinstance(rows, list):
        raise ValueError("The results hold no device and kernels to adopt; pass a file of make gpu-check.")
    kept = [
        {"dtype": row["dtype"], "d": int(row["d"]), "seconds": row["seconds"]} for row in rows if row.get("seconds")
    ]
    if not kept:
        raise ValueError(f"The results of {device} hold no measured time; run make gpu-check again.")
    return {**table, "devices": {**table["devices"], device: kept}}


def main(arguments: list[str]) -> int:
    """Adopt a file of results into ``measured.json``."""
    if len(arguments) != 1:
        print("usage: python -m fastcov.kernels.table RESULTS.json", file=sys.stderr)
        return 2
    path = Path(__file__).with_name(_NAME)
    try:
        results = parse_json(Path(arguments[0]).read_bytes())
        table = adopt(results, parse_json(path.read_bytes()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        said = printable(f"error: {arguments[0]} cannot be adopted: {error}")
        print(said, file=sys.stderr)
        return 2
    with atomic_file(path) as file:
        file.write((json.dumps(table, indent=1) + "\n").encode())
    print(f"{path.name} now holds {', '.join(table['devices'])}.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
