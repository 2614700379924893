"""Rows as a table that a person reads: under 120 columns, units in the header."""

from __future__ import annotations

from collections.abc import Sequence

from fastcov.bench.schema import Row, Run

NOT_MEASURED = "not measured"
_BASELINE = {"rank_k": "addmm", "factor": "base", "collect": "base"}
_LAST = {"rank_k": "diag bias", "factor": "memory", "collect": "tokens/s"}

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


def heading(run: Run) -> str:
    """Where the run is made, and with what."""
    m = run.machine
    lines = [f"{m.cpu}, {m.cores} cores, {run.threads} threads, {' '.join(m.isa) or 'no known ISA'}"]
    if m.gpu is not None:
        memory = NOT_MEASURED if m.gpu_memory_gib is None else f"{m.gpu_memory_gib:g} GiB"
        driver = m.driver or "unknown"
        lines.append(f"{m.gpu}, {memory}, capability {m.capability}, driver {driver}")
    lines.append(", ".join(f"{name} {version}" for name, version in run.versions.items()))
    lines.append(f"{run.date}  {run.command}")
    return "\n".join(lines)


def table(rows: Sequence[Row]) -> str:
    """The rows of one case."""
    suite = rows[0].suite
    width = max(22, *(len(row.contender) + 2 for row in rows))
    names = ("p20 ms", "p50 ms", "p80 ms", "GFLOP/s", f"x {_BASELINE[suite]}", "x lib", "% peak",
             "error", _LAST[suite])  # fmt: skip
    header = f"{'contender':{width}}" + "".join(f"{name:>{size}}" for name, size in zip(names, _SIZES, strict=True))
    lines = [f"{rows[0].suite}: {rows[0].case}, on {rows[0].device}", *_peaks(rows), header]
    for row in rows:
        mark = "=" if row.ratio == 1.0 else "~" if row.inexact else " "
        name = f"{mark}{row.contender:{width - 1}}"
        if row.status == "failed":
            lines.append(f"{name} FAILED: {row.reason}")
        elif row.p50 is None:
            lines.append(f"{name} cannot run: {row.reason}")
        else:
            cells = zip(_cells(row), _SIZES, strict=True)
            lines.append(name + "".join(f"{text:>{size}}" for text, size in cells))
    return "\n".join(_short(line) for line in lines)


_SIZES = (10, 10, 10, 10, 9, 8, 8, 10, 11)


def _cells(row: Row) -> list[str]:
    last = {
        "rank_k": "-" if row.bias is None else f"{row.bias:+.1e}",
        "factor": "-" if row.memory is None else f"{row.memory:.2f}",
        "collect": "-" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}",
    }[row.suite]
    return [
        *(_milliseconds(value) for value in (row.p20, row.p50, row.p80)),
        _number(row.gflops),
        "-" if row.ratio is None else f"{row.ratio:.2f}",
        "-" if row.ratio_library is None else f"{row.ratio_library:.2f}",
        "-" if row.share is None else f"{100 * row.share:.0f}",
        "-" if row.error is None else f"{row.error:.1e}",
        last,
    ]


def _peaks(rows: Sequence[Row]) -> list[str]:
    found = {row.peak: row for row in rows if row.peak is not None}
    if not found:
        return [f"peak: {NOT_MEASURED}"]
    parts = [
        f"{name} {_number(row.peak_before)} before, {_number(row.peak_after)} after" for name, row in found.items()
    ]
    rounds = max(row.rounds for row in rows)
    return [f"peak, GFLOP/s: {'; '.join(parts)}; {rounds} rounds"]


def _milliseconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    value = 1000 * seconds
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.3f}"


def _number(value: float | None) -> str:
    if value is None:
        return NOT_MEASURED
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _short(line: str) -> str:
    return line if len(line) < 120 else line[:116] + "..."
