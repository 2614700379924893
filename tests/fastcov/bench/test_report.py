from __future__ import annotations

from fastcov.bench.report import LEGEND, Row, Run, heading, table
from fastcov.machine import Machine

BASE = {
    "suite": "rank_k",
    "case": "C += X^T X, float32 keys, n 4096, d 6144",
    "device": "cpu",
    "dtype": "float32",
    "n": 4096,
    "d": 6144,
}
TIMED = {
    "status": "ok",
    "rounds": 7,
    "peak": "FMA loop",
    "peak_before": 123.4,
    "peak_after": 120.0,
    "share": 0.714,
    "error": 1.23e-7,
    "bias": -4e-9,
}


def rows(**more):
    ours = {"contender": "fastcov avx2", "kind": "ours", "gflops": 88.1, "ratio": 2.0}
    return [
        Row(**BASE, **TIMED, **ours, ratio_library=1.5, p20=0.0011, p50=0.0012, p80=1.5, **more),
        Row(**BASE, **TIMED, contender="torch.addmm", kind="library", ratio=1.0, inexact=True),
        Row(**BASE, contender="fastcov cuda", kind="ours", status="cannot", reason="no GPU"),
        Row(**BASE, contender="fastcov bad", kind="ours", status="failed", reason="error " * 40),
    ]


def test_a_row_by_eye():
    lines = table(rows()).splitlines()
    assert lines[0] == "rank_k: C += X^T X, float32 keys, n 4096, d 6144, on cpu"
    assert lines[1] == "peak, GFLOP/s: FMA loop 123 before, 120 after; 7 rounds"
    assert lines[2].split("  ")[0] == "contender"
    wanted = "fastcov avx2 1.100 1.200 1,500 88.1 2.00 1.50 71 1.2e-07 -4.0e-09"
    assert lines[3].split() == wanted.split()
    assert lines[5].endswith("cannot run: no GPU")
    assert "FAILED: error error" in lines[6]


def test_columns_are_aligned_and_lines_short():
    lines = table(rows()).splitlines()
    assert len(lines[2]) == len(lines[3])
    assert all(len(line) < 120 for line in [*lines, *LEGEND.splitlines()])


def test_what_was_not_measured_is_never_a_number():
    untimed = [row for row in rows() if row.p50 is None and row.status != "ok"]
    lines = table(untimed).splitlines()
    assert lines[1] == "peak: not measured"
    assert not any(character.isdigit() for character in "".join(lines[3:]))


def test_the_last_column_is_the_suite_s():
    factor = Row(**{**BASE, **TIMED, "suite": "factor"}, contender="a", kind="ours", p50=1.0,
                 p20=1.0, p80=1.0, memory=1.234)  # fmt: skip
    collect = Row(**{**BASE, **TIMED, "suite": "collect"}, contender="a", kind="ours", p50=1.0,
                  p20=1.0, p80=1.0, tokens_per_second=12345.6)  # fmt: skip
    assert table([factor]).splitlines()[2].endswith("memory")
    assert table([factor]).splitlines()[3].endswith("1.23")
    assert table([collect]).splitlines()[3].endswith("12,346")


def test_the_heading_names_hardware_versions_and_command():
    machine = Machine("a CPU", 2, ("avx2",), "Linux", "a GPU", "570.1", "9.0", 79.6)
    text = heading(Run(machine, {"torch": "2.13"}, 2, "python -m fastcov.bench", "2026"))
    for part in ("a CPU, 2 cores, 2 threads, avx2", "a GPU, 79.6 GiB, capability 9.0, driver 570.1",
                 "torch 2.13", "2026  python -m fastcov.bench"):  # fmt: skip
        assert part in text
