"""`make gpu-check`: builds, tests and measures on a GPU, in steps that cannot take each other down.

Every step is a process with a time limit. After each the file is written anew, so that a run that is killed keeps what
it had; where the time is short, later steps are not run and their goals are "not measured". Nothing is installed and
nothing is downloaded.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fastcov.bench.goals import ROWS, TESTS, WIDTHS, goals, summary
from fastcov.bench.machine import new_run
from fastcov.bench.schema import BadInput, Run, Step, load, save
from fastcov.errors import printable

ROOT = Path(__file__).resolve().parents[2]
BUDGET = 520.0  # seconds in all: below nine minutes
_LEAST = 15.0  # seconds that a step is worth being started for
# Not the reference: plain torch at these sizes takes most of the time and is no candidate.
_KERNELS = "triton,cuda,panels"
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
    """One step.

    Attributes:
        name: As printed.
        command: Arguments of the Python interpreter that runs this program.
        limit: Seconds after which it is stopped.
        json: The file of rows that it writes, or None.
        environment: What is set for it beyond what is set already.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    json: Path | None = None
    environment: tuple[tuple[str, str], ...] = ()


# (task, seconds it may take) -> (exit code or None where it was stopped, all that it printed)
Execute = Callable[[Task, float], tuple[int | None, str]]


def tasks(folder: Path) -> list[Task]:
    """The steps in their order, what matters most first.

    Args:
        folder: For the files of rows.
    """

    def bench(name: str, limit: float, *arguments: str) -> Task:
        path = folder / f"{re.sub('[^a-z0-9]+', '-', name.lower())}.json"
        command = ("-m", "fastcov.bench", "--device", "cuda", "--seconds", "6", *arguments)
        return Task(name, (*command, "--json", str(path)), limit, path)

    widths = ",".join(map(str, WIDTHS))
    rows = ("--rows", str(ROWS), "--kernels", _KERNELS)
    return [
        Task(
            "build the native extension",
            ("setup.py", "build_ext", "--inplace"),
            150,
            environment=(("FASTCOV_CUDA", "ON"),),
        ),
        Task(TESTS, ("-m", "pytest", "-q", "-p", "no:cacheprovider", *_TESTS), 180),
        bench("rank_k bfloat16", 120, "rank_k", "--dtype", "bfloat16", "--sizes", widths, *rows),
        bench("collect gpt-j", 120, "collect", "--models", "gpt-j"),
        bench("rank_k float32", 60, "rank_k", "--dtype", "float32", "--sizes", "11008", *rows),
        bench("factor", 90, "factor", "--sizes", "16384"),
    ]


def check(
    run: Run,
    steps: Sequence[Task],
    target: Path,
    execute: Execute,
    *,
    budget: float = BUDGET,
    clock: Callable[[], float] = time.monotonic,
) -> Run:
    """Run the steps one after another, and write the file after each.

    Args:
        run: Without rows.
        steps: What to run.
        target: The file.
        execute: Runs one step.
        budget: Seconds in all.
        clock: Seconds now.

    Returns:
        The run, with rows, steps and goals.
    """
    begun = clock()
    for task in steps:
        left = budget - (clock() - begun)
        if left < _LEAST:
            run.steps.append(Step(task.name, "not run", 0.0, "the time was spent"))
        else:
            step = _step(task, min(task.limit, left), execute, clock)
            if task.json is not None and task.json.is_file():
                recorded = load(task.json)
                run.rows.extend(recorded.rows)
                run.versions = recorded.versions  # of the extension that was built just now, too
                step = replace(step, note=f"{len(recorded.rows)} rows")
            run.steps.append(step)
        run.goals = goals(run)
        save(run, target)
        step = run.steps[-1]
        print(f"== {step.name}: {step.status}, {step.seconds:.0f} s. {step.note}\n", flush=True)
    return run


def _step(task: Task, limit: float, execute: Execute, clock: Callable[[], float]) -> Step:
    print(f"== {task.name} (at most {limit:.0f} s)", flush=True)
    begun = clock()
    code, output = execute(task, limit)
    print(output, flush=True)
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    status = "timed out" if code is None else "ok" if code == 0 else "failed"
    return Step(task.name, status, round(clock() - begun, 1), lines[-1][:200] if lines else "")


def execute(task: Task, limit: float) -> tuple[int | None, str]:
    """Run a step in a process group of its own, and end the group when its time is over."""
    environment = {
        **os.environ,
        **dict(task.environment),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(":"),
    }
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(
            [sys.executable, *task.command],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        code: int | None
        try:
            code = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        return code, output.read()


def file_name(gpu: str) -> str:
    """``NVIDIA H100 80GB HBM3`` -> ``nvidia-h100-80gb-hbm3.json``."""
    return re.sub("[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: 0 where every step was run and ended well, 1 where not, 2 without a GPU."""
    parser = argparse.ArgumentParser(
        prog="python -m fastcov.bench.gpu_check", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds in all")
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/<gpu>.json")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(
            f"error: there is no CUDA device here that torch {torch.__version__} can use; run "
            "make gpu-check on a machine with one.",
            file=sys.stderr,
        )
        return 2
    # So that a step does not outlive this program when it is told to end.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    device = torch.device("cuda")
    run = new_run(sys.argv[1:], device, "make gpu-check")
    target = given.json or ROOT / "benchmarks" / "results" / file_name(run.machine.gpu or "gpu")
    with tempfile.TemporaryDirectory() as folder:
        try:
            check(run, tasks(Path(folder)), target, execute, budget=given.budget)
        except (BadInput, OSError) as error:
            print(printable(f"error: {error}"), file=sys.stderr)
            return 2
    print(summary(run.goals))
    print(f"Written to {target}.")
    return 0 if all(step.status == "ok" for step in run.steps) else 1


if __name__ == "__main__":
    raise SystemExit(main())
