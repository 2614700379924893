"""``python -m fastcov``: which kernels can run here, and why the others cannot."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

HELP = """\
Prints the kernels of the rank-k update, which of them run on this machine, why the others do not,
and which one is chosen for each kind of keys. `python -m fastcov.bench` times them.
"""


def main() -> int:
    """Print the kernels."""
    argparse.ArgumentParser(prog="python -m fastcov", description=HELP).parse_args()
    show_kernels(kernels_here())
    return 0


def kernels_here() -> dict[str, Any]:
    """The versions, the kernels with why one cannot run or is not preferred, and which is chosen for which keys."""
    # Not at the top: --help needs no torch.
    import torch

    from fastcov import ops
    from fastcov.kernels.cpu import native, native_missing
    from fastcov.machine import version

    module, over = native(), ops.not_preferred()
    devices = {"cpu": f"{torch.get_num_threads()} threads"}
    if torch.cuda.is_available():
        devices |= {f"cuda:{i}": torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    chosen: dict[str, Any] = {}
    for device, what in devices.items():
        chosen[device] = {"is": what}
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            X = torch.zeros(1, 256, device=device, dtype=dtype)
            chosen[device][str(dtype).removeprefix("torch.")] = ops.chosen(torch.zeros(256, 256, device=device), X)
    return {
        **{name: version(name, "not installed") for name in ("fastmemit", "torch", "triton")},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "native": native_missing() if module is None else module.build(),  # compiler, openmp, cuda, cuda_archs
        "kernels": {
            name: {"runs": why_not is None, "why_not": why_not, "by_name_only": over.get(name)}
            for name, why_not in ops.kernels().items()
        },
        "chosen": chosen,
    }


def show_kernels(found: Mapping[str, Any]) -> None:
    """Print what `kernels_here` found."""
    print(f"fastmemit {found['fastmemit']}, torch {found['torch']}, {found['machine']}")
    print(f"triton {found['triton']}, Python {found['python']}")
    build = found["native"]
    if isinstance(build, str):
        print(f"native module: none, {build}")
    else:
        cuda = f"CUDA {build['cuda']} for {build['cuda_archs']}" if build["cuda"] else "without CUDA"
        openmp = "OpenMP" if build["openmp"] else "one thread (no OpenMP)"
        print(f"native module: {build['compiler']}, {openmp}, {cuda}")
    print("\nkernels, best first")
    for name, kernel in found["kernels"].items():
        runs = "runs" if kernel["by_name_only"] is None else f"by name only: {kernel['by_name_only']}"
        print(f"  {name:<12} {runs if kernel['runs'] else 'no: ' + kernel['why_not']}")
    print("\nchosen")
    for device, kinds in found["chosen"].items():
        print(f"  {device} ({kinds['is']})")
        for dtype, name in kinds.items():
            if dtype != "is":
                print(f"    {dtype:<10} {name}")


@contextmanager
def until_reader_goes() -> Iterator[None]:
    """End quietly where who reads stdout has gone, as ``| head -1`` does."""
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        # What is left in the buffer is written once more when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    with until_reader_goes():
        sys.exit(main())
