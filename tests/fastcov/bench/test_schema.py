from __future__ import annotations

import json

import pytest

from fastcov.bench.schema import BadInput, GoalResult, Machine, Row, Run, Step, load, save

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
        steps=[Step("build", "ok", 1.5, "done")],
        goals=[GoalResult("fast", ">= 2x", "3.00x", "met")],
    )
    save(written, tmp_path / "run.json")
    assert load(tmp_path / "run.json") == written
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_the_seconds_of_kernels_stand_by_dtype_and_width(tmp_path):
    save(
        run(
            row(kernel="avx2", p50=0.2),
            row(kernel="reference", contender="fastcov reference", p50=0.4),
            row(kernel="avx2", d=9, p50=0.7),
            row(kernel="avx512f", status="cannot"),
            row(contender="torch.addmm", kind="library", p50=0.1),
        ),
        tmp_path / "run.json",
    )
    content = json.loads((tmp_path / "run.json").read_text())
    assert content["device"] == "a CPU"
    assert content["kernels"] == [
        {"dtype": "float32", "n": 8, "d": 4, "seconds": {"avx2": 0.2, "reference": 0.4}},
        {"dtype": "float32", "n": 8, "d": 9, "seconds": {"avx2": 0.7}},
    ]


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
