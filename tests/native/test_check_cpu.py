"""The CPU kernel without Python: the program that is there for emulators is built and run."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["-O2", "-std=c++17", "-fopenmp", "-ffp-contract=fast", "-Wno-psabi", "-Icsrc"]
AVX512 = ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
# As in CMakeLists.txt.
OWN = {
    "portable": [],
    "avx2": AVX512[:3],
    "avx512f": AVX512,
    "avx512_bf16": [*AVX512, "-mavx512bf16"],
    "amx_bf16": [*AVX512, "-mamx-tile", "-mamx-bf16"],
}


def built(folder, flags, defined=()):
    """The program, with each variant compiled by its flags."""
    if platform.machine() != "x86_64" or not shutil.which("g++"):
        pytest.skip("no g++ for x86-64")
    objects = []
    for name in ("dispatch", "workspace", *flags):
        objects.append(str(folder / f"{name}.o"))
        source = f"csrc/cpu/{name}.cpp"
        command = ["g++", *FLAGS, "-DFASTCOV_X86", *defined, *flags.get(name, []), "-c", source]
        subprocess.run([*command, "-o", objects[-1]], cwd=ROOT, check=True)
    program = folder / "check_cpu"
    command = ["g++", *FLAGS, "tests/native/check_cpu.cpp", *objects, "-o", str(program)]
    subprocess.run(command, cwd=ROOT, check=True)
    return program


def knows(*flags):
    command = ["g++", *flags, "-x", "c++", "-fsyntax-only", "/dev/null"]
    return not shutil.which("g++") or subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.slow
def test_every_variant_that_can_run_is_right(tmp_path):
    flags, names, defined = (dict(OWN), [name for name in OWN if name != "portable"], ["-DFASTCOV_AMX"])
    if not knows(*OWN["amx_bf16"]):
        defined = []
        names.remove("amx_bf16")
        del flags["amx_bf16"]
    program = built(tmp_path, flags, defined)
    done = subprocess.run([program, *names], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == names[::-1]
    assert all(line.endswith((": right", "cannot run here")) for line in lines)


@pytest.mark.slow
def test_tiles_of_amx_are_right_on_any_processor(tmp_path):
    # Compiled without the instructions, the registers are arrays, and what they do is done as AMX
    # does it; all else is the same source.
    flags = OWN | {"amx_bf16": []}
    program = built(tmp_path, flags, ["-DFASTCOV_AMX", "-DFASTCOV_EMULATE_AMX"])
    done = subprocess.run([program, "amx_bf16"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert done.stdout.startswith("amx_bf16") and done.stdout.endswith(": right\n")


def test_prefetches_are_compiled():
    # GCC takes a function that only prefetches for one without effect and drops its calls, unless it is inlined first:
    # the keys, C, and the strips of the next product were fetched in the source and nowhere else.
    if platform.machine() != "x86_64" or not shutil.which("g++"):
        pytest.skip("no g++ for x86-64")
    command = ["g++", *FLAGS, "-S", "-o", "-", "csrc/cpu/amx_bf16.cpp"]
    code = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    hints = re.findall(r"prefetch\w+", code)
    # For keys of one, two and three parts each: the keys themselves; two lines of a row of C, and the strips.
    assert hints.count("prefetcht0") >= 3
    assert len(hints) - hints.count("prefetcht0") >= 9
