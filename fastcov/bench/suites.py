"""The three suites: each gives the rows of one case after another.

rank_k: ``C += X^T X``, the lower triangle, by every kernel and by what plain torch offers.
factor: factorise once and edit many times, against a fresh float64 LU per batch.
collect: second moments of a model's layers in one pass, against a pass for each.

The released procedures are written anew from their description. Their loading and tokenising, which they repeat for
each layer, are left out.
"""

from __future__ import annotations

import contextlib
import functools
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import fastcov
from fastcov import closed_form, ops
from fastcov.bench import measure as m
from fastcov.bench.measure import Case, Contender, Probe, Verdict, measure
from fastcov.bench.report import Row
from fastcov.errors import BadInput
from fastcov.kernels.cpu import why_no_bfloat
from fastcov.linalg import factorize
from fastcov.throughput import Throughput

Runs = dict[str, Callable[[], Any]]  # by who does it
Measured = tuple[Case, list[Contender]]
Update = Callable[[Tensor, Tensor], object]  # adds X^T X to the lower triangle of C (d, d) for X (n, d)
Routes = dict[str, "Update | str"]  # by name; the text says why one is not to be had


@dataclass(frozen=True)
class Extras:
    """What a caller adds to rank_k: benchmarks/full.py has BLAS, oneDNN, and each kernel's own peak."""

    program: str = "-m fastcov.bench"
    routes: Callable[[torch.device, torch.dtype, int], Routes] = lambda device, dtype, threads: {}
    probe: Callable[[str, torch.dtype, int], Probe | None] = lambda kernel, dtype, threads: None


def word(dtype: torch.dtype) -> str:
    """``bfloat16`` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def _verdict(error: float, allowed: float, bias: float | None = None) -> Verdict:
    passes = error <= allowed  # NaN does not
    return Verdict(error, bias, None if passes else f"relative error {error:.2g} is above {allowed:.0e}")


# -- rank_k ----------------------------------------------------------------------------------------

# A library's result beyond the gate is marked and timed all the same, because it is what others
# run; beyond this it is another operation, and the row fails.
_SANE = 1e-2
FOR_TESTS = ("portable",)  # kernels that are slow on purpose: they run only where they are named
_BLOCK = 768


def rank_k(given: Namespace) -> Iterator[list[Row]]:
    """Every dtype and width."""
    for dtype in given.dtypes:
        for d in given.rank_k_sizes:
            yield measure(*rank_k_case(given, dtype, d), given.effort)


def rank_k_case(given: Namespace, dtype: torch.dtype, d: int) -> Measured:
    """One dtype of keys and their width: the case and its contenders, ours, then the libraries'."""
    n, device = given.rows, given.device
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    draw = torch.Generator(device=device).manual_seed(n + d)
    X = torch.randn(n, d, generator=draw, device=device).to(dtype)
    # A sum that is not zero, as large as what is added to it, so that a lost C shows.
    start = torch.randn(d, d, generator=draw, device=device, dtype=sums).mul_(n**0.5)
    start.diagonal().abs_().add_(n)
    expected = m.expected_lower(start, X)
    C = start.clone()  # every contender adds to this one

    def check(update: Update, ours: bool) -> Verdict:
        C.copy_(start)
        result = update(C, X)
        # torch.addmm with out_dtype returns the sum and leaves C alone.
        error, bias = m.lower_error(result if isinstance(result, Tensor) else C, expected)
        wrong = m.failure(device, sums, error, bias)
        if not ours:
            sane = error <= _SANE
            return Verdict(error, bias, None if sane else f"relative error {error:.2g}: another operation", bool(wrong))
        if wrong is None and not m.upper_is_untouched(C, start):
            wrong = "it changed something above the diagonal"
        return Verdict(error, bias, wrong)

    def contender(name: str, update: Update, kind: str, **more: Any) -> Contender:
        return Contender(name, kind, lambda: check(update, kind == "ours"), lambda: update(C, X), **more)

    contenders = []
    for name, missing in ops.kernels().items():
        if name in FOR_TESTS if given.kernels is None else name not in given.kernels:
            continue
        update = functools.partial(ops.rank_k_update, kernel=name)
        probe = given.extras.probe(name, dtype, given.threads) if missing is None else None
        contenders.append(contender(f"fastcov {name}", update, "ours", kernel=name, cannot=missing, probe=probe))
    routes = {**torch_routes(device, dtype), **given.extras.routes(device, dtype, given.threads)}
    for name, route in routes.items():
        missing = route if isinstance(route, str) else None
        contenders.append(contender(name, route, "library", cannot=missing))
    title = f"C += X^T X, {word(dtype)} keys, n {n}, d {d}"
    flops = float(n) * d * (d + 1)
    probe = m.peak_probe(dtype, device)
    return Case("rank_k", title, word(dtype), n, d, device, lambda: flops, probe), contenders


def torch_routes(device: torch.device, dtype: torch.dtype) -> Routes:
    """What plain torch offers for keys of a dtype on a device; the first is the baseline.

    On a CPU 16-bit keys are converted once a call, inside of the time: that is what using these routes costs.
    """
    if device.type == "cuda" and dtype not in (torch.float32, torch.float64):
        # Not with out=: that form gives wrong results.
        return {"torch.addmm out_dtype": lambda C, X: torch.addmm(C, X.mT, X, out_dtype=torch.float32)}
    addmm: Update = lambda C, X: C.addmm_(X.to(C.dtype).mT, X.to(C.dtype))  # noqa: E731
    return {"torch.addmm": addmm, f"torch block rows {_BLOCK}": _block_rows}


def _block_rows(C: Tensor, X: Tensor) -> None:
    keys = X.to(C.dtype)
    for low in range(0, C.shape[0], _BLOCK):
        high = min(low + _BLOCK, C.shape[0])
        C[low:high, :high].addmm_(keys[:, low:high].mT, keys[:, :high])


# -- factor ----------------------------------------------------------------------------------------

FACTOR_GATE = 1e-12  # of L L^T against A
SOLVE_GATE = 1e-8  # of a solution or an edit
_SMALL = 32 << 20  # bytes; malloc takes what is larger from the system, and gives it back


Edits = list[tuple[Tensor, Tensor]]  # K (d, B) and R (d // 4, B) of each batch


def problem(d: int, device: torch.device, *, count: int = 16, size: int = 64) -> tuple[Tensor, Edits]:
    """A matrix (d, d) as moments of keys give it, its eigenvalues from 1 down to about 1e-4, and batches of edits."""
    draw = torch.Generator(device=device).manual_seed(d)
    normal = functools.partial(torch.randn, generator=draw, device=device, dtype=torch.float64)
    scale = torch.logspace(0, -2, d, device=device, dtype=torch.float64)  # (d,)
    A = torch.zeros(d, d, device=device, dtype=torch.float64)
    for _ in range(4):
        keys = normal(d, d) * scale
        A.addmm_(keys.mT, keys, alpha=1 / (4 * d))
    # Symmetric to the last bit and exact in float32, as a moment that is summed there is.
    A = A.float().tril_()
    A += A.tril(-1).mT
    return A.double(), [(normal(d, size) * scale[:, None], normal(max(1, d // 4), size)) for _ in range(count)]


def factor(given: Namespace) -> Iterator[list[Row]]:
    """Three cases for each width, with the peak memory of a call."""
    count, size = (4, 16) if given.quick else (16, 64)
    for d in given.factor_sizes:
        for case, contenders in factor_cases(given, *problem(d, given.device, count=count, size=size)):
            rows = measure(case, contenders, given.effort)
            yield [with_memory(row, one, case) for row, one in zip(rows, contenders, strict=True)]


def factor_cases(given: Namespace, A: Tensor, batches: Edits) -> Iterator[Measured]:
    """Factorising and solving alone, then factor and all batches of edits, each giving its dense update (d // 4, d)."""
    (K, R), d = batches[0], A.shape[0]
    B = K.shape[1]
    work, factored, literal = A.clone(), factorize(A), released_memit(A, batches)
    L = factored.L

    def case(
        name: str, n: int, flops: float, runs: Runs, error: Callable[[Any], Any], gate: float, copied: bool = False
    ) -> Measured:
        def prepare() -> object:  # untimed
            return work.copy_(A) if copied else None

        def contender(who: str, run: Callable[[], Any]) -> Contender:
            def check() -> Verdict:
                prepare()
                return _verdict(float(error(run())), gate)

            kind = "ours" if who.startswith("fastcov") else "library" if who.startswith("torch") else "released"
            return Contender(who, kind, check, run, prepare)

        about = "factor", f"{name}, float64, d {d}", "float64", n, d, given.device
        found = Case(*about, lambda: flops, m.peak_probe(A.dtype, A.device))
        return found, [contender(who, run) for who, run in runs.items()]

    def residual(lower: Tensor) -> Any:
        L = lower.tril()
        return (L @ L.mT).sub_(A).norm() / A.norm()

    def edits() -> list[Tensor]:
        once = factorize(A)
        return [closed_form.memit(once, K, R).dense() for K, R in batches]

    def worst(updates: list[Tensor]) -> Tensor:
        errors = []
        for (K, R), update, other in zip(batches, updates, literal, strict=True):
            # In its own equation, (A + K K^T) Delta^T = K R^T, and against the released update.
            wanted = K @ R.mT  # (d, d // 4)
            found = A @ update.mT + K @ (K.mT @ update.mT)
            errors += [(found - wanted).norm() / wanted.norm(), (update - other).norm() / other.norm()]
        return torch.stack(errors).max()

    runs: Runs = {  # in place for ours, so each call gets a fresh copy
        "fastcov factorize": lambda: factorize(work, in_place=True).lower,
        "torch.linalg.cholesky": lambda: torch.linalg.cholesky(work),
    }
    yield case("A = L L^T", d, d**3 / 3, runs, residual, FACTOR_GATE, copied=True)
    runs = {"fastcov solve": lambda: factored.solve(K), "torch.cholesky_solve": lambda: torch.cholesky_solve(K, L)}
    yield case(f"A^-1 K, {B} columns", B, 2.0 * d * d * B, runs, lambda X: (A @ X - K).norm() / K.norm(), SOLVE_GATE)
    runs = {"fastcov factor once": edits, "fresh LU per batch": lambda: released_memit(A, batches)}
    flops = d**3 / 3 + len(batches) * (2.0 * d * d * B + 2.0 * d * B * (B + R.shape[0]))
    yield case(f"factor + {len(batches)} batches of {B} edits", B * len(batches), flops, runs, worst, SOLVE_GATE)


def released_memit(A: Tensor, batches: Edits) -> list[Tensor]:
    """``R K^T (A + K K^T)^-1`` for each batch of K (d_k, B) and R (d, B), by a fresh LU of A (d_k, d_k) in float64."""
    return [R @ torch.linalg.solve(A + K @ K.mT, K).mT for K, R in batches]


def with_memory(row: Row, contender: Contender, case: Case) -> Row:
    """Add the peak memory of a call of its own, outside of the times.

    Small matrices on a CPU are not measured: they come from memory that the process has already.
    """
    matrix = case.d * case.d * 8
    if row.status != "ok" or (case.device.type == "cpu" and matrix < _SMALL):
        return row
    contender.prepare()
    peak = m.peak_beyond(contender.run, case.device)
    return row if peak is None else replace(row, memory=peak / matrix)


# -- collect ---------------------------------------------------------------------------------------

# Both procedures compute the same keys in batches of other shapes. In 16 bits a forward pass rounds
# them differently by more than any sum does, so there the comparison only finds wrong tokens.
_AGREE = {torch.float32: 1e-5, torch.float64: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}


def collect(given: Namespace) -> Iterator[list[Row]]:
    """The model of --load."""
    found = given.load()
    if not (isinstance(found, tuple) and len(found) == 3 and isinstance(found[0], nn.Module)):
        raise BadInput(
            f"--load {given.load_name} must return (model, module paths, documents) but returned "
            f"{type(found).__name__}; see benchmarks/smollm2.py."
        )
    case, contenders = collect_case(given, *found)
    rows = measure(case, contenders, replace(given.effort, least=3))
    yield [row if row.p50 is None else replace(row, tokens_per_second=case.n / row.p50) for row in rows]


def collect_case(
    given: Namespace, model: nn.Module, modules: Sequence[str], documents: Sequence[Sequence[int]]
) -> Measured:
    """Ours and the released procedure on the same tokens, documents as long as the model takes; else a BadInput."""
    model.eval()
    last: Any = model.get_submodule(modules[-1])
    d_k = int(getattr(last, "in_features", last.weight.shape[0]))
    dtype, device = last.weight.dtype, last.weight.device
    budget = fastcov.budget(given.multiplier, d_k)
    texts = [list(d) for d in fastcov.take(documents, budget, max(map(len, documents)))]
    n = sum(map(len, texts))
    if n < budget:
        raise BadInput(
            f"The documents of {given.load_name} have {n} tokens and {budget} are wanted; "
            "pass more text or a smaller --multiplier."
        )
    counted: list[float] = []

    def ours(throughput: Throughput | None = None, forward: torch.dtype | None = None) -> dict[str, Tensor]:
        batches = fastcov.bucket(fastcov.take(texts, budget, max(map(len, texts))), given.batch_tokens)
        moments = fastcov.collect_moments(
            model, modules, batches, budget, causal=True, throughput=throughput, forward=forward
        )
        return {path: moment.lower for path, moment in moments.items()}

    def theirs(sums: torch.dtype = torch.float32) -> dict[str, Tensor]:
        return {path: released_covariance(model, path, texts, sums) for path in modules}

    expected = functools.cache(lambda: theirs(torch.float64))

    def check_ours() -> Verdict:
        throughput = Throughput(peak=1.0)  # it counts; the peak is measured beside the rounds
        sums = ours(throughput)
        counted.append(throughput.flops)
        return _agreement(sums, expected(), _AGREE[dtype])

    def check_narrow() -> Verdict:
        return _agreement(narrow(), expected(), _AGREE[torch.bfloat16])

    def check_theirs() -> Verdict:
        return _agreement(theirs(), expected(), 1e-5)

    narrow = functools.partial(ours, forward=torch.bfloat16)
    cannot = "the model is not in float32 on a CPU" if dtype != torch.float32 or device.type != "cpu" else None
    # The released procedure takes many times as long as ours where its products in float32 are slow.
    rounds = 1 if device.type == "cuda" else None
    title = f"{given.load_name}, {word(dtype)}, {n} keys a layer, d_k {d_k}"
    about = "collect", title, word(dtype), n, d_k, device
    return Case(*about, lambda: counted[-1], m.peak_probe(dtype, device)), [
        Contender("fastcov.collect_moments", "ours", check_ours, ours),
        Contender("the same, forward bfloat16", "ours", check_narrow, narrow, cannot=cannot or why_no_bfloat()),
        Contender("released procedure", "released", check_theirs, theirs, rounds=rounds),
    ]


class _Stop(Exception):
    """The hooked layer has run."""


def released_covariance(
    model: nn.Module, path: str, documents: Sequence[Sequence[int]], sums: torch.dtype = torch.float32
) -> Tensor:
    """The sum of ``k k^T`` of one module, (d_k, d_k), in a pass of its own.

    One document at a time, the forward stopped at the hooked layer once its projection has run; keys are gathered by
    the mask, converted (to float32 where it is released) and added as a full product.
    """
    module: Any = model.get_submodule(path)
    device = module.weight.device
    width = getattr(module, "in_features", module.weight.shape[0])
    total = torch.zeros(width, width, device=device, dtype=sums)
    inputs: list[Tensor] = []

    def take_input(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        inputs.append(args[0])
        raise _Stop

    with module.register_forward_hook(take_input), torch.no_grad():
        for document in documents:
            ids = torch.tensor([list(document)], device=device)  # (1, L)
            mask = torch.ones_like(ids)
            with contextlib.suppress(_Stop):
                model(input_ids=ids, attention_mask=mask)
            keys = inputs.pop()[mask.bool()].to(sums)  # (L, d_k)
            total.addmm_(keys.mT, keys)
    return total


def _agreement(found: dict[str, Tensor], wanted: dict[str, Tensor], allowed: float) -> Verdict:
    """The worst layer."""
    pairs = [m.lower_error(found[path], wanted[path].double()) for path in wanted]
    error, bias = max(pairs, key=lambda pair: (pair[0] != pair[0], pair[0]))
    return _verdict(error, allowed, bias)
