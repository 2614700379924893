"""The hardware and the versions that a measurement is only true for."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fastcov.kernels.cpu import native

# What decides which kernel runs and how fast.
_ISA = (
    "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "bf16", "i8mm",
    "sve",
)  # fmt: skip


@dataclass(frozen=True)
class Machine:
    """Where something was measured."""

    cpu: str
    cores: int  # that the process may use
    isa: tuple[str, ...]  # of the instruction sets that matter here, those that the CPU has
    system: str
    gpu: str | None = None
    driver: str | None = None
    capability: str | None = None  # "9.0"
    gpu_memory_gib: float | None = None


def this_machine(device: torch.device) -> Machine:
    """This machine, with its accelerator where the device is one."""
    cpu, flags = _cpu()
    found = Machine(
        cpu=cpu,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        isa=tuple(name for name in _ISA if name in flags),
        system=f"{platform.system()} {platform.machine()}",
    )
    if device.type != "cuda":
        return found
    properties = torch.cuda.get_device_properties(device)
    return replace(
        found,
        gpu=properties.name,
        driver=_driver(),
        capability=f"{properties.major}.{properties.minor}",
        gpu_memory_gib=round(properties.total_memory / 2**30, 1),
    )


def versions() -> dict[str, str]:
    """Versions of everything that may change a figure; "absent" where it is not installed."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "absent",
        **{name: version(name) for name in ("triton", "numpy", "scipy")},
        "fastmemit": _own(),
        "native": _native(),
    }


def version(distribution: str, missing: str = "absent") -> str:
    """The installed version of a distribution."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return missing


def _own() -> str:
    """The version of the distribution; from its source where it runs without being installed."""
    source = Path(__file__).parents[1] / "pyproject.toml"
    lines = source.read_text(encoding="utf-8").splitlines() if source.is_file() else []
    said = [line.partition("=")[2].strip().strip('"') for line in lines if line.startswith("version = ")]
    return version("fastmemit", *said[:1])


def _native() -> str:
    """What the native extension says about its own build."""
    if (module := native()) is None:
        return "absent"
    build = module.build() if hasattr(module, "build") else {}
    return ", ".join(f"{name} {value}" for name, value in build.items()) or "present"


def _cpu() -> tuple[str, set[str]]:
    name, flags = "", set[str]()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and not name:
                name = value.strip()
            elif key.strip() in ("flags", "Features") and not flags:
                flags = set(value.split())
    return name or platform.processor() or platform.machine(), flags


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split("\n", 1)[0].strip() or None
