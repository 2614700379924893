"""`torchrun ... -m fastmemit precompute`: the statistics of one process, or one sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import fastcov
from fastcov import FailedElsewhere, Processes
from fastmemit import parallel
from fastmemit.cli import main
from fastmemit.errors import BadConfig, BadCorpus
from fastmemit.parallel import agreed, for_verb, local_device, own_gpus, save_once, together
from tiny_commands import make_place, save_model
from tiny_editors import tiny_editor
from tiny_precompute import commands

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of two processes that have run `tiny_precompute.commands`."""
    at = tmp_path_factory.mktemp("two")
    make_place(at, save_model(at / "model"))
    (at / "other.jsonl").write_text(json.dumps({"text": "The capital of France is"}) + "\n")
    path = os.pathsep.join(str(ROOT / part) for part in (".", "python", "tests"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = [str(ROOT / "tests" / "tiny_precompute.py"), str(at)]
    ran = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", *script],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    return at


def said(two: Path, name: str) -> list[Any]:
    """Exit code, output and errors of a command, by process."""
    return [json.loads((two / f"said{rank}.json").read_text())[name] for rank in range(2)]


def moments(cache: Path) -> dict[str, tuple[fastcov.SecondMoment, dict[str, Any]]]:
    files = sorted(cache.glob("statistics/*/*-x4-*/*.safetensors"))
    return {path.name: fastcov.load_moment(path) for path in files}


@pytest.mark.slow
def test_torchrun_makes_the_statistics_of_one_process(two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (code, out, err), other = said(two, "plain")
    assert (code, err) == (0, "") and other == [0, "", ""]
    assert "256 keys" in out and "process 0 of 2: " in out
    at = two / "alone"
    plain = commands(two)["plain"]
    assert main([*plain[: plain.index("--cache")], "--cache", str(at), "--multiplier", "4", "--quartic"]) == 0
    capsys.readouterr()
    both, alone = moments(two / "shared"), moments(at)
    assert both.keys() == alone.keys() and len(both) == 3
    for name, (moment, provenance) in both.items():
        one, made_by_one = alone[name]
        assert moment.count == one.count == 256
        error = torch.linalg.matrix_norm((moment.sum - one.sum).double())
        # The same keys: only the order of additions differs, of 256 in float32.
        assert error <= 256 * 2.0**-24 * torch.linalg.matrix_norm(one.sum.double())
        assert moment.quartic is not None and one.quartic is not None
        assert float(moment.quartic) == pytest.approx(float(one.quartic), rel=1e-6)
        assert provenance["versions"].pop("processes") == "2"
        assert provenance == made_by_one


@pytest.mark.slow
def test_what_is_there_is_found_by_all_and_by_one_process_later(two: Path) -> None:
    (code, out, err), other = said(two, "again")
    assert (code, err) == (0, "") and other == [0, "", ""]
    assert "256 keys" in out and "process 0" not in out  # nothing was collected
    editor = an_editor(two)
    found = editor.store.find([0, 1, 2], 4)
    assert found is not None and found.keys == 256


@pytest.mark.slow
def test_without_a_shared_disk_each_writes(two: Path) -> None:
    own = [moments(two / f"own{rank}") for rank in range(2)]
    assert own[0].keys() == own[1].keys() and len(own[0]) == 3
    for name, (moment, _) in own[0].items():
        assert torch.equal(moment.sum, own[1][name][0].sum)


@pytest.mark.slow
def test_looks_on_the_way_are_shared_too(two: Path) -> None:
    (code, out, err), other = said(two, "auto")
    assert code == 0 and "second moments of 3 layers" in out, err
    assert other == [0, "", ""]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("too short", "but 64000 were wanted; pass more text, a smaller budget, or --allow-fewer."),
        ("another corpus", "has another corpus ("),
        ("no corpus in one", "There is no file"),
        ("self", "cannot be divided between processes; give a file, or run in one process."),
        ("no model", "There is no model folder"),
        ("not divided", "fastmemit experiment report runs in one process but torchrun started 2; only"),
    ],
)
def test_what_fails_in_one_or_all_is_said_once(two: Path, name: str, sentence: str) -> None:
    results = said(two, name)
    assert [code for code, _, _ in results] == [2, 2]
    assert [out for _, out, _ in results] == ["", ""]
    err = "".join(err for _, _, err in results)
    assert err.count("\n") == 1 and sentence in err


def an_editor(two: Path) -> Any:
    from fastmemit.editor import Editor

    return Editor.from_pretrained(str(two / "model"), device="cpu", cache_dir=two / "shared")


# -- without processes ----------------------------------------------------------------------------


def side_by_side(*works: Callable[[Processes], Any]) -> list[Any]:
    """Run functions in threads that are processes to each other; what they returned or raised."""
    store, found = dist.HashStore(), [None] * len(works)

    def run(rank: int) -> None:
        processes = Processes(store, rank, len(works), timeout=20)
        try:
            with processes.guarded():
                found[rank] = works[rank](processes)
        except Exception as error:
            found[rank] = error  # type: ignore[call-overload]  # the list begins with None alone

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found


def test_what_any_process_lacks_is_collected_by_all() -> None:
    identity = {"model": "m", "modules": ["a", "b", "c"]}
    assert (
        side_by_side(
            lambda p: agreed(p, identity, ["c"]),
            lambda p: agreed(p, identity, []),
            lambda p: agreed(p, identity, ["c", "a"]),
        )
        == [["a", "c"]] * 3
    )


def test_processes_with_other_models_collect_nothing() -> None:
    found = side_by_side(
        lambda p: agreed(p, {"model": "m", "modules": ["a"]}, ["a"]),
        lambda p: agreed(p, {"model": "n", "modules": ["a"]}, ["a"]),
    )
    (error,) = [error for error in found if isinstance(error, BadConfig)]
    assert "has another model (" in str(error) and "'n'" in str(error) and "'m'" in str(error)
    assert sum(isinstance(error, FailedElsewhere) for error in found) == 1


def test_a_file_is_written_once_where_all_see_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []

    def write(path: Path, moment: Any, provenance: Any) -> None:
        written.append(path)
        path.write_text("moment")

    monkeypatch.setattr(fastcov, "save_moment", write)
    moment = fastcov.SecondMoment(2)
    shared, own = tmp_path / "shared", [tmp_path / rank / "it" for rank in "01"]
    for path in own:
        path.parent.mkdir()
    assert side_by_side(*[lambda p: save_once(p, shared, moment, {})] * 2) == [None, None]
    assert written == [shared]
    assert side_by_side(*[lambda p: save_once(p, own[p.rank], moment, {})] * 2) == [None, None]
    assert sorted(written[1:]) == own


def test_one_process_is_not_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with together() as processes:
        assert processes is None and parallel.CURRENT.get() is None
    monkeypatch.setenv("WORLD_SIZE", "1")
    with for_verb("edit", divided=("precompute",)):
        assert parallel.CURRENT.get() is None


def test_the_gpus_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": 4, "RANK": 3, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    assert local_device(None) is None or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert (local_device(None), local_device("cuda")) == ("cuda:1", "cuda:1")
    assert (local_device("cpu"), local_device("cuda:0")) == ("cpu", "cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert own_gpus() == [4, 5, 6, 7] and local_device(None) == "cuda:4"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(BadConfig, match=r"than its 1 GPUs; start .* --nproc-per-node 1, or"):
        local_device(None)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert local_device(None) is None and own_gpus() is None


def test_text_that_the_model_writes_is_not_divided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    editor = tiny_editor(tmp_path, layers=None)
    token = parallel.CURRENT.set(Processes(dist.HashStore(), 0, 2))
    try:
        with pytest.raises(BadCorpus, match="written by one model as it goes"):
            editor.precompute("self", layers=[0])
    finally:
        parallel.CURRENT.reset(token)
