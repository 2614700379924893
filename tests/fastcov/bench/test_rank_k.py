from __future__ import annotations

import pytest
import torch

from fastcov import ops
from fastcov.bench import rank_k
from fastcov.bench.command import main
from fastcov.bench.schema import load
from fastcov.bench.settings import parse
from fastcov.bench.timing import Effort, measure
from fastcov.kernels import plain

ARGUMENTS = ["rank_k", "--quick", "--sizes", "40", "--rows", "64", "--threads", "1"]


@pytest.fixture
def kernel(monkeypatch):
    """Registers a kernel for the time of a test."""
    monkeypatch.setattr(ops, "KERNELS", dict(ops.KERNELS))
    monkeypatch.setattr(ops, "_chosen", {})

    def register(name, update, missing=None, refuses=None):
        ops.KERNELS[name] = ops.Kernel(
            name, update, lambda C=None, X=None: missing or (X is not None and refuses) or None
        )

    return register


def rows_of(dtype="float32", **names):
    settings = parse([*ARGUMENTS, "--dtype", dtype])
    case, contenders = rank_k.case(settings, settings.dtypes[0], 40)
    return {row.contender: row for row in measure(case, contenders, Effort(0.01, 3, 3))}


def doubled(C, X, mask, alpha):
    plain.reference(C, X, mask, 2 * alpha)


def test_a_wrong_kernel_fails_is_not_timed_and_the_exit_code_is_1(kernel, capsys, tmp_path):
    runs = []

    def wrong(C, X, mask, alpha):
        runs.append(1)
        doubled(C, X, mask, alpha)

    kernel("wrong", wrong)
    file = tmp_path / "run.json"
    assert main([*ARGUMENTS, "--dtype", "float32", "--json", str(file)]) == 1
    assert len(runs) == 1  # the check, and no round
    printed = capsys.readouterr().out
    assert "fastcov wrong" in printed and "FAILED: relative error" in printed
    assert "1 of " in printed and "rows FAILED their check and were not timed" in printed
    (row,) = [row for row in load(file).rows if row.kernel == "wrong"]
    assert (row.status, row.p50) == ("failed", None)
    assert row.error is not None and row.error > 1e-2
    assert all(row.p50 for row in load(file).rows if row.kernel == "reference")


def test_a_kernel_that_forgets_the_sum_or_writes_above_the_diagonal_fails(kernel):
    def forgets(C, X, mask, alpha):
        C.copy_(torch.where(torch.ones_like(C).tril() > 0, (X.mT @ X), C))

    kernel("forgets", forgets)
    kernel("full", lambda C, X, mask, alpha: C.addmm_(X.mT, X))
    rows = rows_of()
    assert rows["fastcov forgets"].reason.startswith("relative error")
    assert rows["fastcov full"].reason == "it changed something above the diagonal"


def test_kernels_that_cannot_run_say_why(kernel):
    kernel("absent", doubled, missing="there is no such machine")
    kernel("choosy", doubled, refuses="it wants square keys")
    rows = rows_of()
    assert (rows["fastcov absent"].status, rows["fastcov absent"].reason) == ("cannot", "there is no such machine")
    assert rows["fastcov choosy"].reason == "it wants square keys"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_every_row_that_runs_is_right_and_timed(dtype):
    rows = rows_of(dtype)
    timed = [row for row in rows.values() if row.p50 is not None]
    assert {"fastcov reference", "torch.addmm", "torch block rows 768"} <= set(rows)
    assert not [row for row in rows.values() if row.status == "failed"]
    for row in timed:
        assert row.error is not None and row.error < (1e-13 if dtype == "float64" else 1e-6)
        assert row.gflops == pytest.approx(64 * 40 * 41 / row.p50 / 1e9)
        assert row.ratio == pytest.approx(rows["torch.addmm"].p50 / row.p50)
    fastest = min(row.p50 for row in timed if row.kind == "library")
    assert rows["fastcov reference"].ratio_library == pytest.approx(fastest / rows["fastcov reference"].p50)


def test_only_named_kernels_run_and_slow_ones_only_where_named(kernel):
    kernel("portable", doubled)
    names = lambda *more: {  # noqa: E731
        c.kernel for c in rank_k.case(parse([*ARGUMENTS, *more]), torch.float32, 40)[1] if c.kernel is not None
    }
    assert "portable" not in names()
    assert names("--kernels", "reference,portable") == {"reference", "portable"}


def test_a_library_beyond_the_gate_is_marked_and_timed(monkeypatch):
    from fastcov.bench import libraries

    def rounded(C, X):
        C.addmm_(X.mT, X).mul_(1 + 1e-4)

    def other(C, X):
        C.zero_()

    monkeypatch.setattr(
        libraries, "routes", lambda *a: [libraries.Route("rounded", rounded), libraries.Route("other", other)]
    )
    rows = rows_of()
    assert rows["rounded"].inexact and rows["rounded"].p50 is not None
    assert rows["other"].status == "failed"
