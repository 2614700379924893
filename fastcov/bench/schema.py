"""What a benchmark writes: one file a run, one row for each contender in each case.

A figure that was not measured is null in the file and None here; nothing is ever estimated. Times are seconds, rates
GFLOP/s of useful operations, both of one call.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from fastcov.files import parse_json

FORMAT = "fastcov.bench"
VERSION = 1


class BadInput(ValueError):
    """What was asked for cannot be run; the message is one sentence for the person who asked."""


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


@dataclass(frozen=True)
class Machine:
    """Where a run was made."""

    cpu: str
    cores: int  # that the process may use
    isa: tuple[str, ...]  # of the instruction sets that matter here, those that the CPU has
    system: str
    gpu: str | None = None
    driver: str | None = None
    capability: str | None = None  # "9.0"
    gpu_memory_gib: float | None = None


@dataclass(frozen=True)
class Step:
    """A part of a check that runs in a process of its own."""

    name: str
    status: str  # "ok", "failed", "timed out" or "not run"
    seconds: float
    note: str = ""


@dataclass(frozen=True)
class GoalResult:
    """A goal and what was measured for it."""

    goal: str
    wanted: str
    measured: str  # "not measured" where there is no figure
    status: str  # "met", "missed" or "not measured"


@dataclass
class Run:
    """One file."""

    machine: Machine
    versions: dict[str, str]  # python, torch, triton, fastmemit, native
    threads: int
    command: str
    date: str  # ISO 8601, UTC
    rows: list[Row] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)  # of `make gpu-check`
    goals: list[GoalResult] = field(default_factory=list)

    def kernels(self) -> list[dict[str, Any]]:
        """Seconds of each kernel by dtype and shape: what `fastcov.kernels.gpu` takes over.

        Derived from the rows, written into the file beside the name of the device and not read back.
        """
        table: dict[tuple[str, int, int], dict[str, float]] = {}
        for row in self.rows:
            if row.suite == "rank_k" and row.kernel is not None and row.p50 is not None:
                table.setdefault((row.dtype, row.n, row.d), {})[row.kernel] = row.p50
        return [{"dtype": dtype, "n": n, "d": d, "seconds": seconds} for (dtype, n, d), seconds in table.items()]


def save(run: Run, path: Path) -> None:
    """Write a run to a temporary name beside `path` and rename it.

    Raises:
        OSError: The file cannot be written.
    """
    content = {
        "format": FORMAT,
        "version": VERSION,
        **asdict(run),
        "device": run.machine.gpu or run.machine.cpu,
        "kernels": run.kernels(),
    }
    from fastcov.files import atomic_file  # torch, which those who only read need not load

    with atomic_file(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())


def load(path: Path) -> Run:
    """Read a run.

    Raises:
        BadInput: There is no such file, or it is not one of `fastcov.bench`.
    """
    if path.exists() and not path.is_file():
        raise BadInput(f"{path} is not a file; name one that --json wrote.")
    try:
        content = parse_json(path.read_bytes())
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror}); name a file that --json wrote.") from error
    except ValueError as error:
        raise BadInput(f"{path} is not JSON ({error}); name a file that --json wrote.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise BadInput(f"{path} is not a run of fastcov.bench; name a file that --json wrote.")
    if content.get("version") != VERSION:
        raise BadInput(
            f"{path} has version {content.get('version')!r:.40} of the format and this program "
            f"reads {VERSION}; record the run again."
        )
    try:
        return _run(content)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise BadInput(f"{path} is damaged ({type(error).__name__}: {error}); record the run again.") from error


def _run(content: Mapping[str, Any]) -> Run:
    machine = dict(content["machine"])
    return Run(
        machine=Machine(**{**machine, "isa": tuple(machine["isa"])}),
        versions={str(k): str(v) for k, v in content["versions"].items()},
        threads=int(content["threads"]),
        command=str(content["command"]),
        date=str(content["date"]),
        rows=[Row(**_known(Row, row)) for row in content["rows"]],
        steps=[Step(**_known(Step, step)) for step in content.get("steps", [])],
        goals=[GoalResult(**_known(GoalResult, goal)) for goal in content.get("goals", [])],
    )


def _known(kind: Any, entry: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that this program knows; a later one may have written more."""
    names = {one.name for one in fields(kind)}
    return {name: value for name, value in entry.items() if name in names}
