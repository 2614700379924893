"""The CPU kernel without Python: the program that is there for emulators is built and run."""

from __future__ import annotations

import platform
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
}


@pytest.mark.slow
def test_every_variant_that_can_run_is_right(tmp_path):
    if platform.machine() != "x86_64" or not shutil.which("g++"):
        pytest.skip("no g++ for x86-64")
    objects = []
    for name in ("dispatch", "workspace", *OWN):
        objects.append(str(tmp_path / f"{name}.o"))
        source = f"csrc/cpu/{name}.cpp"
        command = ["g++", *FLAGS, "-DFASTCOV_X86", *OWN.get(name, []), "-c", source]
        subprocess.run([*command, "-o", objects[-1]], cwd=ROOT, check=True)
    program = tmp_path / "check_cpu"
    command = ["g++", *FLAGS, "tests/native/check_cpu.cpp", *objects, "-o", str(program)]
    subprocess.run(command, cwd=ROOT, check=True)
    done = subprocess.run(
        [program, "avx2", "avx512f", "avx512_bf16"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["avx512_bf16", "avx512f", "avx2"]
    assert all(line.endswith((": right", "cannot run here")) for line in lines)
