from __future__ import annotations

import pytest
import torch

from fastcov.bench import command
from fastcov.bench.command import main
from fastcov.bench.schema import BadInput, load

ARGUMENTS = ["--quick", "--sizes", "24", "--rows", "32", "--threads", "1", "--dtype", "float32"]


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_all_suites_run_and_the_file_holds_what_was_printed(tmp_path, capsys):
    path = tmp_path / "run.json"
    assert main([*ARGUMENTS, "--json", str(path), "--multiplier", "1"]) == 0
    printed = capsys.readouterr().out
    run = load(path)
    assert {row.suite for row in run.rows} == {"rank_k", "factor", "collect"}
    assert all(row.contender in printed and row.case in printed for row in run.rows)
    assert (run.threads, run.machine.gpu) == (1, None)
    assert run.versions["torch"] == torch.__version__
    assert run.versions["fastmemit"] != "absent"
    assert "-m fastcov.bench --quick" in run.command and str(path) in run.command
    assert max(map(len, printed.split("\n\n", 1)[1].splitlines())) < 120
    assert "These are the sizes of a trial" in printed


def test_a_run_is_compared_with_itself(tmp_path, capsys):
    path = tmp_path / "run.json"
    assert main(["rank_k", *ARGUMENTS, "--json", str(path)]) == 0
    capsys.readouterr()
    assert main(["rank_k", *ARGUMENTS, "--compare", str(path)]) == 0
    printed = capsys.readouterr().out
    compared = printed.partition("Compared with the run of")[2]
    assert "torch.addmm" in compared and "warning" not in compared
    assert "Rows without a partner" not in compared


def test_what_was_finished_is_in_the_file_when_a_later_suite_breaks(tmp_path, monkeypatch, capsys):
    def broken(settings):
        raise BadInput("The model is not there; name another.")
        yield

    monkeypatch.setitem(command.SUITES, "factor", broken)
    path = tmp_path / "run.json"
    assert main(["rank_k", "factor", *ARGUMENTS, "--json", str(path)]) == 2
    assert capsys.readouterr().err == "error: The model is not there; name another.\n"
    assert {row.suite for row in load(path).rows} == {"rank_k"}
