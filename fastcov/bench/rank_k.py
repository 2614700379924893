"""The suite rank_k: ``C += X^T X``, the lower triangle, by every kernel and every library route."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastcov import ops
from fastcov.bench import libraries
from fastcov.bench.oracle import expected_lower, failure, gate, lower_error, upper_is_untouched
from fastcov.bench.peak import Probe, fma_probe, gemm_probe
from fastcov.bench.schema import Row
from fastcov.bench.settings import Settings
from fastcov.bench.timing import Case, Contender, Verdict, measure

# A library's result beyond the gate is marked and timed all the same, because it is what others
# run; beyond this it is another operation, and the row fails.
_SANE = 1e-2
FOR_TESTS = ("portable",)  # kernels that are slow on purpose: they run only where they are named


def run(settings: Settings) -> Iterator[list[Row]]:
    """The rows of each case: every dtype and width."""
    for dtype in settings.dtypes:
        for d in settings.rank_k_sizes:
            yield measure(*case(settings, dtype, d), settings.effort)


def case(settings: Settings, dtype: torch.dtype, d: int) -> tuple[Case, list[Contender]]:
    """One shape and dtype.

    Args:
        settings: How and where.
        dtype: Of the keys.
        d: Their width.

    Returns:
        The case and its contenders: ours, then the libraries'.
    """
    n, device = settings.rows, settings.device
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    X, start = _keys(n, d, dtype, device), _start(n, d, sums, device)
    expected = expected_lower(start, X)
    C = start.clone()  # every contender adds to this one
    contenders = [*_ours(settings.kernels, C, X, start, expected), *_theirs(settings.threads, C, X, start, expected)]
    word = str(dtype).removeprefix("torch.")
    baseline = next(c.name for c in contenders if c.kind == "library")
    found = Case(
        suite="rank_k",
        name=f"C += X^T X, {word} keys, n {n}, d {d}",
        device=device,
        dtype=word,
        n=n,
        d=d,
        flops=lambda: float(n) * d * (d + 1),
        baseline=baseline,
        probes=_probes(settings, contenders, dtype),
        fallback=gemm_probe(device, dtype, quick=settings.quick),
    )
    return found, contenders


def _keys(n: int, d: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator(device=device).manual_seed(n + d)
    return torch.randn(n, d, generator=generator, device=device).to(dtype)


def _start(n: int, d: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A sum that is not zero, as large as what is added to it, so that a lost C shows."""
    generator = torch.Generator(device=device).manual_seed(d)
    C = torch.randn(d, d, generator=generator, device=device, dtype=dtype).mul_(n**0.5)
    C.diagonal().abs_().add_(n)
    return C


def _ours(names: Sequence[str] | None, C: Tensor, X: Tensor, start: Tensor, expected: Tensor) -> Iterator[Contender]:
    allowed = gate(C.device, C.dtype)
    for name, missing in ops.kernels().items():
        if name not in names if names is not None else name in FOR_TESTS:
            continue
        if missing is not None:
            yield Contender(f"fastcov {name}", "ours", kernel=name, cannot=missing)
            continue

        def check(name: str = name) -> Verdict:
            C.copy_(start)
            ops.rank_k_update(C, X, kernel=name)
            error, bias = lower_error(C, expected)
            wrong = failure(allowed, error, bias)
            if wrong is None and not upper_is_untouched(C, start):
                wrong = "it changed something above the diagonal"
            return Verdict(error, bias, wrong)

        yield Contender(
            f"fastcov {name}",
            "ours",
            check=check,
            run=lambda name=name: ops.rank_k_update(C, X, kernel=name),  # type: ignore[misc]
            kernel=name,
        )


def _theirs(threads: int, C: Tensor, X: Tensor, start: Tensor, expected: Tensor) -> Iterator[Contender]:
    allowed = gate(C.device, C.dtype)
    for route in libraries.routes(C.device, X.dtype, threads):
        if route.cannot is not None:
            yield Contender(route.name, "library", cannot=route.cannot)
            continue

        def check(route: libraries.Route = route) -> Verdict:
            C.copy_(start)
            result = route.update(C, X)
            # torch.addmm with out_dtype returns the sum and leaves C alone.
            error, bias = lower_error(result if isinstance(result, Tensor) else C, expected)
            wrong = None if error <= _SANE else f"relative error {error:.2g}: another operation"
            return Verdict(error, bias, wrong, failure(allowed, error, bias) is not None)

        yield Contender(
            route.name,
            "library",
            check=check,
            run=lambda route=route: route.update(C, X),  # type: ignore[misc]
        )


def _probes(settings: Settings, contenders: Sequence[Contender], dtype: torch.dtype) -> dict[str, Probe]:
    """Each CPU kernel's own FMA loop."""
    named = [(c.name, c.kernel) for c in contenders if c.kernel and c.cannot is None]
    loops = {name: fma_probe(kernel, settings.threads, dtype) for name, kernel in named}
    return {name: probe for name, probe in loops.items() if probe is not None}
