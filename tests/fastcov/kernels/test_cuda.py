"""What surrounds the CUDA kernels: who may run them, what they are told, what their errors say.

The kernels themselves run on the CPU in tests/native/test_cuda_kernels.py, and on a GPU in test_on_device.py and at the
end of this file.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from fastcov.kernels import cpu, cuda


@pytest.fixture(autouse=True)
def _forgotten():
    """What was found out about the machine is found out anew, before and after."""
    cuda._missing.cache_clear()
    cuda._unfit.cache_clear()
    yield
    cuda._missing.cache_clear()
    cuda._unfit.cache_clear()


@pytest.fixture
def machine(monkeypatch):
    """A machine with two GPUs and a native module that writes down how it is called."""
    calls = []
    module = SimpleNamespace(
        calls=calls,
        failing=0,
        cuda_rank_k=lambda **arguments: calls.append(arguments) or module.failing,
        cuda_route=lambda **arguments: calls.append(arguments) or (module.failing or 2),
        cuda_check_device=lambda device: module.failing,
        cuda_error=lambda error: f"cudaErrorNumber{error}, it is broken",
        capabilities=[(9, 0), (8, 0)],
    )
    monkeypatch.setattr(cpu, "native", lambda: module)
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: len(module.capabilities),
        "current_device": lambda: 0,
        "get_device_capability": lambda index: module.capabilities[index],
        "get_device_properties": lambda device: SimpleNamespace(multi_processor_count=132),
        "current_stream": lambda device: SimpleNamespace(cuda_stream=77),
        "device": lambda device: contextlib.nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return module


def on_gpu(*shape, dtype=torch.float32, device="cuda:0"):
    """Stands for a tensor on a GPU, for `why_not`, which looks at nothing else."""
    return SimpleNamespace(shape=shape, dtype=dtype, device=torch.device(device))


def test_without_a_native_module_its_own_reason_is_given(monkeypatch):
    monkeypatch.setattr(cpu, "native", lambda: None)
    monkeypatch.setattr(cpu, "native_missing", lambda: "there was no compiler")
    assert cuda.why_not() == "there was no compiler"


def test_a_native_module_without_cuda_is_named(monkeypatch):
    monkeypatch.setattr(cpu, "native", lambda: SimpleNamespace(cpu_rank_k=None))
    assert cuda.why_not() == "the native module was built without CUDA"


def test_a_machine_without_a_device_is_named(machine, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda.why_not() == "there is no CUDA device"


def test_one_device_that_can_is_enough(machine):
    assert cuda.why_not() is None
    cuda._missing.cache_clear()
    machine.capabilities[:] = [(7, 5), (8, 6)]
    assert cuda.why_not() is None


def test_old_devices_are_named_with_what_they_can(machine):
    machine.capabilities[:] = [(7, 5), (6, 1)]
    reason = "has compute capability 7.5 and 8.0 or higher is needed"
    assert cuda.why_not() == f"cuda:0 {reason}"
    machine.capabilities[:] = [(8, 0), (7, 5)]
    cuda._missing.cache_clear()
    assert cuda.why_not(on_gpu(3, 3), on_gpu(5, 3)) is None
    assert cuda.why_not(on_gpu(3, 3, device="cuda:1"), on_gpu(5, 3, device="cuda:1")) == (f"cuda:1 {reason}")


def test_code_that_does_not_load_is_named_with_the_error_of_cuda(machine):
    machine.failing = 35
    assert cuda.why_not() == ("its code does not load on cuda:0 (cudaErrorNumber35, it is broken)")


def test_tensors_that_it_cannot_take_are_named(machine):
    assert "sum is on cpu" in cuda.why_not(torch.zeros(3, 3), torch.zeros(5, 3))
    assert "keys on cuda:1" in cuda.why_not(on_gpu(3, 3), on_gpu(5, 3, device="cuda:1"))
    keys = on_gpu(5, 3, dtype=torch.float64)
    assert "not torch.float64 and torch.float32" in cuda.why_not(on_gpu(3, 3), keys)
    wide = on_gpu(3, 3, dtype=torch.float64)
    assert "not torch.float32 and torch.float64" in cuda.why_not(wide, on_gpu(5, 3))
    assert "2097152 wide and this one is 2097153" in cuda.why_not(on_gpu(2097153, 2097153), on_gpu(5, 2097153))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert cuda.why_not(on_gpu(3, 3), on_gpu(5, 3, dtype=dtype)) is None


def test_addresses_sizes_and_strides_arrive(machine):
    C = torch.zeros(8, 10)[:, :8]
    X = torch.zeros(20, 16, dtype=torch.bfloat16)[:, ::2]
    mask = torch.ones(40, dtype=torch.int64)[::2]
    cuda.update(C, X, mask, -0.5)
    (called,) = machine.calls
    assert called["mask"] not in (0, mask.data_ptr())  # bytes next to each other
    assert called["turns"] != 0
    assert {name: called[name] for name in called if name not in ("mask", "turns")} == {
        "device": 0,
        "stream": 77,
        "c": C.data_ptr(),
        "c_row_stride": 10,
        "c_col_stride": 1,
        "x": X.data_ptr(),
        "dtype": 3,
        "n": 20,
        "d": 8,
        "x_row_stride": 16,
        "x_col_stride": 2,
        "rows": 0,
        "count": 0,
        "alpha": -0.5,
        "turns_count": 528,
        "route": 0,
    }


def test_no_rows_are_no_launch(machine):
    C, X = torch.zeros(3, 3), torch.ones(5, 3)
    cuda.update(C, X[:0], None, 1.0)
    assert machine.calls == []


def test_an_error_of_cuda_is_raised_with_its_name(machine):
    machine.failing = 98
    with pytest.raises(
        RuntimeError,
        match=r"^The CUDA kernel failed for torch.float32 keys \(5, 3\) on cpu by route 'wgmma': "
        r"cudaErrorNumber98, it is broken; name another kernel\.$",
    ):
        cuda.update(torch.zeros(3, 3), torch.zeros(5, 3), None, 1.0, "wgmma")


def test_the_route_is_asked_for_by_name(machine):
    assert cuda.route(torch.zeros(3, 3), torch.zeros(5, 3)) == "wgmma"
    machine.failing = -35
    with pytest.raises(RuntimeError, match="cudaErrorNumber35, it is broken"):
        cuda.route(torch.zeros(3, 3), torch.zeros(5, 3))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("route", ["mma", "wgmma"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n, d", [(64, 8), (1100, 392), (5000, 1544), (4096, 4096)])
def test_both_kernels_give_the_same_bits_every_time_on_a_device(route, dtype, n, d):
    if cuda.why_not() is not None:
        pytest.skip(str(cuda.why_not()))
    generator = torch.Generator("cuda").manual_seed(n)
    X = torch.randn(n, d, generator=generator, device="cuda").to(dtype)
    mask = torch.rand(n, generator=generator, device="cuda") < 0.9
    X[~mask] = float("nan")
    start = torch.randn(d, d, generator=generator, device="cuda")
    start.masked_fill_(torch.ones_like(start, dtype=torch.bool).triu_(1), float("nan"))
    if route == "wgmma" and cuda.route(start, X) != "wgmma":
        pytest.skip("the device is no Hopper")
    wanted = start.double().tril() + 0.5 * X[mask].double().mT @ X[mask].double()
    below = torch.ones_like(start, dtype=torch.bool).tril_()
    results = []
    for _ in range(3):
        C = start.clone()
        cuda.update(C, X, mask, 0.5, route)
        assert bool(C[~below].isnan().all())
        results.append(C[below])
    error = (results[0].double() - wanted[below]).norm() / wanted[below].norm()
    assert float(error) < 1e-5
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
