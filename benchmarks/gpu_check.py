"""`make gpu-check`: builds, tests and measures on a GPU, in steps that cannot take each other down.

Every step is a process with a time limit. After each the file is written anew, so that a run that is killed keeps what
it had; where the time is short, later steps are not run and their goals are "not measured". Nothing is installed and
nothing is downloaded.

    python benchmarks/gpu_check.py --adopt benchmarks/results/NAME.json

takes the times of the kernels over into the table by which `fastcov.kernels.gpu` chooses one.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.recorded import load  # noqa: E402
from fastcov.bench.__main__ import new_run  # noqa: E402
from fastcov.bench.report import Row, Run, save  # noqa: E402
from fastcov.errors import BadInput  # noqa: E402
from fastcov.files import atomic_file, parse_json, printable  # noqa: E402

WIDTHS = (6400, 11008, 14336, 16384)
ROWS = 65536
TABLE = ROOT / "fastcov" / "kernels" / "measured.json"
TESTS = "tests on the device"
BUDGET = 520.0  # seconds in all: below nine minutes
_LEAST = 15.0  # seconds that a step is worth being started for
_NOT = "not measured"
# Kernels that are cuBLAS and plain torch: what the written ones are measured against.
_PLAIN = ("panels", "reference")
# Not the reference: plain torch at these sizes takes most of the time and is no candidate.
_KERNELS = ("triton", "cuda", "panels")
# Those that torch and pytest are enough for, less those that a processor runs: Triton's interpreter
# and its compiling for absent devices would spend the time of what needs the device.
_TESTS = (
    "tests/fastcov/kernels",
    "--ignore=tests/fastcov/kernels/test_triton.py",
    "--ignore=tests/fastcov/kernels/test_triton_compiled.py",
    "tests/fastcov/test_ops.py",
    "tests/fastcov/test_collect.py",
)


@dataclass(frozen=True)
class Task:
    """One step to run."""

    name: str
    command: tuple[str, ...]  # arguments of the Python interpreter that runs this program
    limit: float  # seconds after which it is stopped
    json: Path | None = None  # the file of rows that it writes
    environment: tuple[tuple[str, str], ...] = ()  # set for it beyond what is set already


@dataclass(frozen=True)
class Step:
    """A step that was run, or was to be."""

    name: str
    status: str  # "ok", "failed", "timed out" or "not run"
    seconds: float
    note: str = ""


@dataclass(frozen=True)
class Goal:
    """What was measured for a goal."""

    goal: str
    wanted: str
    measured: str = _NOT
    status: str = _NOT  # "met", "missed" or "not measured"


@dataclass
class Check:
    """All that one file holds."""

    run: Run
    steps: list[Step] = field(default_factory=list)

    def goals(self) -> list[Goal]:
        """Every goal with its figure."""
        return [_tests(self.steps), _gate(self.run), *_rank_k(self.run), _collect(self.run), *_factor(self.run)]

    def save(self, path: Path) -> None:
        """Write it as `fastcov.bench` writes a run, with steps and goals beside the rows."""
        save(self.run, path, steps=[asdict(x) for x in self.steps], goals=[asdict(x) for x in self.goals()])


# (task, seconds it may take) -> (exit code or None where it was stopped, all that it printed)
Execute = Callable[[Task, float], tuple[int | None, str]]


def tasks(folder: Path) -> list[Task]:
    """The steps in their order, what matters most first; their rows go into files in a folder."""

    def bench(name: str, limit: float, *arguments: str) -> Task:
        path = folder / f"{re.sub('[^a-z0-9]+', '-', name.lower())}.json"
        command = ("benchmarks/full.py", "--device", "cuda", "--seconds", "6", *arguments)
        return Task(name, (*command, "--json", str(path)), limit, path)

    build = ("setup.py", "build_ext", "--inplace")
    wide = ("--sizes", ",".join(map(str, WIDTHS)), "--rows", str(ROWS))
    return [
        Task("build the native extension", build, 150, environment=(("FASTCOV_CUDA", "ON"),)),
        Task(TESTS, ("-m", "pytest", "-q", "-p", "no:cacheprovider", *_TESTS), 180),
        # A process for each: a kernel that hangs costs its own rows alone.
        *(bench(f"rank_k bfloat16 {k}", 60, "rank_k", "--dtype", "bfloat16", *wide, "--kernels", k) for k in _KERNELS),
        bench("collect gpt-j", 120, "collect", "--load", "benchmarks.shapes:gpt_j"),
        *(
            bench(
                f"rank_k float32 {k}", 30, "rank_k", "--dtype", "float32", "--sizes", "11008", *wide[2:], "--kernels", k
            )
            for k in _KERNELS
        ),
        bench("factor", 90, "factor", "--sizes", "16384"),
    ]


def check(
    found: Check,
    steps: Sequence[Task],
    target: Path,
    execute: Execute,
    *,
    budget: float = BUDGET,
    clock: Callable[[], float] = time.monotonic,
) -> Check:
    """Run the steps one after another within a budget of seconds, and write the file after each."""
    begun = clock()
    for task in steps:
        left = min(task.limit, budget - (clock() - begun))
        if left < _LEAST:
            step = Step(task.name, "not run", 0.0, "the time was spent")
        else:
            print(f"== {task.name} (at most {left:.0f} s)", flush=True)
            started = clock()
            code, output = execute(task, left)
            print(output, flush=True)
            lines = [line.strip() for line in output.splitlines() if line.strip()]
            note = lines[-1][:200] if lines else ""
            if task.json is not None and task.json.is_file():
                recorded = load(task.json)
                found.run.rows.extend(recorded.rows)
                found.run.versions = recorded.versions  # of the extension that was built just now, too
                note = f"{len(recorded.rows)} rows"
            status = "timed out" if code is None else "ok" if code == 0 else "failed"
            step = Step(task.name, status, round(clock() - started, 1), note)
        found.steps.append(step)
        found.save(target)
        print(f"== {step.name}: {step.status}, {step.seconds:.0f} s. {step.note}\n", flush=True)
    return found


def execute(task: Task, limit: float) -> tuple[int | None, str]:
    """Run a step in a process group of its own, and end the group when its time is over."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environment = {**os.environ, **dict(task.environment), "PYTHONPATH": path}
    command = [sys.executable, *task.command]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        code: int | None = None
        try:
            code = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        return code, output.read()


# -- goals: nothing is estimated; where a row is missing, the goal is "not measured" ---------------


def summary(found: list[Goal]) -> str:
    """The goals as a table."""
    width = max(len(one.goal) for one in found)
    lines = [f"{'goal':{width}}{'wanted':>10}{'measured':>24}  status"]
    lines += [f"{g.goal:{width}}{g.wanted:>10}{g.measured:>24}  {g.status}" for g in found]
    counts = {s: sum(g.status == s for g in found) for s in ("met", "missed", _NOT)}
    return "\n".join([*lines, ", ".join(f"{number} {status}" for status, number in counts.items())])


def _goal(name: str, wanted: str, measured: str | None, met: bool) -> Goal:
    return Goal(name, wanted) if measured is None else Goal(name, wanted, measured, "met" if met else "missed")


def _tests(steps: Sequence[Step]) -> Goal:
    name = "every kernel test passes on the device"
    step = next((s for s in steps if s.name == TESTS and s.status != "not run"), None)
    if step is None or step.status != "ok":
        return _goal(name, "all", step and step.status, False)
    # pytest's last line, "12 passed, 3 skipped in 4.56s"; skipping everything proves nothing.
    counts = step.note.partition(" in ")[0].strip("= ")
    return _goal(name, "all", counts, " passed" in f" {counts}")


def _gate(run: Run) -> Goal:
    """Error and diagonal bias of the written kernels, as the rows of rank_k found them."""
    rows = [row for row in run.rows if row.suite == "rank_k" and row.kind == "ours" and row.status in ("ok", "failed")]
    failed = sum(row.status == "failed" for row in rows)
    measured = f"{failed} of {len(rows)} rows beyond" if rows else None
    return _goal("rank_k: error <= 1e-5 and diagonal bias <= 3e-6", "0 beyond", measured, not failed)


def _rank_k(run: Run) -> Iterator[Goal]:
    for d in WIDTHS:
        wanted = ("rank_k", "cuda", "bfloat16", ROWS, d)
        rows = [r for r in run.rows if (r.suite, r.device, r.dtype, r.n, r.d) == wanted and r.p50 is not None]
        ours = _fastest([r for r in rows if r.kernel is not None and r.kernel not in _PLAIN])
        addmm = _fastest([r for r in rows if r.contender.startswith("torch.addmm")])
        panels = _fastest([r for r in rows if "panels" in r.contender])
        name = f"rank_k bfloat16, n {ROWS}, d {d}: against"
        yield _times(f"{name} addmm(out_dtype=float32)", 1.6, ours, addmm)
        yield _times(f"{name} the same, stretch goal", 1.85, ours, addmm)
        yield _times(f"{name} row panels", 1.0, ours, panels)


def _times(name: str, wanted: float, ours: Row | None, other: Row | None) -> Goal:
    text = f">= {wanted:g}x" if wanted > 1 else "> 1x"
    if ours is None or other is None or not ours.p50 or not other.p50:
        return Goal(name, text)
    ratio = other.p50 / ours.p50
    return _goal(name, text, f"{ratio:.2f}x ({ours.contender})", ratio >= wanted if wanted > 1 else ratio > 1)


def _fastest(rows: list[Row]) -> Row | None:
    return min(rows, key=lambda row: row.p50 or float("inf"), default=None)


def _collect(run: Run) -> Goal:
    rows = [r for r in run.rows if r.suite == "collect" and "gpt_j" in r.case and r.kind == "ours" and r.n == 163840]
    share = next((row.share for row in rows if row.share is not None), None)
    measured = None if share is None else f"{1 / share:.2f}x"
    name = "collect, GPT-J's shape, layers 3-8, 163,840 tokens: the floor"
    return _goal(name, "<= 2x", measured, share is not None and share >= 0.5)


def _factor(run: Run) -> Iterator[Goal]:
    rows = [row for row in run.rows if row.suite == "factor" and row.contender == "fastcov factor once"]
    row = rows[-1] if rows else None
    error, ratio = (None, None) if row is None else (row.error, row.ratio)
    name = f"factor + batches of edits{'' if row is None else f', d {row.d}'}:"
    shown = None if error is None else f"{error:.1e}"
    yield _goal(f"{name} the result of a fresh LU", "to 1e-8", shown, error is not None and error <= 1e-8)
    shown = None if ratio is None else f"{ratio:.1f}x"
    yield _goal(f"{name} against a fresh LU", ">= 8x", shown, ratio is not None and ratio >= 8)


# -- the table of `fastcov.kernels.gpu` ----------------------------------------------------------


def adopt(run: Run, table: dict[str, Any]) -> dict[str, Any]:
    """The table with the times of one GPU put in place of the former ones of its compute capability.

    Args:
        run: What a check wrote.
        table: What ``measured.json`` holds.

    Raises:
        BadInput: The run is of no GPU or holds no time of a kernel.
    """
    if run.machine.gpu is None or run.machine.capability is None:
        raise BadInput("The run is of no GPU; pass a file of make gpu-check.")
    seconds: dict[tuple[str, int], dict[str, float]] = {}
    for row in run.rows:
        if row.suite == "rank_k" and row.kernel is not None and row.p50 is not None:
            seconds.setdefault((row.dtype, row.d), {})[row.kernel] = row.p50
    if not seconds:
        raise BadInput(f"The run on {run.machine.gpu} holds no measured time; run make gpu-check again.")
    rows = [{"dtype": dtype, "d": d, "seconds": found} for (dtype, d), found in seconds.items()]
    return {**table, "capabilities": {**table["capabilities"], run.machine.capability: rows}}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: 0 where every step was run and ended well, 1 where not, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds in all")
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/<gpu>.json")
    parser.add_argument("--adopt", type=Path, metavar="FILE", help="take over what a check has measured, and end")
    given = parser.parse_args(arguments)
    try:
        if given.adopt is not None:
            table = adopt(load(given.adopt), parse_json(TABLE.read_bytes()))
            with atomic_file(TABLE) as file:
                file.write((json.dumps(table, indent=1) + "\n").encode())
            print(f"{TABLE.name} now holds the capabilities {', '.join(table['capabilities'])}.")
            return 0
        if not torch.cuda.is_available():
            raise BadInput(
                f"there is no CUDA device here that torch {torch.__version__} can use; run make gpu-check on a "
                "machine with one."
            )
        # So that a step does not outlive this program when it is told to end.
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
        found = Check(new_run("make gpu-check", torch.device("cuda")))
        target = given.json or ROOT / "benchmarks" / "results" / file_name(found.run.machine.gpu or "gpu")
        with tempfile.TemporaryDirectory() as folder:
            check(found, tasks(Path(folder)), target, execute, budget=given.budget)
    except (BadInput, OSError) as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return 2
    print(summary(found.goals()))
    print(f"Written to {target}.")
    return 0 if all(step.status == "ok" for step in found.steps) else 1


def file_name(gpu: str) -> str:
    """``NVIDIA H100 80GB HBM3`` -> ``nvidia-h100-80gb-hbm3.json``."""
    return re.sub("[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json"


if __name__ == "__main__":
    raise SystemExit(main())
