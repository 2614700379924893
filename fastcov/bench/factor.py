"""The suite factor: factorise once and edit many times, against a fresh float64 LU per batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastcov import closed_form
from fastcov.bench import released
from fastcov.bench.memory import peak_beyond
from fastcov.bench.peak import gemm_probe
from fastcov.bench.schema import Row
from fastcov.bench.settings import Settings
from fastcov.bench.timing import Case, Contender, Verdict, measure
from fastcov.linalg import factorize

FACTOR_GATE = 1e-12  # of L L^T against A
SOLVE_GATE = 1e-8  # of a solution or an edit
_SMALL = 32 << 20  # bytes; malloc takes what is larger from the system, and gives it back


@dataclass(frozen=True)
class Problem:
    """A matrix and the edits to be made with it.

    Attributes:
        A: weight * C + ridge * I, shape (d, d), float64.
        batches: K (d, B) and R (d // 4, B) of each batch.
    """

    A: Tensor
    batches: list[tuple[Tensor, Tensor]]


def problem(d: int, device: torch.device, *, count: int = 16, size: int = 64) -> Problem:
    """A matrix as moments of keys give it, with eigenvalues from 1 down to about 1e-4.

    Args:
        d: Width of the keys; a quarter of it is the width of the residuals.
        device: Where.
        count: Batches.
        size: Edits in each.
    """
    generator = torch.Generator(device=device).manual_seed(d)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.float64)

    scale = torch.logspace(0, -2, d, device=device, dtype=torch.float64)  # (d,)
    A = torch.zeros(d, d, device=device, dtype=torch.float64)
    for _ in range(4):
        keys = normal(d, d) * scale
        A.addmm_(keys.mT, keys, alpha=1 / (4 * d))
    # Symmetric to the last bit and exact in float32, as a moment that is summed there is.
    A = A.float().tril_()
    A += A.tril(-1).mT
    batches = [(normal(d, size) * scale[:, None], normal(max(1, d // 4), size)) for _ in range(count)]
    return Problem(A.double(), batches)


Measured = tuple[Case, list[Contender]]


def cases(settings: Settings) -> Iterator[Measured]:
    """Three for each width: factorising, solving, and both in sixteen batches of edits."""
    count, size = (4, 16) if settings.quick else (16, 64)
    for d in settings.factor_sizes:
        given = problem(d, settings.device, count=count, size=size)
        for make in (factorising, solving, editing):
            yield make(settings, given)


def run(settings: Settings) -> Iterator[list[Row]]:
    """The rows of each case, with the peak memory of a call."""
    for case, contenders in cases(settings):
        rows = measure(case, contenders, settings.effort)
        yield [with_memory(row, one, case) for row, one in zip(rows, contenders, strict=True)]


def _case(settings: Settings, given: Problem, name: str, n: int, flops: float, base: str) -> Case:
    d = given.A.shape[0]
    return Case(
        suite="factor",
        name=f"{name}, float64, d {d}",
        device=settings.device,
        dtype="float64",
        n=n,
        d=d,
        flops=lambda: flops,
        baseline=base,
        probes={},
        fallback=gemm_probe(settings.device, torch.float64, quick=settings.quick),
    )


def factorising(settings: Settings, given: Problem) -> Measured:
    """``A = L L^T`` alone, in place for ours: each call gets a fresh copy, untimed."""
    A, d = given.A, given.A.shape[0]
    work = A.clone()

    def residual(L: Tensor) -> Verdict:
        wrong = (L @ L.mT).sub_(A)
        return _verdict(float(wrong.norm() / A.norm()), FACTOR_GATE)

    def ours() -> Tensor:
        return factorize(work, in_place=True).lower

    def library() -> Tensor:
        L: Tensor = torch.linalg.cholesky(work)
        return L

    def copy() -> None:
        work.copy_(A)

    def checked(call: Callable[[], Tensor]) -> Callable[[], Verdict]:
        def check() -> Verdict:
            copy()
            return residual(call().clone().tril_())

        return check

    contenders = [
        Contender("fastcov factorize", "ours", checked(ours), ours, copy),
        Contender("torch.linalg.cholesky", "library", checked(library), library, copy),
    ]
    case = _case(settings, given, "A = L L^T", d, d**3 / 3, "torch.linalg.cholesky")
    return case, contenders


def solving(settings: Settings, given: Problem) -> Measured:
    """``A^-1 K`` for one batch, the factor being there."""
    A, (K, _) = given.A, given.batches[0]
    d, B = K.shape
    factor = factorize(A)
    L = factor.L

    def checked(call: Callable[[], Tensor]) -> Callable[[], Verdict]:
        return lambda: _verdict(float((A @ call() - K).norm() / K.norm()), SOLVE_GATE)

    def ours() -> Tensor:
        return factor.solve(K)

    def library() -> Tensor:
        return torch.cholesky_solve(K, L)

    contenders = [
        Contender("fastcov solve", "ours", checked(ours), ours),
        Contender("torch.cholesky_solve", "library", checked(library), library),
    ]
    case = _case(settings, given, f"A^-1 K, {B} columns", B, 2.0 * d * d * B, "torch.cholesky_solve")
    return case, contenders


def editing(settings: Settings, given: Problem) -> Measured:
    """Factor and all batches, each giving its dense update (d // 4, d)."""
    A, batches = given.A, given.batches
    d, B = batches[0][0].shape
    out = batches[0][1].shape[0]
    name = "fresh LU per batch"

    def ours() -> list[Tensor]:
        factor = factorize(A)
        return [closed_form.memit(factor, K, R).dense() for K, R in batches]

    def theirs() -> list[Tensor]:
        return released.memit(A, batches)

    # Each update is put back into its own equation: (A + K K^T) Delta^T = K R^T.
    def residual(updates: list[Tensor]) -> float:
        worst = 0.0
        for (K, R), update in zip(batches, updates, strict=True):
            wanted = K @ R.mT  # (d, d // 4)
            found = A @ update.mT + K @ (K.mT @ update.mT)
            worst = max(worst, float((found - wanted).norm() / wanted.norm()))
        return worst

    literal = theirs()

    def check(call: Callable[[], list[Tensor]]) -> Verdict:
        updates = call()
        same = max(float((mine - other).norm() / other.norm()) for mine, other in zip(updates, literal, strict=True))
        return _verdict(max(same, residual(updates)), SOLVE_GATE)

    contenders = [
        Contender("fastcov factor once", "ours", lambda: check(ours), ours),
        Contender(name, "released", lambda: _verdict(residual(theirs()), SOLVE_GATE), theirs),
    ]
    flops = d**3 / 3 + len(batches) * (2.0 * d * d * B + 2.0 * d * B * (B + out))
    case = _case(
        settings, given, f"factor + {len(batches)} batches of {B} edits", B * len(batches), flops,
        name,
    )  # fmt: skip
    return case, contenders


def _verdict(error: float, allowed: float) -> Verdict:
    passes = error <= allowed  # NaN does not
    return Verdict(error, failure=None if passes else f"relative error {error:.2g} is above {allowed:.0e}")


def with_memory(row: Row, contender: Contender, case: Case) -> Row:
    """Add the peak memory of a call of its own, outside of the times.

    Small matrices on a CPU are not measured: they come from memory that the process has already.
    """
    matrix = case.d * case.d * 8
    small = case.device.type == "cpu" and matrix < _SMALL
    if row.status != "ok" or contender.run is None or small:
        return row
    if contender.prepare is not None:
        contender.prepare()
    peak = peak_beyond(contender.run, case.device)
    return row if peak is None else replace(row, memory=peak / matrix)
