"""Check first, then take turns: how contenders of a case are compared."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from fastcov.bench.peak import Probe
from fastcov.bench.schema import Row
from fastcov.errors import KernelUnavailable


@dataclass(frozen=True)
class Verdict:
    """What the check of a result against float64 found.

    Attributes:
        error: The relative error.
        bias: The mean relative error of the diagonal, where it has one.
        failure: What is wrong with the result, or None.
        inexact: Whether a library's result is right but beyond the gate that ours has to pass.
    """

    error: float
    bias: float | None = None
    failure: str | None = None
    inexact: bool = False


@dataclass(frozen=True)
class Contender:
    """One way to do what a case asks.

    Attributes:
        name: As printed.
        kind: "ours", "library" or "released".
        check: Runs it once and compares the result with float64.
        run: What is timed.
        prepare: Called before each timed run, untimed.
        kernel: Its name in `fastcov.ops.kernels`, where it is one of them.
        cannot: Why it cannot run, or None.
        rounds: In how many rounds it takes part at most, without a warm-up besides its check.
    """

    name: str
    kind: str
    check: Callable[[], Verdict] | None = None
    run: Callable[[], object] | None = None
    prepare: Callable[[], object] | None = None
    kernel: str | None = None
    cannot: str | None = None
    rounds: int | None = None


@dataclass(frozen=True)
class Case:
    """What the contenders have in common.

    Attributes:
        suite: Its suite.
        name: What is done, sizes included.
        device: Where.
        dtype: Of the keys or the matrix.
        n: Rows.
        d: Width.
        flops: Useful operations of one call; asked for after the checks, which may count them.
        baseline: The contender that ratios refer to.
        probes: Measurements of the machine's peak by contender. A contender without one of its own is held against the
            first that runs.
        fallback: The peak where no contender with one of its own runs.
    """

    suite: str
    name: str
    device: torch.device
    dtype: str
    n: int
    d: int
    flops: Callable[[], float]
    baseline: str
    probes: dict[str, Probe]
    fallback: Probe


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        seconds: For the rounds of one case together.
        least: Rounds at least, whatever they take.
        most: Rounds at most.
    """

    seconds: float = 12.0
    least: int = 5
    most: int = 40


def measure(case: Case, contenders: Sequence[Contender], effort: Effort) -> list[Row]:
    """Check every contender, then time those that are right, in interleaved rounds.

    All contenders take a turn in each round, in another order each time, so that a machine that drifts, or threads and
    caches that a neighbour left busy, hit all alike.

    Returns:
        A row for each contender, in the order given.
    """
    verdicts: dict[str, Verdict | str] = {}
    for contender in contenders:
        verdicts[contender.name] = _checked(contender)
    running = [c for c in contenders if _passed(verdicts[c.name])]
    own = {c.name: case.probes[c.name] for c in running if c.name in case.probes}
    common = next(iter(own.values()), case.fallback)
    probes = {common.name: common, **{probe.name: probe for probe in own.values()}}
    before = {name: probe.measure() for name, probe in probes.items()} if running else {}
    times = _rounds(running, case.device, effort)
    after = {name: probe.measure() for name, probe in probes.items()} if running else {}
    medians = {name: quantile(taken, 0.5) for name, taken in times.items()}
    libraries = [medians[c.name] for c in running if c.kind == "library"]
    base = medians.get(case.baseline)
    rows = []
    for contender in contenders:
        row = _untimed(case, contender, verdicts[contender.name])
        if contender.name in times:
            taken, middle = times[contender.name], medians[contender.name]
            peak = own.get(contender.name, common).name
            gflops = case.flops() / middle / 1e9
            row = replace(
                row,
                rounds=len(taken),
                p20=quantile(taken, 0.2),
                p50=middle,
                p80=quantile(taken, 0.8),
                gflops=gflops,
                ratio=None if base is None else base / middle,
                ratio_library=min(libraries) / middle if libraries else None,
                peak=peak,
                peak_before=before[peak],
                peak_after=after[peak],
                share=gflops / max(before[peak], after[peak]),
            )
        rows.append(row)
    return rows


def _checked(contender: Contender) -> Verdict | str:
    """The verdict, or why the contender cannot run."""
    if contender.cannot is not None or contender.check is None:
        return contender.cannot or "it has no check"
    try:
        return contender.check()
    except KernelUnavailable as error:
        return _clause(str(error))
    except torch.OutOfMemoryError:
        return "not enough memory on the device"
    except Exception as error:  # whatever a kernel may raise: it is reported, and never timed
        lines = str(error).strip().splitlines() or [""]
        return Verdict(float("nan"), failure=f"it raised {type(error).__name__}: {lines[0]}".rstrip("."))


def _clause(message: str) -> str:
    """The reason alone, of "The kernel 'x' cannot run: reason; name another or none."."""
    _, found, reason = message.partition("cannot run: ")
    return reason.rpartition(";")[0] if found and ";" in reason else message


def _passed(verdict: Verdict | str) -> bool:
    return isinstance(verdict, Verdict) and verdict.failure is None


def _untimed(case: Case, contender: Contender, verdict: Verdict | str) -> Row:
    seen = verdict if isinstance(verdict, Verdict) else None
    error = None if seen is None or seen.error != seen.error else seen.error
    return Row(
        suite=case.suite,
        case=case.name,
        contender=contender.name,
        kind=contender.kind,
        device=case.device.type,
        dtype=case.dtype,
        n=case.n,
        d=case.d,
        status="cannot" if seen is None else "ok" if seen.failure is None else "failed",
        reason=verdict if isinstance(verdict, str) else verdict.failure or "",
        kernel=contender.kernel,
        error=error,
        bias=None if seen is None else seen.bias,
        inexact=bool(seen is not None and seen.inexact),
    )


def _rounds(running: Sequence[Contender], device: torch.device, effort: Effort) -> dict[str, list[float]]:
    """Seconds of each contender, round by round."""
    if not running:
        return {}
    steady = [contender for contender in running if contender.rounds is None]
    once = sum(clock(contender, device) for contender in steady)  # a warm-up, not counted
    rounds = max(effort.least, min(effort.most, int(effort.seconds / max(once, 1e-9))))
    times: dict[str, list[float]] = {contender.name: [] for contender in running}
    for number in range(rounds):
        for contender in random.Random(number).sample(running, len(running)):
            if contender.rounds is not None and number >= contender.rounds:
                continue
            times[contender.name].append(clock(contender, device))
    return times


def clock(contender: Contender, device: torch.device) -> float:
    """Seconds of one call, the wait for the device included."""
    assert contender.run is not None
    if contender.prepare is not None:
        contender.prepare()
    if device.type != "cuda":
        begun = time.perf_counter()
        contender.run()
        return time.perf_counter() - begun
    torch.cuda.synchronize(device)
    begun = time.perf_counter()
    contender.run()
    torch.cuda.synchronize(device)
    return time.perf_counter() - begun


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile, between neighbours where it falls between them.

    Args:
        values: At least one.
        q: From 0 to 1.
    """
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
