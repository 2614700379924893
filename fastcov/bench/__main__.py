"""The command line: what is asked for is checked before any work is done; then suites, the table and the file."""

from __future__ import annotations

import argparse
import datetime
import importlib
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from fastcov import ops
from fastcov.__main__ import until_reader_goes
from fastcov.bench import suites
from fastcov.bench.measure import Effort
from fastcov.bench.report import LEGEND, Run, heading, save, table
from fastcov.errors import BadInput
from fastcov.linalg import free_memory
from fastcov.machine import this_machine, versions

SUITES = {"rank_k": suites.rank_k, "factor": suites.factor, "collect": suites.collect}
DTYPES = {suites.word(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}
_SIZES = {
    # device: (widths of rank_k, rows, widths of factor)
    "cpu": ((1536, 3072, 6144), 4096, (3072,)),
    "cuda": ((6400, 11008, 14336, 16384), 65536, (16384,)),
    "quick": ((256, 384), 512, (256,)),
}
_EPILOG = """
examples:
  python -m fastcov.bench                                rank_k and factor as it suits this machine
  python -m fastcov.bench rank_k --sizes 1536,6144 --dtype float32,bfloat16 --threads 2
  python -m fastcov.bench rank_k factor --json now.json
  python -m fastcov.bench collect --load benchmarks.smollm2:load
  python -m fastcov.bench --quick                        does everything work? (some seconds)

Every result is checked against float64 before it is timed. The exit code is 0, or 1 where a row
failed its check, or 2 where the input makes no sense.
"""


def main(arguments: Sequence[str] | None = None, extras: suites.Extras | None = None) -> int:
    """Do what the command line asks for; the code is 1 if a row failed its check, 2 if the input makes no sense."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        run = measured(parse(words, extras), words)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; cases that were finished are printed above.", file=sys.stderr)
        return 130
    failed = [row for row in run.rows if row.status == "failed"]
    if failed:
        print(f"\n{len(failed)} of {len(run.rows)} rows FAILED their check and were not timed.")
    return 1 if failed else 0


def new_run(command: str, device: torch.device) -> Run:
    """A run without rows, made here and now by this command."""
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return Run(this_machine(device), versions(), torch.get_num_threads(), command, date)


def measured(given: argparse.Namespace, words: Sequence[str]) -> Run:
    """Run the suites, printing each case as it is done, and writing the file after each."""
    torch.set_num_threads(given.threads)
    run = new_run(shlex.join([Path(sys.executable).name, *given.extras.program.split(), *words]), given.device)
    print(heading(run), flush=True)
    for suite in given.suites:
        for rows in SUITES[suite](given):
            run.rows.extend(rows)
            print(f"\n{table(rows)}", flush=True)
            if given.json is not None:
                save(run, given.json)
    print(f"\n{LEGEND}")
    if given.quick:
        print("These are the sizes of a trial (--quick); they measure nothing.")
    if given.json is not None:
        print(f"Written to {given.json}.")
    return run


def parse(words: Sequence[str], extras: suites.Extras | None = None) -> argparse.Namespace:
    """Read the command line; a BadInput where it asks for what cannot be, SystemExit where it asks for help."""
    extras = extras or suites.Extras()
    given = _parser(f"python {extras.program}").parse_args(words)
    given.extras = extras
    _one_of("suite", given.suites, SUITES)
    if "collect" in given.suites and given.load is None:
        raise BadInput("The suite collect needs a model; name one, for example --load benchmarks.smollm2:load.")
    known = [name for name in SUITES if name != "collect" or given.load is not None]
    given.suites = [name for name in known if not given.suites or name in given.suites]
    _one_of("--device", [given.device], ("cpu", "cuda"))
    if given.device == "cuda" and not torch.cuda.is_available():
        raise BadInput(f"There is no CUDA device here that torch {torch.__version__} can use; choose --device cpu.")
    given.device = torch.device(given.device)
    widths, rows, factor_widths = _SIZES["quick" if given.quick else given.device.type]
    named = None if given.sizes is None else tuple(_whole("--sizes", size) for size in _list(given.sizes))
    given.rank_k_sizes, given.factor_sizes = named or widths, named or factor_widths
    given.rows = rows if given.rows is None else _whole("--rows", given.rows)
    _one_of("--dtype", _list(given.dtype), DTYPES)
    given.dtypes = list(dict.fromkeys(DTYPES[name] for name in _list(given.dtype)))
    cores = os.cpu_count() or 1
    given.threads = torch.get_num_threads() if given.threads is None else _whole("--threads", given.threads)
    if given.threads > cores:
        raise BadInput(f"--threads {given.threads} is more than the {cores} processors here; use fewer.")
    given.kernels = None if given.kernels is None else _list(given.kernels)
    _one_of("--kernels", given.kernels or [], ops.kernels())
    given.load_name, given.load = given.load, None if given.load is None else _provider(given.load)
    if not 0 < given.multiplier < 1e6:
        raise BadInput(f"--multiplier must be above 0 but is {given.multiplier:g}; 10 is usual.")
    if not 0 < given.seconds <= 3600:
        raise BadInput(f"--seconds must be from 0 to 3600 but is {given.seconds:g}; 12 is usual.")
    given.effort = Effort(1.0, 3, 5) if given.quick else Effort(given.seconds)
    given.batch_tokens = 16384 if given.device.type == "cuda" else 4096
    if given.json and (given.json.is_dir() or not os.access(given.json.parent, os.W_OK)):
        raise BadInput(f"--json {given.json} cannot be written; name a file in a folder that exists.")
    _check_memory(given)
    return given


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BadInput(f"{message[:1].upper()}{message[1:].rstrip('.')}; see --help.")


def _parser(program: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=program,
        description="Times symmetric rank-k updates (rank_k), factorising and editing (factor) and "
        "collecting a model's second moments (collect) against what others run.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("suites", nargs="*", metavar="SUITE", help=f"{', '.join(SUITES)} (default: all; collect needs --load)")
    add("--device", default="cpu", help="cpu (default) or cuda")
    add("--dtype", default="float32,bfloat16", metavar="A,B",
        help=f"dtypes of the keys in rank_k, from {','.join(DTYPES)} (default: the first two); collect's models are "
        "float32, on a GPU bfloat16, and factor is float64")  # fmt: skip
    add("--sizes", metavar="D,D", help="widths d of rank_k and factor (default: by device)")
    add("--rows", metavar="N", help="keys n of one update (default: 4096, on a GPU 65536)")
    add("--threads", metavar="T", help="CPU threads (default: torch's)")
    add("--kernels", metavar="A,B", help="only these of ours (see python -m fastcov)")
    add("--load", metavar="MODULE:FUNCTION",
        help="the model for collect: the function returns (model, module paths, documents of token ids)")  # fmt: skip
    add("--multiplier", type=float, default=10.0, help="keys a layer over d_k (default: 10)")
    add("--seconds", type=float, default=12.0, help="for the rounds of one case (default: 12)")
    add("--json", type=Path, metavar="FILE", help="write the run, case by case")
    add("--quick", action="store_true", help="small sizes and few rounds: a trial, no measurement")
    return parser


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def _one_of(option: str, values: Sequence[str], choices: Iterable[str]) -> None:
    for value in values:
        if value not in choices:
            raise BadInput(f"There is no {option} {value!r}; choose from {', '.join(choices)}.")


def _whole(option: str, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise BadInput(f"{option} takes whole numbers above 0 but got {text!r}; write 1536,3072.")
    return value


def _provider(name: str) -> Callable[[], Any]:
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise BadInput(f"--load takes MODULE:FUNCTION but got {name!r}; see --help.")
    try:
        found: Callable[[], Any] = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise BadInput(
            f"--load {name} cannot be imported ({error}); name a module on the path, for example "
            "benchmarks.smollm2:load from the folder of the repository."
        ) from error
    if not callable(found):
        raise BadInput(f"--load {name} is no function; name one that returns the model.")
    return found


def _check_memory(given: argparse.Namespace) -> None:
    """Refuse sizes whose matrices alone are more than the memory that is free."""
    free = free_memory(given.device)
    wide, factored = max(given.rank_k_sizes), max(given.factor_sizes)
    needs = {"rank_k": (wide, 40 * wide**2 + 14 * given.rows * wide), "factor": (factored, 56 * factored**2)}
    for suite, (d, size) in needs.items():
        if suite in given.suites and size > free:
            raise BadInput(
                f"The suite {suite} at d = {d} needs {size / 2**30:.0f} GiB and "
                f"{free / 2**30:.0f} are free; pass smaller --sizes or --rows."
            )


if __name__ == "__main__":
    with until_reader_goes():
        sys.exit(main())
