from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.recorded import load
from fastcov.bench import __main__ as command
from fastcov.bench.__main__ import main, parse
from fastcov.bench.measure import Effort
from fastcov.errors import BadInput

ROOT = Path(__file__).parents[3]

BAD = {
    "foo": "There is no suite 'foo'; choose from rank_k, factor, collect.",
    "--sizes 0": "--sizes takes whole numbers above 0 but got '0'; write 1536,3072.",
    "--sizes 1536,": "--sizes takes whole numbers above 0 but got ''; write 1536,3072.",
    "--sizes 1e3": "--sizes takes whole numbers above 0 but got '1e3'; write 1536,3072.",
    "--rows -3": "--rows takes whole numbers above 0 but got '-3'; write 1536,3072.",
    "--dtype int8": "There is no --dtype 'int8'; choose from float32, bfloat16, float16, float64.",
    "--device tpu": "There is no --device 'tpu'; choose from cpu, cuda.",
    "--kernels nope": "There is no --kernels 'nope'; choose from ",
    "collect": "The suite collect needs a model; name one, for example --load benchmarks.smollm2:load.",
    "--threads 0": "--threads takes whole numbers above 0",
    "--threads 99999": "--threads 99999 is more than the ",
    "--multiplier 0": "--multiplier must be above 0 but is 0; 10 is usual.",
    "--multiplier nan": "--multiplier must be above 0 but is nan; 10 is usual.",
    "--seconds 0": "--seconds must be from 0 to 3600 but is 0; 12 is usual.",
    "--seconds abc": "Argument --seconds: invalid float value: 'abc'; see --help.",
    "--wat": "Unrecognized arguments: --wat; see --help.",
    "--json /no/such/folder/x.json": "--json /no/such/folder/x.json cannot be written; ",
    "--json .": "--json . cannot be written; name a file in a folder that exists.",
    "--load math": "--load takes MODULE:FUNCTION but got 'math'; see --help.",
    "--load no_such_module:f": "--load no_such_module:f cannot be imported (No module named ",
    "--load math:pi": "--load math:pi is no function; name one that returns the model.",
    "--load math:no": "--load math:no cannot be imported (module 'math' has no attribute 'no'); ",
    "--sizes 9000000": "The suite rank_k at d = 9000000 needs ",
}


@pytest.mark.parametrize("text", BAD)
def test_bad_input_is_one_sentence(text):
    with pytest.raises(BadInput) as caught:
        parse(text.split())
    message = str(caught.value)
    assert message.startswith(BAD[text])
    assert message.endswith(".") and ". " not in message.replace("--json .", "") and "\n" not in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_here_is_refused():
    with pytest.raises(BadInput, match="There is no CUDA device here that torch"):
        parse(["--device", "cuda"])


def test_defaults():
    found = parse([])
    assert found.suites == ["rank_k", "factor"]
    assert found.dtypes == [torch.float32, torch.bfloat16]
    assert (found.rank_k_sizes, found.rows) == ((1536, 3072, 6144), 4096)
    assert found.factor_sizes == (3072,)
    assert found.threads == torch.get_num_threads()
    assert found.effort == Effort(12.0, 5, 40)
    assert found.json is found.load is found.kernels is None


def test_what_is_asked_for(tmp_path):
    words = "factor rank_k --rows 11 --dtype float64,float64 --threads 1 --kernels reference"
    more = f"--seconds 2 --multiplier 2.5 --json {tmp_path / 'x.json'}"
    found = parse([*words.split(), *more.split(), "--sizes", "7, 9"])
    assert found.suites == ["rank_k", "factor"]  # in the order in which they run
    assert (found.rank_k_sizes, found.factor_sizes, found.rows) == ((7, 9), (7, 9), 11)
    assert (found.dtypes, found.threads) == ([torch.float64], 1)
    assert found.kernels == ["reference"]
    assert (found.json, found.multiplier) == (tmp_path / "x.json", 2.5)
    assert found.effort.seconds == 2.0
    assert parse(["--quick"]).rank_k_sizes == (256, 384)
    assert parse(["--quick", "--sizes", "5"]).rank_k_sizes == (5,)


def test_a_model_brings_the_suite_that_needs_one():
    found = parse(["--load", "os:getcwd"])
    assert found.suites == ["rank_k", "factor", "collect"] and found.load_name == "os:getcwd"


def test_help_has_examples_and_names_the_exit_codes(capsys):
    with pytest.raises(SystemExit) as left:
        parse(["--help"])
    printed = capsys.readouterr().out
    assert left.value.code == 0
    assert "python -m fastcov.bench rank_k --sizes 1536,6144" in printed
    assert "The exit code is 0" in printed
    assert max(map(len, command._EPILOG.splitlines())) < 100


def test_bad_input_ends_the_command_with_2_before_any_work():
    done = subprocess.run(
        [sys.executable, "-m", "fastcov.bench", "rank_k", "--sizes", "0"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {BAD['--sizes 0']}\n"


ARGUMENTS = ["--quick", "--sizes", "24", "--rows", "32", "--threads", "1", "--dtype", "float32"]


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_all_suites_run_and_the_file_holds_what_was_printed(tmp_path, capsys):
    path = tmp_path / "run.json"
    assert main([*ARGUMENTS, "--json", str(path), "--multiplier", "1", "--load", "benchmarks.shapes:tiny"]) == 0
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


def test_what_was_finished_is_in_the_file_when_a_later_suite_breaks(tmp_path, monkeypatch, capsys):
    def broken(settings):
        raise BadInput("The model is not there; name another.")
        yield

    monkeypatch.setitem(command.SUITES, "factor", broken)
    path = tmp_path / "run.json"
    assert main(["rank_k", "factor", *ARGUMENTS, "--json", str(path)]) == 2
    assert capsys.readouterr().err == "error: The model is not there; name another.\n"
    assert {row.suite for row in load(path).rows} == {"rank_k"}


def test_a_run_begins_without_rows_and_with_its_command():
    run = command.new_run("python -m fastcov.bench", torch.device("cpu"))
    assert run.command == "python -m fastcov.bench"
    assert run.rows == [] and run.threads == torch.get_num_threads()
    assert run.date.endswith("+00:00")
