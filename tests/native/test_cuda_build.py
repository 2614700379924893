"""What nvcc makes of csrc/cuda: the instructions that were meant, and no registers in memory."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc" / "cuda"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed"),
    pytest.mark.skipif(not SOURCES.is_dir(), reason="the CUDA sources are not there"),
]


def built(source, target, folder):
    """The cubin of a file for one target, and what ptxas said about it."""
    cubin = folder / f"{source}-{target}.cubin"
    arch = f"arch=compute_{target},code=sm_{target}"
    command = ["nvcc", "-std=c++17", "-O3", "-Xptxas", "-v", "-gencode", arch]
    ran = subprocess.run([*command, "-cubin", SOURCES / source, "-o", cubin], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return cubin, ran.stdout + ran.stderr


def instructions(cubin):
    """The disassembly, or None where there is no disassembler; triton brings one."""
    tool = shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    if tool is None and triton is not None and triton.origin is not None:
        tool = shutil.which("cuobjdump", path=Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    if tool is None:
        return None
    return subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    "source, target, kernels, wanted",
    [
        ("wgmma.cu", "90a", 2, [r"HGMMA\.64x192x16\.F32", r"UTMALDG\.2D\.MULTICAST", "USETMAXREG"]),
        ("mma.cu", "90a", 3, [r"HMMA\.16816\.F32", r"HMMA\.1688\.F32\.TF32", "LDGSTS", "LDSM"]),
        ("mma.cu", "80", 3, [r"HMMA\.16816\.F32", r"HMMA\.1688\.F32\.TF32", "LDGSTS", "LDSM"]),
    ],
)
def test_kernels_use_their_instructions_and_spill_nothing(source, target, kernels, wanted, tmp_path):
    cubin, report = built(source, target, tmp_path)
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) ", report)
    assert frames == [("0", "0", "0")] * kernels
    # ptxas names what it could not do as asked: setmaxnreg ignored, wgmma made to wait.
    assert not re.search(r"warning|C75\d\d|Potential Performance", report), report
    code = instructions(cubin)
    if code is None:
        pytest.skip("there is no cuobjdump (triton brings one); the report of ptxas was checked")
    for instruction in wanted:
        assert re.search(instruction, code), instruction
    assert not re.search(r"\b(LDL|STL)\b", code)


def test_the_loop_of_wgmma_waits_for_no_fence_of_the_whole_gpu(tmp_path):
    cubin, _ = built("wgmma.cu", "90a", tmp_path)
    code = instructions(cubin)
    if code is None:
        pytest.skip("there is no cuobjdump (triton brings one)")
    for kernel in code.split("Function :")[1:]:
        loop = kernel[kernel.index("HGMMA") : kernel.rindex("WARPGROUP.DEPBAR")]
        assert loop.count("HGMMA") == 4
        assert "WARPGROUP.DEPBAR.LE gsb0, 0x1" in loop
        assert "MEMBAR" not in loop and "CCTL" not in loop
