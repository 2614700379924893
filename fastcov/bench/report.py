"""What a run found: rows, the file that holds them, and the table that a person reads.

A figure that was not measured is None here, null in the file and "not measured" or "-" in print; nothing is ever
estimated. Times are seconds, rates GFLOP/s of useful operations, both of one call.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fastcov.files import atomic_file
from fastcov.machine import Machine

FORMAT = "fastcov.bench"
VERSION = 1
LEGEND = """\
p20, p50, p80: milliseconds of one call, over interleaved rounds in which all take turns.
GFLOP/s: useful operations at p50; for a triangle n d (d+1).
x addmm, x base: how many times as fast as the case's baseline, which is marked =.
x lib: how many times as fast as the fastest library row.
% peak: of the peak named above the table; in collect it is the share of the limit. A tile loop / 6
    is the rate of bfloat16 products over the six that a product of such keys takes.
error: relative, against float64. diag bias: mean relative error of the diagonal.
memory: peak beyond the input, in matrices.
~: the result of a library is beyond the gate that ours has to pass; it is timed all the same."""


@dataclass(frozen=True)
class Row:
    """One contender in one case."""

    suite: str  # "rank_k", "factor" or "collect"
    case: str  # what was done, sizes included: rows are compared where case and contender agree
    contender: str  # "fastcov avx2", "torch.addmm", ...
    kind: str  # "ours", "library" (another's routine) or "released" (another's whole procedure)
    device: str  # "cpu" or "cuda"
    dtype: str  # of the keys or of the matrix: "float32", "bfloat16", ...
    n: int  # rows of keys, tokens, or edits
    d: int  # width of the keys
    status: str  # "ok", "failed" (wrong result: never timed) or "cannot" (could not run)
    reason: str = ""  # why a row failed or cannot run
    kernel: str | None = None  # name in fastcov.ops.kernels(), where a row is one of them
    error: float | None = None  # relative Frobenius error against float64
    bias: float | None = None  # mean relative error of the diagonal, with its sign
    inexact: bool = False  # a library's result is beyond the gate that ours has to pass
    rounds: int = 0
    p20: float | None = None  # seconds
    p50: float | None = None
    p80: float | None = None
    gflops: float | None = None  # useful GFLOP/s at p50
    ratio: float | None = None  # p50 of the case's baseline over p50 of this row
    ratio_library: float | None = None  # p50 of the fastest library row over p50 of this row
    peak: str | None = None  # what the share is a share of
    peak_before: float | None = None  # GFLOP/s of the peak, measured before the rounds
    peak_after: float | None = None  # and after them
    share: float | None = None  # gflops over the larger of both; in collect, the share of the limit
    memory: float | None = None  # peak memory beyond the input, in multiples of the matrix
    tokens_per_second: float | None = None  # collect only


@dataclass
class Run:
    """What one file holds."""

    machine: Machine
    versions: dict[str, str]  # python, torch, triton, fastmemit, native
    threads: int
    command: str
    date: str  # ISO 8601, UTC
    rows: list[Row] = field(default_factory=list)


def save(run: Run, path: Path, **more: object) -> None:
    """Write a run, and more fields beside it; the file is the old one or the whole new one."""
    content = {"format": FORMAT, "version": VERSION, **asdict(run), **more}
    with atomic_file(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())


# -- the table: under 120 columns, units in the header ------------------------------------------------------------

_NAMED = {"rank_k": ("x addmm", "diag bias"), "factor": ("x base", "memory"), "collect": ("x base", "tokens/s")}
_SIZES = (10, 10, 10, 10, 9, 8, 8, 10, 11)  # of the columns behind the name


def heading(run: Run) -> str:
    """Where the run is made, and with what."""
    m = run.machine
    lines = [f"{m.cpu}, {m.cores} cores, {run.threads} threads, {' '.join(m.isa) or 'no known ISA'}"]
    if m.gpu is not None:
        memory = "not measured" if m.gpu_memory_gib is None else f"{m.gpu_memory_gib:g} GiB"
        lines.append(f"{m.gpu}, {memory}, capability {m.capability}, driver {m.driver or 'unknown'}")
    lines.append(", ".join(f"{name} {version}" for name, version in run.versions.items()))
    lines.append(f"{run.date}  {run.command}")
    return "\n".join(lines)


def table(rows: Sequence[Row]) -> str:
    """The rows of one case."""
    width = max(22, *(len(row.contender) + 2 for row in rows))
    baseline, last = _NAMED[rows[0].suite]
    names = ("p20 ms", "p50 ms", "p80 ms", "GFLOP/s", baseline, "x lib", "% peak", "error", last)
    title = f"{rows[0].suite}: {rows[0].case}, on {rows[0].device}"
    lines = [title, _peaks(rows), _line(f"{'contender':{width}}", names)]
    for row in rows:
        mark = "=" if row.ratio == 1.0 else "~" if row.inexact else " "
        name = f"{mark}{row.contender:{width - 1}}"
        if row.status == "failed":
            lines.append(f"{name} FAILED: {row.reason}")
        elif row.p50 is None:
            lines.append(f"{name} cannot run: {row.reason}")
        else:
            lines.append(_line(name, _cells(row)))
    return "\n".join(line if len(line) < 120 else line[:116] + "..." for line in lines)


def _line(name: str, cells: Sequence[str]) -> str:
    return name + "".join(f"{text:>{size}}" for text, size in zip(cells, _SIZES, strict=True))


def _cells(row: Row) -> list[str]:
    def shown(value: float | None, form: str, scale: float = 1.0) -> str:
        return "-" if value is None else f"{scale * value:{form}}"

    last = {
        "rank_k": shown(row.bias, "+.1e"),
        "factor": shown(row.memory, ".2f"),
        "collect": shown(row.tokens_per_second, ",.0f"),
    }
    return [
        *(_milliseconds(value) for value in (row.p20, row.p50, row.p80)),
        number(row.gflops),
        shown(row.ratio, ".2f"),
        shown(row.ratio_library, ".2f"),
        shown(row.share, ".0f", 100),
        shown(row.error, ".1e"),
        last[row.suite],
    ]


def _peaks(rows: Sequence[Row]) -> str:
    found = {row.peak: row for row in rows if row.peak is not None}
    if not found:
        return "peak: not measured"
    parts = [f"{name} {number(row.peak_before)} before, {number(row.peak_after)} after" for name, row in found.items()]
    return f"peak, GFLOP/s: {'; '.join(parts)}; {max(row.rounds for row in rows)} rounds"


def _milliseconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    value = 1000 * seconds
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.3f}"


def number(value: float | None) -> str:
    """A rate as it is printed."""
    return "not measured" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
