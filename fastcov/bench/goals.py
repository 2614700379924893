"""What `make gpu-check` shall show, and whether a run shows it.

Nothing is estimated: where a row is missing, the goal is "not measured".
"""

from __future__ import annotations

from collections.abc import Iterator

from fastcov.bench.schema import GoalResult, Row, Run

WIDTHS = (6400, 11008, 14336, 16384)
ROWS = 65536
TESTS = "tests on the device"
_NOT = "not measured"
_PASSES = "every kernel test passes on the device"
# Kernels that are cuBLAS and plain torch: what the written ones are measured against.
_PLAIN = ("panels", "reference")


def goals(run: Run) -> list[GoalResult]:
    """Every goal with its figure."""
    return [_tests(run), _gate(run), *_rank_k(run), _collect(run), *_factor(run)]


def summary(found: list[GoalResult]) -> str:
    """The goals as a table."""
    width = max(len(one.goal) for one in found)
    lines = [f"{'goal':{width}}{'wanted':>10}{'measured':>24}  status"]
    lines += [f"{g.goal:{width}}{g.wanted:>10}{g.measured:>24}  {g.status}" for g in found]
    counts = {s: sum(g.status == s for g in found) for s in ("met", "missed", _NOT)}
    lines.append(", ".join(f"{number} {status}" for status, number in counts.items()))
    return "\n".join(lines)


def _goal(name: str, wanted: str, measured: str | None, met: bool) -> GoalResult:
    if measured is None:
        return GoalResult(name, wanted, _NOT, _NOT)
    return GoalResult(name, wanted, measured, "met" if met else "missed")


def _tests(run: Run) -> GoalResult:
    step = next((s for s in run.steps if s.name == TESTS and s.status != "not run"), None)
    if step is None:
        return _goal(_PASSES, "all", None, False)
    # pytest's last line, "12 passed, 3 skipped in 4.56s"; skipping everything proves nothing.
    counts = step.note.partition(" in ")[0].strip("= ")
    if step.status != "ok":
        return _goal(_PASSES, "all", step.status, False)
    return _goal(_PASSES, "all", counts, " passed" in f" {counts}")


def _gate(run: Run) -> GoalResult:
    """Error and diagonal bias of the written kernels, as the rows of rank_k found them."""
    rows = [row for row in run.rows if row.suite == "rank_k" and row.kind == "ours" and row.status in ("ok", "failed")]
    failed = sum(row.status == "failed" for row in rows)
    measured = f"{failed} of {len(rows)} rows beyond" if rows else None
    return _goal("rank_k: error <= 1e-5 and diagonal bias <= 3e-6", "0 beyond", measured, not failed)


def _rank_k(run: Run) -> Iterator[GoalResult]:
    for d in WIDTHS:
        rows = [
            row
            for row in run.rows
            if (row.suite, row.device, row.dtype, row.n, row.d) == ("rank_k", "cuda", "bfloat16", ROWS, d)
            and row.p50 is not None
        ]
        ours = _fastest([r for r in rows if r.kernel is not None and r.kernel not in _PLAIN])
        addmm = _fastest([r for r in rows if r.contender.startswith("torch.addmm")])
        panels = _fastest([r for r in rows if "panels" in r.contender])
        name = f"rank_k bfloat16, n {ROWS}, d {d}: against"
        yield _times(f"{name} addmm(out_dtype=float32)", 1.6, ours, addmm)
        yield _times(f"{name} the same, stretch goal", 1.85, ours, addmm)
        yield _times(f"{name} row panels", 1.0, ours, panels)


def _times(name: str, wanted: float, ours: Row | None, other: Row | None) -> GoalResult:
    text = f">= {wanted:g}x" if wanted > 1 else "> 1x"
    if ours is None or other is None or not ours.p50 or not other.p50:
        return _goal(name, text, None, False)
    ratio = other.p50 / ours.p50
    met = ratio >= wanted if wanted > 1 else ratio > 1
    return _goal(name, text, f"{ratio:.2f}x ({ours.contender})", met)


def _collect(run: Run) -> GoalResult:
    share = next(
        (
            row.share
            for row in run.rows
            if row.suite == "collect" and row.case.startswith("gpt-j") and row.kind == "ours"
            and row.n == 163840 and row.share is not None
        ),
        None,
    )  # fmt: skip
    measured = None if share is None else f"{1 / share:.2f}x"
    name = "collect, GPT-J's shape, layers 3-8, 163,840 tokens: the floor"
    return _goal(name, "<= 2x", measured, share is not None and share >= 0.5)


def _factor(run: Run) -> Iterator[GoalResult]:
    name = "fastcov factor once"
    rows = [row for row in run.rows if row.suite == "factor" and row.contender == name]
    row = rows[-1] if rows else None
    error = None if row is None else row.error
    d = "" if row is None else f", d {row.d}"
    yield _goal(
        f"factor + batches of edits{d}: the result of a fresh LU",
        "to 1e-8",
        None if error is None else f"{error:.1e}",
        error is not None and error <= 1e-8,
    )
    ratio = None if row is None else row.ratio
    measured = None if ratio is None else f"{ratio:.1f}x"
    yield _goal(f"factor + batches of edits{d}: against a fresh LU", ">= 8x", measured,
                ratio is not None and ratio >= 8)  # fmt: skip


def _fastest(rows: list[Row]) -> Row | None:
    return min(rows, key=lambda row: row.p50 or float("inf"), default=None)
