"""What the command line asks for, checked before any work is done."""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from fastcov import ops
from fastcov.bench.models import SHAPES
from fastcov.bench.schema import BadInput, Run, load
from fastcov.bench.timing import Effort

SUITES = ("rank_k", "factor", "collect")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
_SIZES = {
    # device: (widths of rank_k, rows, widths of factor, models)
    "cpu": ((1536, 3072, 6144), 4096, (3072,), ("smollm2-135m",)),
    "cuda": ((6400, 11008, 14336, 16384), 65536, (16384,), ("smollm2-135m", "gpt-j", "llama-2-7b")),
    "quick": ((256, 384), 512, (256,), ("tiny",)),
}
_EPILOG = """
examples:
  python -m fastcov.bench                                all suites, the defaults of this machine
  python -m fastcov.bench rank_k --sizes 1536,6144 --dtype float32,bfloat16 --threads 2
  python -m fastcov.bench rank_k factor --json now.json --compare benchmarks/results/2core.json
  python -m fastcov.bench collect --load benchmarks.smollm2:load
  python -m fastcov.bench --quick                        does everything work? (some seconds)

Every result is checked against float64 before it is timed. The exit code is 0, or 1 where a row
failed its check, or 2 where the input makes no sense.
"""


@dataclass(frozen=True)
class Settings:
    """What is measured, and how.

    Attributes:
        suites: In their order.
        device: Where.
        dtypes: Of keys.
        rank_k_sizes: Widths of the suite rank_k.
        factor_sizes: Widths of the suite factor.
        rows: Keys of one update.
        threads: Of the CPU.
        kernels: Names of ours to run, or None for all.
        models: Names of shapes for the suite collect.
        load: Returns (model, modules, documents) of a real model; None where none was named.
        load_name: How it was named.
        multiplier: Keys a layer over the width of the keys.
        batch_tokens: Tokens of one forward pass.
        quick: Whether sizes and rounds are small, to see that everything works.
        effort: How long to measure a case.
        json: Where to write.
        compare: A recorded run.
    """

    suites: tuple[str, ...]
    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    rank_k_sizes: tuple[int, ...]
    factor_sizes: tuple[int, ...]
    rows: int
    threads: int
    kernels: tuple[str, ...] | None
    models: tuple[str, ...]
    load: Callable[[], Any] | None
    load_name: str
    multiplier: float
    batch_tokens: int
    quick: bool
    effort: Effort
    json: Path | None
    compare: Run | None


def parse(arguments: Sequence[str]) -> Settings:
    """Read the command line.

    Raises:
        BadInput: It asks for something that cannot be.
        SystemExit: It asks for help.
    """
    given = _parser().parse_args(arguments)
    for name in given.suites:
        _one_of("suite", name, SUITES)
    device = _device(given.device)
    sizes, rows, factor_sizes, models = _SIZES["quick" if given.quick else device.type]
    named = None if given.sizes is None else tuple(_whole("--sizes", s) for s in _list(given.sizes))
    words = _list(given.dtype)
    for word in words:
        _one_of("--dtype", word, tuple(DTYPES))
    cores = os.cpu_count() or 1
    threads = torch.get_num_threads() if given.threads is None else _whole("--threads", given.threads)
    if threads > cores:
        raise BadInput(f"--threads {threads} is more than the {cores} processors here; use fewer.")
    kernels = None if given.kernels is None else tuple(_list(given.kernels))
    for name in kernels or ():
        _one_of("--kernels", name, tuple(ops.kernels()))
    chosen = models if given.models is None else tuple(_list(given.models))
    for name in chosen:
        _one_of("--models", name, tuple(SHAPES))
    if not 0 < given.multiplier < 1e6:
        raise BadInput(f"--multiplier must be above 0 but is {given.multiplier:g}; 10 is usual.")
    if not 0 < given.seconds <= 3600:
        raise BadInput(f"--seconds must be from 0 to 3600 but is {given.seconds:g}; 12 is usual.")
    settings = Settings(
        suites=tuple(name for name in SUITES if not given.suites or name in given.suites),
        device=device,
        dtypes=tuple(dict.fromkeys(DTYPES[word] for word in words)),
        rank_k_sizes=named or sizes,
        factor_sizes=named or factor_sizes,
        rows=rows if given.rows is None else _whole("--rows", given.rows),
        threads=threads,
        kernels=kernels,
        models=() if given.load else chosen,
        load=None if given.load is None else _provider(given.load),
        load_name=given.load or "",
        multiplier=given.multiplier,
        batch_tokens=16384 if device.type == "cuda" else 4096,
        quick=given.quick,
        effort=Effort(1.0, 3, 5) if given.quick else Effort(seconds=given.seconds),
        json=_target(given.json),
        compare=None if given.compare is None else load(Path(given.compare)),
    )
    _fits(settings)
    return settings


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BadInput(f"{message[:1].upper()}{message[1:].rstrip('.')}; see --help.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m fastcov.bench",
        description="Times symmetric rank-k updates (rank_k), factorising and editing (factor) and "
        "collecting a model's second moments (collect) against what others run.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("suites", nargs="*", metavar="SUITE", help=f"{', '.join(SUITES)} (default: all)")
    add("--device", default="cpu", help="cpu (default) or cuda")
    add("--dtype", default="float32,bfloat16", metavar="A,B",
        help="of the keys in rank_k, from float32,bfloat16,float16,float64 (default: the first "
        "two); collect's models are float32, on a GPU bfloat16, and factor is float64")  # fmt: skip
    add("--sizes", metavar="D,D", help="widths d of rank_k and factor (default: by device)")
    add("--rows", metavar="N", help="keys n of one update (default: 4096, on a GPU 65536)")
    add("--threads", metavar="T", help="CPU threads (default: torch's)")
    add("--kernels", metavar="A,B", help="only these of ours (see python -m fastcov)")
    add("--models", metavar="A,B", help=f"shapes with random weights, from {', '.join(SHAPES)}")
    add("--load", metavar="MODULE:FUNCTION",
        help="a real model for collect: the function returns (model, module paths, documents of "
        "token ids)")  # fmt: skip
    add("--multiplier", type=float, default=10.0, help="keys a layer over d_k (default: 10)")
    add("--seconds", type=float, default=12.0, help="for the rounds of one case (default: 12)")
    add("--json", metavar="FILE", help="write the run, case by case")
    add("--compare", metavar="FILE", help="ratios against a recorded run")
    add("--quick", action="store_true", help="small sizes and few rounds: a trial, no measurement")
    return parser


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def _one_of(option: str, value: str, choices: Sequence[str]) -> None:
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


def _device(name: str) -> torch.device:
    _one_of("--device", name, ("cpu", "cuda"))
    if name == "cuda" and not torch.cuda.is_available():
        raise BadInput(f"There is no CUDA device here that torch {torch.__version__} can use; choose --device cpu.")
    return torch.device(name)


def _target(name: str | None) -> Path | None:
    if name is None:
        return None
    path = Path(name)
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise BadInput(f"--json {name} cannot be written; name a file in a folder that exists.")
    return path


def _provider(name: str) -> Callable[[], Any]:
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise BadInput(f"--load takes MODULE:FUNCTION but got {name!r}; see --help.")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise BadInput(
            f"--load {name} cannot be imported ({error}); name a module on the path, for example "
            "benchmarks.smollm2:load from the folder of the repository."
        ) from error
    if not callable(found):
        raise BadInput(f"--load {name} is no function; name one that returns the model.")
    return found  # type: ignore[no-any-return]


def _fits(settings: Settings) -> None:
    """Refuse sizes whose matrices alone are more than the memory there is."""
    if settings.device.type == "cuda":
        total = torch.cuda.get_device_properties(settings.device).total_memory
    elif hasattr(os, "sysconf"):
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        return
    need = {}
    if "rank_k" in settings.suites:
        d = max(settings.rank_k_sizes)
        need["rank_k"] = (d, 16 * d * d + 6 * settings.rows * d)
    if "factor" in settings.suites:
        d = max(settings.factor_sizes)
        need["factor"] = (d, 32 * d * d)
    for suite, (d, size) in need.items():
        if size > total:
            raise BadInput(
                f"The suite {suite} at d = {d} needs {size / 2**30:.0f} GiB and there are "
                f"{total / 2**30:.0f}; pass smaller --sizes or --rows."
            )
