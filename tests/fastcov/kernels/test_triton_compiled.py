"""The Triton kernel compiled ahead, without a GPU, as the dispatcher would launch it there."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from fastcov.kernels import triton as kernel

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if kernel.interpreting():
    pytest.skip("TRITON_INTERPRET is set, so nothing is compiled", allow_module_level=True)

PROCESSORS = {80: 108, 90: 132}  # A100, H100
SHARED = {80: 99 << 10, 90: 227 << 10}  # bytes; 8.6 and 8.9 have less than 8.0 and run its code
KINDS = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "bf16"}
WIDE, NARROW, RAGGED = 6400, 768, 301  # widths d
N = 192


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.getbasetemp() / "triton"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))


def launched(monkeypatch, capability, dtype, kept, d, config=None):
    """What the dispatcher hands to Triton on a device of that capability: arguments by name."""
    from fastcov.kernels import triton_code

    seen = []

    def launcher(grid):
        return lambda *arguments, **named: seen.append((grid, arguments, named))

    recorder = type("Recorder", (), {"__getitem__": lambda self, grid: launcher(grid)})()
    device = (divmod(capability, 10), PROCESSORS[capability])
    with monkeypatch.context() as patch:
        patch.setattr(triton_code, "rank_k", recorder)
        patch.setattr(kernel, "_device", lambda index: device)
        patch.setattr(torch.cuda, "device", lambda device: nullcontext())
        if config is not None:
            patch.setattr(kernel, "choose", lambda *arguments: config)
        X = torch.empty(N, d, dtype=dtype)
        C = torch.empty(d, d)  # address space: nothing is written
        mask = torch.ones(N, dtype=torch.bool) if kept == "mask" else None
        kernel.update(C, X, mask, 1.0)
    ((grid, arguments, named),) = seen
    return grid, dict(zip(triton_code.rank_k.arg_names, arguments, strict=False)), named


TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int64: "i64",
}  # fmt: skip


def compiled(capability, arguments, named):
    """Compile with the specialisations that Triton's launcher makes of these arguments."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fastcov.kernels import triton_code

    signature, constants, divisible = {}, {}, []
    for place, (name, value) in enumerate(arguments.items()):
        if isinstance(value, triton_code.TensorDescriptor):
            signature[name] = f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
        elif isinstance(value, torch.Tensor):
            signature[name] = f"*{TYPES[value.dtype]}"
            divisible += [place] if value.data_ptr() % 16 == 0 else []
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value is None or (value == 1 and name != "n"):
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = "i32" if value < 1 << 31 else "i64"
            divisible += [place] if value % 16 == 0 and name != "n" else []
    options = {name: value for name, value in named.items() if name.startswith("num_")}
    for name in named.keys() - options.keys():
        signature[name], constants[name] = "constexpr", named[name]
    signature = {name: signature[name] for name in triton_code.rank_k.arg_names}
    source = ASTSource(
        triton_code.rank_k,
        signature,
        constexprs=constants,
        attrs={(place,): [["tt.divisibility", 16]] for place in divisible},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(built, folder):
    """Registers of a thread and bytes of its stack and local memory, as ptxas placed them."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    binary = folder / "kernel.cubin"
    binary.write_bytes(built.asm["cubin"])
    command = [str(tools / "cuobjdump"), "-res-usage", str(binary)]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", said.stdout + said.stderr))
    return int(found["REG"]), int(found["STACK"]) + int(found["LOCAL"])


def case(capability, dtype, kept, d):
    """One of the cases below; all but the main ones are marked slow, being seconds each."""
    name = f"sm_{capability}-{str(dtype).removeprefix('torch.')}-{kept}-{d}"
    main = (dtype, d) == (torch.bfloat16, WIDE)
    return pytest.param(capability, dtype, kept, d, id=name, marks=() if main else pytest.mark.slow)


CASES = [
    case(capability, dtype, kept, d)
    for capability in (80, 90)
    for dtype, widths in (
        (torch.bfloat16, (WIDE, NARROW, RAGGED)),
        (torch.float16, (WIDE,)),
        (torch.float32, (WIDE, RAGGED)),
    )
    for d in widths
    for kept in ("all", "mask")
] + [
    case(90, torch.float32, "all", NARROW),
    case(90, torch.float32, "mask", NARROW),
    case(80, torch.bfloat16, "all", 1),  # widths and strides of 1 become constants
    case(90, torch.float32, "mask", 1),
]


@pytest.mark.parametrize(("capability", "dtype", "kept", "d"), CASES)
def test_what_is_launched_uses_matrix_instructions_and_spills_nothing(
    monkeypatch, tmp_path, capability, dtype, kept, d
):
    grid, arguments, named = launched(monkeypatch, capability, dtype, kept, d)
    built = compiled(capability, arguments, named)
    registers, spilled = resources(built, tmp_path)
    ptx, kind = built.asm["ptx"], KINDS[dtype]
    hopper, aligned = capability == 90, d % 16 == 0
    tma = hopper and aligned
    narrow = d != WIDE or (dtype.itemsize == 4 and not tma)
    assert (arguments["tiled"] is not None) == tma
    assert named["TILE"] == (64 if narrow else 128)
    assert spilled == 0

    assert bool(re.search(rf"wgmma\.mma_async\.\S*\.f32\.{kind}\.{kind}", ptx)) == hopper
    assert bool(re.search(rf"\bmma\.sync\.\S*\.f32\.{kind}\.{kind}\.f32", ptx)) != hopper
    assert "tf32" not in ptx
    assert ("cp.async.bulk.tensor" in ptx) == tma
    if aligned:
        # Where pointers are used, keys go to shared memory 16 bytes at a time, without registers.
        assert ("cp.async.cg.shared.global" in ptx) == named["POINTED"]
    if aligned and hopper and dtype.itemsize == 2:
        # Products run on while the next step starts.
        assert re.search(r"wgmma\.wait_group\.sync\.aligned\s+1;", ptx)
    # A select would read the chain while the product still writes it, see whole_blocks.
    assert not re.search(r"arith\.select [^\n]*tensor<\d+x\d+xf32", built.asm["ttgir"])

    # The programs that are meant to run on one multiprocessor fit on it together.
    programs = min(-(-grid[0] // PROCESSORS[capability]), 2)
    assert built.metadata.shared * programs <= SHARED[capability]
    assert registers * 32 * named["num_warps"] * programs <= 65536
    tiles = -(-d // named["TILE"])
    assert grid[0] <= tiles * (tiles + 1) // 2


def test_a_config_that_spills_is_seen(monkeypatch, tmp_path):
    # What the test above asserts is worth as much as its eyesight.
    greedy = kernel.Config(tile=128, depth=32, warps=8, stages=3, programs=1)
    _, arguments, named = launched(monkeypatch, 80, torch.float32, "all", WIDE, greedy)
    _, spilled = resources(compiled(80, arguments, named), tmp_path)
    assert spilled > 0


@pytest.mark.parametrize(
    ("capability", "kept", "dtype", "d", "tile", "depth"),
    [
        ((9, 0), "all", torch.bfloat16, 4096, 128, 64),  # 528 wide tiles for 132 processors
        ((9, 0), "mask", torch.bfloat16, 3968, 64, 64),  # 496 are too few
        ((9, 0), "all", torch.float32, 16384, 128, 16),
        ((9, 0), "all", torch.bfloat16, 16001, 64, 16),  # rows start anywhere
        ((8, 0), "all", torch.bfloat16, 4096, 128, 32),
        ((8, 6), "mask", torch.bfloat16, 4096, 128, 16),
        ((10, 0), "all", torch.bfloat16, 16384, 128, 64),
        ((10, 0), "all", torch.float32, 16384, 64, 16),  # pointers to float32 need the room
        ((12, 0), "mask", torch.float32, 4096, 64, 16),
    ],
)
def test_the_choice_of_tiles(capability, kept, dtype, d, tile, depth):
    aligned = d % 16 == 0
    route = kernel._route(capability, aligned, kept == "mask", dtype.itemsize)
    config = kernel.choose(route, aligned, 132, torch.empty(1, d, dtype=dtype))
    assert (config.tile, config.depth) == (tile, depth)
    on_ten = capability[0] == 10 and dtype == torch.bfloat16
    assert (route == "tma") == (aligned and (capability[0] == 9 or on_ten))
