from __future__ import annotations

import json
import time

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu_check import ROWS, TESTS, Check, Task, adopt, check, execute, file_name, main, tasks
from benchmarks.recorded import load
from fastcov.bench.report import Row, Run, save
from fastcov.machine import Machine

MACHINE = Machine("CPU", 16, (), "Linux", "GPU", capability="9.0")


def new():
    return Run(MACHINE, {"native": "absent"}, 16, "make gpu-check", "now")


def row(contender, p50):
    ours = contender.startswith("fastcov")
    return Row("rank_k", "C", contender, "ours" if ours else "library", "cuda", "bfloat16", ROWS,
               6400, "ok", kernel="cuda" if ours else None, p50=p50)  # fmt: skip


class Stub:
    """Steps that take the seconds they are told to, on a clock of their own."""

    def __init__(self, seconds, codes=None, rows=None):
        self.now, self.seconds, self.codes, self.rows = 0.0, seconds, codes or {}, rows or {}
        self.limits = {}

    def __call__(self, task, limit):
        self.limits[task.name] = limit
        taken = self.seconds[task.name]
        self.now += min(taken, limit)
        if task.json is not None and task.name in self.rows:
            recorded = new()
            recorded.versions = {"native": "built"}
            recorded.rows = self.rows[task.name]
            save(recorded, task.json)
        if taken > limit:
            return None, "still at it\n"
        return self.codes.get(task.name, 0), f"output\n{task.name} is done\n"


def steps(tmp_path, *names, limit=100.0):
    return [Task(name, (), limit, tmp_path / f"{name}.json") for name in names]


def checked(tmp_path, stub, *names, budget=500.0, limit=100.0):
    target = tmp_path / "gpu.json"
    given = steps(tmp_path, *names, limit=limit)
    return check(Check(new()), given, target, stub, budget=budget, clock=lambda: stub.now)


def test_rows_of_all_steps_are_in_one_file_with_goals(tmp_path, capsys):
    stub = Stub({"a": 10, "b": 20}, rows={"a": [row("fastcov cuda", 1.0)], "b": [row("torch.addmm out_dtype", 1.7)]})
    run = checked(tmp_path, stub, "a", "b")
    assert [(s.name, s.status, s.seconds, s.note) for s in run.steps] == [
        ("a", "ok", 10.0, "1 rows"),
        ("b", "ok", 20.0, "1 rows"),
    ]
    assert load(tmp_path / "gpu.json") == run.run
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert content["steps"][0] == {"name": "a", "status": "ok", "seconds": 10.0, "note": "1 rows"}
    assert run.run.versions == {"native": "built"}
    assert "1.70x (fastcov cuda)" in {goal["measured"] for goal in content["goals"]}
    assert "a is done" in capsys.readouterr().out


def test_the_file_is_what_the_choice_of_kernels_takes_over(tmp_path):
    checked(tmp_path, Stub({"a": 1}, rows={"a": [row("fastcov cuda", 1.5)]}), "a")
    before = {"capabilities": {"8.0": [1], "9.0": [2]}}
    assert adopt(load(tmp_path / "gpu.json"), before) == {
        "capabilities": {"8.0": [1], "9.0": [{"dtype": "bfloat16", "d": 6400, "seconds": {"cuda": 1.5}}]}
    }
    assert before["capabilities"]["9.0"] == [2]


def test_the_command_writes_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "TABLE", tmp_path / "measured.json")
    (tmp_path / "measured.json").write_text('{"capabilities": {}}')
    checked(tmp_path, Stub({"a": 1}, rows={"a": [row("fastcov cuda", 1.5)]}), "a")
    assert main(["--adopt", str(tmp_path / "gpu.json")]) == 0
    rows = [{"dtype": "bfloat16", "d": 6400, "seconds": {"cuda": 1.5}}]
    assert json.loads((tmp_path / "measured.json").read_text())["capabilities"] == {"9.0": rows}
    assert "now holds the capabilities 9.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: "{", "is not JSON"),
        (lambda content: "[]", "is not a run"),
        (lambda content: json.dumps({**content, "machine": {**content["machine"], "gpu": None}}), "of no GPU"),
        (lambda content: json.dumps({**content, "rows": []}), "no measured time"),
        (lambda content: json.dumps({**content, "rows": [{"p50": 1}]}), "is damaged"),
    ],
)
def test_what_is_no_result_is_not_adopted(tmp_path, monkeypatch, capsys, change, words):
    monkeypatch.setattr(gpu_check, "TABLE", tmp_path / "measured.json")
    (tmp_path / "measured.json").write_text('{"capabilities": {}}')
    checked(tmp_path, Stub({"a": 1}, rows={"a": [row("fastcov cuda", 1.5)]}), "a")
    content = json.loads((tmp_path / "gpu.json").read_text())
    (tmp_path / "bad.json").write_text(change(content))
    assert main(["--adopt", str(tmp_path / "bad.json")]) == 2
    assert words in capsys.readouterr().err
    assert (tmp_path / "measured.json").read_text() == '{"capabilities": {}}'
    assert main(["--adopt", str(tmp_path / "none.json")]) == 2


def test_the_file_is_written_after_every_step(tmp_path):
    seen = []
    stub = Stub({"a": 1, "b": 1}, rows={"a": [row("fastcov cuda", 1.0)]})

    def watched(task, limit):
        if task.name == "b":
            seen.append(json.loads((tmp_path / "gpu.json").read_text()))
        return stub(task, limit)

    check(Check(new()), steps(tmp_path, "a", "b"), tmp_path / "gpu.json", watched, clock=lambda: stub.now)
    (before,) = seen
    assert [step["name"] for step in before["steps"]] == ["a"] and len(before["rows"]) == 1


def test_a_failed_step_does_not_stop_the_others(tmp_path):
    run = checked(tmp_path, Stub({"a": 1, "b": 1}, codes={"a": 1}), "a", "b")
    assert [(s.status, s.note) for s in run.steps] == [("failed", "a is done"), ("ok", "b is done")]


def test_a_step_that_is_stopped_keeps_the_rows_that_it_wrote(tmp_path):
    stub = Stub({"a": 1000, "b": 1}, rows={"a": [row("fastcov cuda", 1.0)]})
    run = checked(tmp_path, stub, "a", "b")
    assert [(s.status, s.seconds) for s in run.steps] == [("timed out", 100.0), ("ok", 1.0)]
    assert len(run.run.rows) == 1


def test_what_there_is_no_time_for_is_not_run_and_not_measured(tmp_path):
    stub = Stub({"a": 90, "b": 1000, "c": 1})
    run = checked(tmp_path, stub, "a", "b", "c", budget=150.0)
    assert stub.limits == {"a": 100.0, "b": 60.0}  # what is left, and no step for nothing
    assert [(s.name, s.status) for s in run.steps] == [("a", "ok"), ("b", "timed out"), ("c", "not run")]
    assert stub.now <= 150.0
    assert {goal.status for goal in run.goals()} == {"not measured"}


def test_the_real_steps_build_test_and_measure_within_nine_minutes(tmp_path):
    found = {task.name: task for task in tasks(tmp_path)}
    assert next(iter(found)) == "build the native extension"
    assert found[TESTS].command[:2] == ("-m", "pytest")
    for path in found[TESTS].command:
        if path.startswith("tests/"):
            assert (gpu_check.ROOT / path).exists()
    for kernel in ("triton", "cuda", "panels"):  # a process each
        rank_k = " ".join(found[f"rank_k bfloat16 {kernel}"].command)
        assert "--sizes 6400,11008,14336,16384 --rows 65536" in rank_k and "--device cuda" in rank_k
        assert rank_k.partition("--kernels ")[2].startswith(f"{kernel} ")
    assert gpu_check.BUDGET <= 530
    files = [task.json for task in found.values() if task.json is not None]
    assert len(set(files)) == len(files) == 8


def test_a_step_is_a_process_and_its_output_is_kept(tmp_path):
    task = Task("a", ("-c", "import os; print(os.environ['MARK']); raise SystemExit(3)"), 60,
                environment=(("MARK", "here"),))  # fmt: skip
    assert execute(task, 60) == (3, "here\n")


def test_a_step_that_takes_too_long_is_ended_with_what_it_started(tmp_path):
    mark = tmp_path / "mark"
    child = f"import time; time.sleep(2); open({str(mark)!r}, 'w')"
    program = (
        f"import subprocess, sys, time; print('begun', flush=True); "
        f"subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    )
    begun = time.monotonic()
    assert execute(Task("a", ("-c", program), 1), 1) == (None, "begun\n")
    assert time.monotonic() - begun < 30
    time.sleep(1.5)
    assert not mark.exists()


def test_the_file_is_named_after_the_gpu():
    assert file_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3.json"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_and_ends_with_2(capsys):
    assert main([]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: there is no CUDA device here that torch ")
    assert captured.err.count("\n") == 1 and captured.out == ""


@pytest.mark.parametrize(("code", "wanted"), [(0, 0), (1, 1)])
def test_the_command_ends_with_1_where_a_step_failed(tmp_path, monkeypatch, capsys, code, wanted):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "new_run", lambda *a: new())
    monkeypatch.setattr(gpu_check, "tasks", lambda folder: steps(tmp_path, "a"))
    monkeypatch.setattr(gpu_check, "execute", lambda task, limit: (code, "done"))
    monkeypatch.setattr(gpu_check.signal, "signal", lambda *a: None)
    target = tmp_path / "out.json"
    assert main(["--json", str(target)]) == wanted
    printed = capsys.readouterr().out
    assert "not measured" in printed and f"Written to {target}." in printed
    assert json.loads(target.read_text())["steps"][0]["name"] == "a"
