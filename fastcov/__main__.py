"""``python -m fastcov``: which kernels can run here, and why the others cannot."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager

HELP = """\
Prints the kernels of the rank-k update, which of them run on this machine, why the others do not,
and which one is chosen for each kind of keys. `python -m fastcov.bench` times them.
"""


def main() -> int:
    """Print the kernels."""
    argparse.ArgumentParser(prog="python -m fastcov", description=HELP).parse_args()
    show_kernels()
    return 0


def show_kernels() -> None:
    """Print the versions, the kernels, and which one is chosen for each kind of keys."""
    # Not at the top: --help needs no torch.
    import torch

    from fastcov import ops
    from fastcov.kernels.cpu import native, native_missing
    from fastcov.machine import version

    fastmemit, triton = (version(name, "not installed") for name in ("fastmemit", "triton"))
    print(f"fastmemit {fastmemit}, torch {torch.__version__}, {platform.machine()}")
    print(f"triton {triton}, Python {platform.python_version()}")
    if (module := native()) is None:
        print(f"native module: none, {native_missing()}")
    else:
        build = module.build()  # compiler, openmp, cuda, cuda_archs
        cuda = f"CUDA {build['cuda']} for {build['cuda_archs']}" if build["cuda"] else "without CUDA"
        openmp = "OpenMP" if build["openmp"] else "one thread (no OpenMP)"
        print(f"native module: {build['compiler']}, {openmp}, {cuda}")
    print("\nkernels, best first")
    over = ops.not_preferred()
    for name, reason in ops.kernels().items():
        runs = f"by name only: {over[name]}" if name in over else "runs"
        print(f"  {name:<12} {runs if reason is None else f'no: {reason}'}")
    print("\nchosen")
    devices = {"cpu": f"{torch.get_num_threads()} threads"}
    if torch.cuda.is_available():
        devices |= {f"cuda:{i}": torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    for device, what in devices.items():
        print(f"  {device} ({what})")
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            C = torch.zeros(256, 256, device=device)
            X = torch.zeros(1, 256, device=device, dtype=dtype)
            print(f"    {str(dtype).removeprefix('torch.'):<10} {ops.chosen(C, X)}")


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
