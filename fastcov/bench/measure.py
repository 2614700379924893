"""How contenders are compared: each is checked against plain float64 products of torch, then all take turns."""

from __future__ import annotations

import ctypes
import gc
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fastcov.bench.report import Row
from fastcov.errors import KernelUnavailable
from fastcov.throughput import measured_peak


@dataclass(frozen=True)
class Verdict:
    """What the check of a result against float64 found."""

    error: float  # relative
    bias: float | None = None  # mean relative error of the diagonal
    failure: str | None = None  # what is wrong with the result
    inexact: bool = False  # right for a library, but beyond the gate that ours has to pass


@dataclass(frozen=True)
class Probe:
    """What the machine can do at best, by name; `measure` returns GFLOP/s."""

    name: str
    measure: Callable[[], float]


@dataclass(frozen=True)
class Contender:
    """One way to do what a case asks."""

    name: str
    kind: str  # "ours", "library" or "released"
    check: Callable[[], Verdict]  # runs it once and compares the result with float64
    run: Callable[[], object]  # what is timed
    prepare: Callable[[], object] = lambda: None  # called before each timed run, untimed
    kernel: str | None = None  # name in `fastcov.ops.kernels`, where it is one of them
    cannot: str | None = None  # why it cannot run
    rounds: int | None = None  # how many it takes part in at most, without a warm-up besides its check
    probe: Probe | None = None  # its own peak; without one it is held against the first one's that runs


@dataclass(frozen=True)
class Case:
    """What the contenders have in common; ratios refer to the first that is not ours."""

    suite: str
    name: str  # what is done, sizes included
    dtype: str  # of the keys or the matrix
    n: int
    d: int
    device: torch.device
    flops: Callable[[], float]  # useful operations of one call; asked for after the checks, which may count them
    probe: Probe  # the peak where no contender with one of its own runs


@dataclass(frozen=True)
class Effort:
    """How long to measure."""

    seconds: float = 12.0  # for the rounds of one case together
    least: int = 5  # rounds, whatever they take
    most: int = 40


def measure(case: Case, contenders: Sequence[Contender], effort: Effort) -> list[Row]:
    """Check every contender, then time those that are right, in interleaved rounds; a row for each, in their order.

    All contenders take a turn in each round, in another order each time, so that a machine that drifts, or threads and
    caches that a neighbour left busy, hit all alike.
    """
    rows = [_checked(case, contender) for contender in contenders]
    running = [one for one, row in zip(contenders, rows, strict=True) if row.status == "ok"]
    common = next((one.probe for one in running if one.probe), case.probe)
    probes = {one.name: one.probe or common for one in running}
    before = {probe.name: probe.measure() for probe in dict.fromkeys(probes.values())}
    times = _rounds(running, case.device, effort)
    after = {probe.name: probe.measure() for probe in dict.fromkeys(probes.values())}
    medians = {name: quantile(taken, 0.5) for name, taken in times.items()}
    base = next((one.name for one in contenders if one.kind != "ours"), None)
    libraries = [medians[one.name] for one in running if one.kind == "library"]
    for place, row in enumerate(rows):
        if row.contender not in times:
            continue
        taken, middle, peak = times[row.contender], medians[row.contender], probes[row.contender].name
        gflops = case.flops() / middle / 1e9
        rows[place] = replace(
            row,
            rounds=len(taken),
            p20=quantile(taken, 0.2),
            p50=middle,
            p80=quantile(taken, 0.8),
            gflops=gflops,
            ratio=medians[base] / middle if base in medians else None,
            ratio_library=min(libraries) / middle if libraries else None,
            peak=peak,
            peak_before=before[peak],
            peak_after=after[peak],
            share=gflops / max(before[peak], after[peak]),
        )
    return rows


def _checked(case: Case, contender: Contender) -> Row:
    """The row of a contender before it is timed."""
    about = case.suite, case.name, contender.name, contender.kind, case.device.type, case.dtype, case.n, case.d
    row = Row(*about, status="cannot", kernel=contender.kernel)
    if contender.cannot is not None:
        return replace(row, reason=contender.cannot)
    try:
        verdict = contender.check()
    except KernelUnavailable as error:
        # The reason alone, of "The kernel 'x' cannot run: reason; name another or none."
        _, found, reason = str(error).partition("cannot run: ")
        return replace(row, reason=reason.rpartition(";")[0] if found and ";" in reason else str(error))
    except torch.OutOfMemoryError:
        return replace(row, reason="not enough memory on the device")
    except Exception as error:  # whatever a kernel may raise: it is reported, and never timed
        lines = str(error).strip().splitlines() or [""]
        verdict = Verdict(float("nan"), failure=f"it raised {type(error).__name__}: {lines[0]}".rstrip("."))
    return replace(
        row,
        status="ok" if verdict.failure is None else "failed",
        reason=verdict.failure or "",
        error=None if verdict.error != verdict.error else verdict.error,  # NaN has no place in a file
        bias=verdict.bias,
        inexact=verdict.inexact,
    )


def _rounds(running: Sequence[Contender], device: torch.device, effort: Effort) -> dict[str, list[float]]:
    """Seconds of each contender, round by round."""
    once = sum(clock(one, device) for one in running if one.rounds is None)  # a warm-up, not counted
    rounds = max(effort.least, min(effort.most, int(effort.seconds / max(once, 1e-9))))
    times: dict[str, list[float]] = {one.name: [] for one in running}
    for number in range(rounds if running else 0):
        for one in random.Random(number).sample(running, len(running)):
            if one.rounds is None or number < one.rounds:
                times[one.name].append(clock(one, device))
    return times


def clock(contender: Contender, device: torch.device) -> float:
    """Seconds of one call, the wait for the device included."""
    contender.prepare()
    _wait(device)
    begun = time.perf_counter()
    contender.run()
    _wait(device)
    return time.perf_counter() - begun


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile of at least one value, between neighbours where it falls between them."""
    return float(torch.tensor(values, dtype=torch.float64).quantile(q))


# -- what is expected of an update: all matrices (d, d) --------------------------------------------

BIAS = 3e-6  # mean relative error of the diagonal on a GPU, whichever its sign


def failure(device: torch.device, sums: torch.dtype, error: float, bias: float) -> str | None:
    """Why a result does not pass the gate of docs/results/performance.md, or None; NaN never passes.

    The errors are those of `lower_error`, for sums of a dtype on a device.
    """
    narrow, cuda = sums != torch.float64, device.type == "cuda"
    allowed = (1e-5 if cuda else 1e-6) if narrow else 1e-13
    if not error <= allowed:
        return f"relative error {error:.2g} is above {allowed:.0e}"
    # Accumulation that truncates shows here first: all terms of a diagonal are positive, so nothing cancels.
    if cuda and narrow and not abs(bias) <= BIAS:
        return f"diagonal bias {bias:+.2g} is beyond {BIAS:.0e}"
    return None


def expected_lower(C: Tensor, X: Tensor) -> Tensor:
    """``C + X^T X`` in float64 for keys X (n, d)."""
    keys = X.double()
    return torch.addmm(C.double(), keys.mT, keys)


def lower_error(C: Tensor, expected: Tensor) -> tuple[float, float]:
    """The relative Frobenius error of the lower triangle, and the mean relative error of the diagonal with its sign.

    Both are NaN where C holds NaN there.
    """
    wrong = C.double() - expected
    error = wrong.tril().norm() / expected.tril().norm()
    return float(error), float((wrong.diagonal() / expected.diagonal()).mean())


def upper_is_untouched(C: Tensor, before: Tensor) -> bool:
    """Whether nothing above the diagonal of C differs from what was there before."""
    return torch.equal(C.triu(1), before.triu(1))


# -- the machine -----------------------------------------------------------------------------------


def peak_probe(dtype: torch.dtype, device: torch.device) -> Probe:
    """The machine's rate of multiply-adds for keys of a dtype, in large products of torch and in loops.

    16-bit keys count as float32 on a CPU. On CUDA all but float64 are held against bfloat16: float32 keys are
    multiplied on the same units, in several parts.
    """
    kind = dtype if dtype == torch.float64 else torch.bfloat16 if device.type == "cuda" else torch.float32
    name = f"{device.type} {str(kind).removeprefix('torch.')}"
    return Probe(name, lambda: measured_peak(kind, device) / 1e9)


_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_beyond(run: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that a call needs at its peak beyond what is allocated before it; None where nothing here can measure them.

    On a GPU torch's allocator counts them. On Linux the kernel's high-water mark of the process is reset and read,
    which sees the workspaces of every library. What malloc keeps of earlier calls is given back first: a workspace that
    it lends again would not show.
    """
    gc.collect()
    if device.type == "cuda":
        _wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        _wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc alone
        if trim is None:
            return None
        trim(0)
        _CLEAR.write_text("5", encoding="ascii")
        before = _kilobytes("VmRSS")
        run()
        return max(0, _kilobytes("VmHWM") - before) * 1024
    except (OSError, KeyError, ValueError):
        return None


def _kilobytes(field: str) -> int:
    lines = _STATUS.read_text(encoding="ascii").splitlines()
    return int(dict(line.split(":", 1) for line in lines)[field].split()[0])
