from __future__ import annotations

from dataclasses import replace

from fastcov.bench.compare import comparison, differences
from fastcov.bench.schema import Machine, Row, Run

MACHINE = Machine(cpu="a CPU", cores=2, isa=("avx2",), system="Linux x86_64")


def row(contender, p50, case="C, d 4", suite="rank_k"):
    status = "ok" if p50 else "cannot"
    return Row(suite, case, contender, "ours", "cpu", "float32", 8, 4, status, p50=p50)


def run(*rows, **changes):
    settings = {
        "machine": MACHINE,
        "versions": {"torch": "2.13"},
        "threads": 2,
        "command": "python -m fastcov.bench",
        "date": "then",
    }
    return Run(rows=list(rows), **{**settings, **changes})


def test_ratios_row_by_row_above_one_is_faster_now():
    lines = comparison(run(row("a", 0.5), row("b", 0.4)), run(row("a", 1.0), row("b", 0.1)))
    assert lines == [
        "Compared with the run of then: python -m fastcov.bench",
        "",
        "rank_k: C, d 4, on cpu",
        "contender                    then ms      now ms  then/now",
        "a                          1,000.000     500.000      2.00",
        "b                            100.000     400.000      0.25",
    ]


def test_rows_without_a_partner_are_named_on_both_sides():
    now = run(row("a", 0.5), row("new", 0.5), row("a", 0.5, case="C, d 9"), row("c", None))
    then = run(row("a", 0.5), row("old", 1.0), row("c", 1.0), row("x", 1.0, suite="factor"))
    text = "\n".join(comparison(now, then))
    assert "none in the recorded run for rank_k: C, d 4, on cpu: new" in text
    assert "none in the recorded run for rank_k: C, d 9, on cpu: a" in text
    assert "none in this run for rank_k: C, d 4, on cpu: old, c" in text
    assert "factor" not in text  # this suite did not run now


def test_nothing_in_common_is_said():
    assert "No row of this run has a partner in the recorded one." in comparison(run(row("a", 1.0)), run(row("b", 1.0)))


def test_other_hardware_versions_and_threads_are_warned_of():
    now = run()
    then = run(
        machine=replace(MACHINE, cpu="another", gpu="a GPU"), versions={"torch": "2.12", "scipy": "1.1"}, threads=4
    )
    assert differences(now, then) == [
        "the cpu was 'another' and is 'a CPU'",
        "the gpu was 'a GPU' and is None",
        "scipy was '1.1' and is 'absent'",
        "torch was '2.12' and is '2.13'",
        "the threads were 4 and are 2",
    ]
    assert differences(now, run()) == []
    assert "warning: the threads were 4 and are 2" in comparison(now, then)


def test_lists_of_rows_are_wrapped():
    now = run(*(row(f"contender number {i}", 1.0) for i in range(30)))
    assert max(map(len, comparison(now, run()))) < 120
