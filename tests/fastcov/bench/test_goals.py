from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.gpu_check import ROWS, TESTS, WIDTHS, Check, Step, summary
from fastcov.bench.report import Row, Run
from fastcov.machine import Machine

MACHINE = Machine("CPU", 16, (), "Linux", "GPU")


def run(*rows, steps=()):
    return Check(Run(MACHINE, {}, 16, "make gpu-check", "now", rows=list(rows)), list(steps))


def update(contender, p50, d=6400, **more):
    settings = {
        "suite": "rank_k",
        "case": f"C, d {d}",
        "contender": contender,
        "kind": "ours" if contender.startswith("fastcov") else "library",
        "kernel": contender.split()[1] if contender.startswith("fastcov") else None,
        "device": "cuda",
        "dtype": "bfloat16",
        "n": ROWS,
        "d": d,
        "status": "ok",
    }
    return Row(**{**settings, **more}, p50=p50)


def of(run_, part):
    return {g.goal: (g.measured, g.status) for g in run_.goals() if part in g.goal}


def test_an_empty_run_has_met_nothing_and_missed_nothing():
    found = run().goals()
    assert {g.status for g in found} == {"not measured"}
    assert {g.measured for g in found} == {"not measured"}
    assert len(found) == 2 + 3 * len(WIDTHS) + 1 + 2


@pytest.mark.parametrize(
    ("addmm", "first", "stretch"), [(1.59, "missed", "missed"), (1.6, "met", "missed"), (1.85, "met", "met")]
)
def test_the_fastest_written_kernel_counts_against_addmm(addmm, first, stretch):
    made = run(
        update("fastcov triton", 1.1),
        update("fastcov cuda", 1.0),
        update("fastcov panels", 0.5),  # cuBLAS: no written kernel
        update("torch.addmm out_dtype", addmm),
    )
    found = of(made, "d 6400: against addmm") | of(made, "stretch")
    name = f"rank_k bfloat16, n {ROWS}, d 6400: against"
    text = f"{addmm:.2f}x (fastcov cuda)"
    assert found[f"{name} addmm(out_dtype=float32)"] == (text, first)
    assert found[f"{name} the same, stretch goal"] == (text, stretch)
    assert found[f"rank_k bfloat16, n {ROWS}, d 11008: against the same, stretch goal"] == (
        "not measured",
        "not measured",
    )


def test_the_fastest_of_the_panels_must_be_beaten():
    rows = [update("fastcov cuda", 1.0), update("row panels (8)", 1.2)]
    (goal,) = of(run(*rows), "d 6400: against row panels").values()
    assert goal == ("1.20x (fastcov cuda)", "met")
    (goal,) = of(run(*rows, update("fastcov panels", 0.9)), "d 6400: against row panels").values()
    assert goal == ("0.90x (fastcov cuda)", "missed")


def test_other_rows_and_cpu_rows_prove_nothing():
    rows = [
        update("fastcov cuda", 1.0, n=4096),
        update("fastcov cuda", 1.0, device="cpu"),
        update("fastcov cuda", 1.0, dtype="float32"),
        update("torch.addmm out_dtype", 9.0),
    ]
    assert set(of(run(*rows), "d 6400").values()) == {("not measured", "not measured")}


def test_a_row_beyond_the_gate_is_counted():
    bad = update("fastcov triton", None, status="failed", reason="bias")
    (goal,) = of(run(bad, update("fastcov cuda", 1.0)), "diagonal bias").values()
    assert goal == ("1 of 2 rows beyond", "missed")
    (goal,) = of(run(update("fastcov cuda", 1.0)), "diagonal bias").values()
    assert goal == ("0 of 1 rows beyond", "met")


@pytest.mark.parametrize(
    ("status", "note", "wanted"),
    [
        ("ok", "12 passed, 3 skipped in 4.56s", ("12 passed, 3 skipped", "met")),
        ("ok", "== 12 passed in 4.56s (0:00:04) ==", ("12 passed", "met")),
        ("ok", "15 skipped in 1.00s", ("15 skipped", "missed")),
        ("failed", "1 failed, 12 passed in 1s", ("failed", "missed")),
        ("timed out", "", ("timed out", "missed")),
        ("not run", "", ("not measured", "not measured")),
    ],
)
def test_tests_must_have_run_and_passed(status, note, wanted):
    (goal,) = of(run(steps=[Step(TESTS, status, 1.0, note)]), "kernel test").values()
    assert goal == wanted


@pytest.mark.parametrize(("share", "goal"), [(0.625, ("1.60x", "met")), (0.4, ("2.50x", "missed"))])
def test_collecting_is_held_against_its_floor(share, goal):
    row = replace(update("fastcov cuda", 1.0), suite="collect", case="benchmarks.shapes:gpt_j, bfloat16", n=163840,
                  share=share)  # fmt: skip
    assert list(of(run(row), "GPT-J").values()) == [goal]


def test_editing_is_held_against_a_fresh_lu():
    row = replace(update("fastcov factor once", 1.0), suite="factor", case="factor + edits")
    row = replace(row, d=16384, error=3e-10, ratio=7.9)
    found = of(run(row), "factor +")
    assert list(found.values()) == [("3.0e-10", "met"), ("7.9x", "missed")]
    assert all("d 16384" in name for name in found)


def test_the_summary_counts_and_is_aligned():
    text = summary(run(update("fastcov cuda", 1.0), update("torch.addmm out_dtype", 1.7)).goals())
    lines = text.splitlines()
    assert lines[-1] == "2 met, 1 missed, 14 not measured"
    assert len({line.index(">=") for line in lines if ">= 1.6x" in line}) == 1
    assert max(map(len, lines)) < 120
