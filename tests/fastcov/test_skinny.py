"""Products of few rows: against float64, in both directions, and left to torch where they are not for the kernel."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastcov import hooks as skinny
from fastcov.hooks import SkinnyProducts, evaluation_mode, product, skinny_products
from fastcov.kernels.cpu import SkinnyKernel, native, native_missing, skinny_kernel

pytestmark = pytest.mark.skipif(native_missing() is not None, reason="the native module is not installed")

ROWS = (*range(1, 10), 12, 13, 15, 16, 17, 28, 31, 32, 33, 48, 49, 64)  # around every change of tiles
KERNELS = [
    SkinnyKernel(name, range(1, most + 1), range(1, most + 1))
    for name, most in ([] if native() is None else native().cpu_skinny_most())
]


@pytest.fixture(params=KERNELS, ids=lambda found: found[0])
def kernel(request, monkeypatch):
    """Each kernel of this machine in turn, for matrices of any size and all rows that it can take."""
    monkeypatch.setattr(skinny, "skinny_kernel", lambda: request.param)
    monkeypatch.setattr(skinny, "_SMALLEST", 1)
    return request.param


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(found, x, weight):
    """Whether it is x times weight to the rounding of sums in float32."""
    exact = x.double() @ weight.double()
    size = x.double().abs() @ weight.double().abs()
    return bool(((found - exact).abs() <= 1e-6 * size).all())


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (64, 64), (100, 33), (129, 200), (3, 300), (300, 3)])
def test_every_number_of_rows(kernel, threads, shape):
    n, k = shape
    weight = numbers(n, k)
    for m in (m for m in ROWS if m in kernel.along):
        along, across = numbers(m, k, seed=1), numbers(m, n, seed=2)
        assert close(product(along, weight), along, weight.T), m
        assert close(product(across, weight, across=True), across, weight), m


@pytest.mark.parametrize("m", [2, 7, 14])
def test_long_sums_are_as_close_as_the_librarys(kernel, m):
    weight, x = numbers(20_000, 64), numbers(m, 20_000, seed=1)
    for found, left, right in (
        (product(x, weight, across=True), x, weight),
        (product(x, weight.T.contiguous()), x, weight),
    ):
        exact = left.double() @ right.double()
        assert (found - exact).norm() < 4e-7 * exact.norm()  # 2e-6 and more, if summed one after another


def test_rows_that_lie_apart(kernel):
    wide = numbers(40, 50)
    weight, x = wide[:, 3:35], numbers(6, 64)[:, ::2]
    assert not weight.is_contiguous() and not x.is_contiguous()
    assert close(product(x, weight), x, weight.T)
    y = numbers(6, 80)[:, ::2]
    assert close(product(y, weight, across=True), y, weight)


def test_infinite_and_missing_numbers_stay(kernel):
    x, weight = numbers(3, 40), numbers(9, 40)
    x[1, 4], x[2, 5] = torch.inf, torch.nan
    found = product(x, weight)
    assert found[0].isfinite().all() and not found[1].isfinite().any() and found[2].isnan().all()


def test_more_rows_than_it_takes(kernel):
    most = kernel.along[-1]
    with pytest.raises(RuntimeError, match=f"The variant '{kernel.name}' has no product of {most + 1} rows."):
        product(numbers(most + 1, 8), numbers(4, 8))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 24), (2, 3, 24), (24,)])
def test_linear_and_its_gradient(kernel, shape, bias):
    layer = nn.Linear(24, 40, bias=bias).requires_grad_(False)
    x = numbers(*shape).requires_grad_()
    expected = layer(x)
    (wanted,) = torch.autograd.grad(expected.sin().sum(), x)
    with SkinnyProducts():
        found = layer(x)
        (gradient,) = torch.autograd.grad(found.sin().sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-5)


def test_the_products_of_gpt2(kernel):
    bias, x, weight = numbers(40), numbers(5, 24).requires_grad_(), numbers(24, 40)
    expected = torch.addmm(bias, x, weight)
    (wanted,) = torch.autograd.grad(expected.sin().sum(), x)
    with SkinnyProducts():
        found = torch.addmm(bias, x, weight)
        (gradient,) = torch.autograd.grad(found.sin().sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-5)


@pytest.fixture
def calls(monkeypatch):
    """The shapes of the products that the kernel was given."""
    seen = []

    def watched(x, weight, *, across=False):
        seen.append((tuple(x.shape), tuple(weight.shape)))
        return product(x, weight, across=across)

    monkeypatch.setattr(skinny, "product", watched)
    return seen


def test_what_is_left_to_torch(kernel, calls):
    x, weight = numbers(3, 24), numbers(40, 24)
    linear = nn.functional.linear

    class Own(torch.Tensor):
        pass

    with SkinnyProducts():
        linear(x, weight)
        assert calls == [((3, 24), (40, 24))]
        calls.clear()
        linear(numbers(kernel.along.stop, 24), weight)  # many rows
        linear(x[:0], weight)
        linear(x.bfloat16(), weight.bfloat16())
        linear(x.double(), weight.double())
        linear(x, numbers(24, 40).T)  # columns apart
        linear(x.as_subclass(Own), weight)
        linear(x, weight, bias=numbers(40))  # by name
        with torch.autocast("cpu"):
            assert linear(x, weight).dtype is torch.bfloat16
        trained = weight.clone().requires_grad_()
        linear(x, trained).sum().backward()
        assert trained.grad is not None and not calls
        with torch.no_grad():
            linear(x, trained)
        assert len(calls) == 1
        with pytest.raises(RuntimeError):  # what torch says of shapes that do not match
            linear(x, numbers(40, 23))
    assert len(calls) == 1
    linear(x, weight)
    assert len(calls) == 1  # after it was left


@pytest.mark.parametrize("shape", [(1,), (2, 40), (1, 40)])
def test_a_bias_of_another_shape_is_left_to_torch(kernel, calls, shape):
    x, weight, bias = numbers(2, 24), numbers(40, 24), numbers(*shape)
    with SkinnyProducts():
        torch.testing.assert_close(torch.addmm(bias, x, weight.T.contiguous()), x @ weight.T + bias)
    assert not calls


def test_what_the_caller_has_set_changes_nothing(kernel):
    x, weight = numbers(3, 24), numbers(40, 24)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"), SkinnyProducts():
            found = nn.functional.linear(x, weight)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype is torch.float32 and found.device.type == "cpu"
    assert close(found, x, weight.T)


def test_transforms_of_functions_are_left_to_torch(kernel, calls):
    x, weight = numbers(3, 24), numbers(40, 24)
    with SkinnyProducts():
        rows = torch.func.vmap(lambda row: nn.functional.linear(row, weight))(x)
        slope = torch.func.jacrev(lambda row: nn.functional.linear(row, weight))(x[0])
    torch.testing.assert_close(rows, x @ weight.T)
    torch.testing.assert_close(slope, weight)
    assert not calls


def test_a_matrix_that_was_changed_meanwhile_is_refused_as_torch_does(kernel):
    x, weight = numbers(3, 24).requires_grad_(), numbers(40, 24)
    with SkinnyProducts():
        y = nn.functional.linear(x, weight)
    weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_small_matrices_are_left_to_torch(calls):
    with SkinnyProducts():
        nn.functional.linear(numbers(2, 8), numbers(8, 8))
    assert not calls


def test_it_is_left_when_something_is_raised(kernel, calls):
    with pytest.raises(KeyError), SkinnyProducts():
        raise KeyError
    nn.functional.linear(numbers(2, 8), numbers(8, 8))
    assert not calls


def test_what_an_interrupt_leaves_goes(kernel, calls):
    with SkinnyProducts():
        with pytest.raises(KeyboardInterrupt), evaluation_mode(nn.Linear(8, 8)):
            SkinnyProducts().__enter__()
            raise KeyboardInterrupt
        assert torch._C._len_torch_function_stack() == 1  # the outer one stays
    nn.functional.linear(numbers(2, 8), numbers(8, 8))
    assert not calls and torch._C._len_torch_function_stack() == 0


def test_only_for_models_that_can_use_it(kernel, monkeypatch):
    assert isinstance(skinny_products(nn.Linear(8, 8)), SkinnyProducts)
    assert not isinstance(skinny_products(nn.Linear(8, 8).bfloat16()), SkinnyProducts)
    monkeypatch.setattr(skinny, "skinny_kernel", lambda: None)
    assert not isinstance(skinny_products(nn.Linear(8, 8)), SkinnyProducts)


@pytest.mark.parametrize("intel", [False, True])
def test_what_the_library_multiplies_faster_is_left_to_it(monkeypatch, intel):
    module = SimpleNamespace(cpu_skinny_most=lambda: [("avx512f", 64), ("portable", 64)], cpu_is_intel=lambda: intel)
    monkeypatch.setattr("fastcov.kernels.cpu.native", lambda: module)
    skinny_kernel.cache_clear()
    try:
        found = skinny_kernel()
    finally:
        skinny_kernel.cache_clear()
    assert (3 in found.along, 64 in found.along, 16 in found.across, 65 in found.along) == (True, True, True, False)
    assert (1 in found.along, 1 in found.across, 17 in found.across) == (not intel,) * 3


@pytest.mark.parametrize("rows", [4, 5])
def test_a_gradient_of_more_rows_than_the_kernel_is_for_is_the_librarys(kernel, monkeypatch, rows):
    monkeypatch.setattr(skinny, "skinny_kernel", lambda: kernel._replace(across=range(1, 5)))
    calls = []
    monkeypatch.setattr(
        skinny, "product", lambda *args, across=False: calls.append(across) or product(*args, across=across)
    )
    x, weight = numbers(rows, 24).requires_grad_(), numbers(40, 24, seed=1)
    with SkinnyProducts():
        nn.functional.linear(x, weight).sum().backward()
    assert calls == [False, True][: 2 if rows == 4 else 1]
    assert torch.allclose(x.grad, weight.sum(0).expand(rows, -1), rtol=1e-5, atol=1e-5)


def test_without_the_native_module(monkeypatch):
    monkeypatch.setattr("fastcov.kernels.cpu.native", lambda: None)
    skinny_kernel.cache_clear()
    try:
        assert skinny_kernel() is None
    finally:
        skinny_kernel.cache_clear()
