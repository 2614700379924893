from __future__ import annotations

import json
from dataclasses import replace

import pytest

from benchmarks.recorded import comparison, differences, load, main
from fastcov.bench.report import Row, Run, save
from fastcov.errors import BadInput
from fastcov.machine import Machine

MACHINE = Machine(cpu="a CPU", cores=2, isa=("avx2", "fma"), system="Linux x86_64")


def row(**changes):
    settings = {
        "suite": "rank_k",
        "case": "C",
        "contender": "fastcov avx2",
        "kind": "ours",
        "device": "cpu",
        "dtype": "float32",
        "n": 8,
        "d": 4,
        "status": "ok",
    }
    return Row(**{**settings, **changes})


def run(*rows, **changes):
    settings = {
        "machine": MACHINE,
        "versions": {"torch": "2.13.0", "python": "3.11"},
        "threads": 2,
        "command": "python -m fastcov.bench",
        "date": "2026-01-01T00:00:00+00:00",
    }
    return Run(rows=list(rows), **{**settings, **changes})


def test_a_run_is_read_as_it_was_written(tmp_path):
    written = run(
        row(kernel="avx2", p20=0.1, p50=0.2, p80=0.3, error=1e-7, share=0.5, ratio=3.0),
        row(contender="broken", status="failed", reason="relative error 1", error=1.0),
    )
    save(written, tmp_path / "run.json", steps=["beside it"])
    assert load(tmp_path / "run.json") == written
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_what_is_unknown_in_a_later_file_is_left_out(tmp_path):
    save(run(row()), tmp_path / "run.json")
    content = json.loads((tmp_path / "run.json").read_text())
    content["rows"][0]["colour"] = "blue"
    (tmp_path / "run.json").write_text(json.dumps(content))
    assert load(tmp_path / "run.json") == run(row())


def damaged(content):
    content["rows"][0].pop("suite")


def versioned(content):
    content["version"] = 99


def foreign(content):
    content["format"] = "another"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (damaged, "is damaged"),
        (versioned, "has version 99 of the format and this program reads 1"),
        (foreign, "is not a run of fastcov.bench"),
    ],
)
def test_other_files_are_refused_in_one_sentence(tmp_path, change, message):
    path = tmp_path / "run.json"
    save(run(row()), path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(BadInput, match=message):
        load(path)


def test_no_file_and_no_json_are_refused(tmp_path):
    with pytest.raises(BadInput, match=r"cannot be read \(No such file"):
        load(tmp_path / "none.json")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(BadInput, match="is not JSON"):
        load(tmp_path / "text")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput, match="is not JSON"):
        load(tmp_path / "binary")
    (tmp_path / "list").write_text("[1]")
    with pytest.raises(BadInput, match="is not a run"):
        load(tmp_path / "list")


def timed(contender, p50, case="C, d 4", suite="rank_k"):
    status = "ok" if p50 else "cannot"
    return Row(suite, case, contender, "ours", "cpu", "float32", 8, 4, status, p50=p50)


def test_ratios_row_by_row_above_one_is_faster_now():
    lines = comparison(run(timed("a", 0.5), timed("b", 0.4)), run(timed("a", 1.0), timed("b", 0.1)))
    assert lines == [
        "Compared with the run of 2026-01-01T00:00:00+00:00: python -m fastcov.bench",
        "",
        "rank_k: C, d 4, on cpu",
        "contender                    then ms      now ms  then/now",
        "a                          1,000.000     500.000      2.00",
        "b                            100.000     400.000      0.25",
    ]


def test_rows_without_a_partner_are_named_on_both_sides():
    now = run(timed("a", 0.5), timed("new", 0.5), timed("a", 0.5, case="C, d 9"), timed("c", None))
    then = run(timed("a", 0.5), timed("old", 1.0), timed("c", 1.0), timed("x", 1.0, suite="factor"))
    text = "\n".join(comparison(now, then))
    assert "none in the recorded run for rank_k: C, d 4, on cpu: new" in text
    assert "none in the recorded run for rank_k: C, d 9, on cpu: a" in text
    assert "none in this run for rank_k: C, d 4, on cpu: old, c" in text
    assert "factor" not in text  # this suite did not run now


def test_nothing_in_common_is_said():
    assert "No row of this run has a partner in the recorded one." in comparison(
        run(timed("a", 1.0)), run(timed("b", 1.0))
    )


def test_other_hardware_versions_and_threads_are_warned_of():
    now = run(versions={"torch": "2.13"})
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
    assert differences(now, now) == []
    assert "warning: the threads were 4 and are 2" in comparison(now, then)


def test_lists_of_rows_are_wrapped():
    now = run(*(timed(f"contender number {i}", 1.0) for i in range(30)))
    assert max(map(len, comparison(now, run()))) < 120


def test_the_command_compares_two_files(tmp_path, capsys):
    save(run(timed("a", 0.5)), tmp_path / "now.json")
    save(run(timed("a", 1.0)), tmp_path / "then.json")
    assert main([str(tmp_path / "now.json"), str(tmp_path / "then.json")]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["a", "1,000.000", "500.000", "2.00"]
    assert main([str(tmp_path / "now.json"), str(tmp_path / "none.json")]) == 2
    assert "cannot be read" in capsys.readouterr().err
