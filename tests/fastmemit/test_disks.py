"""Every file that is written, on a disk that refuses: the old one stays, and nothing beside it."""

from __future__ import annotations

import builtins
import errno
import io
import os
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fastcov
from fastcov.bench import report
from fastcov.files import atomic_file
from fastmemit.delta import Delta
from fastmemit.errors import DamagedFile
from fastmemit.experiments.report import write_report
from fastmemit.experiments.results import ResultsFile, gather, line_of
from fastmemit.models import save_model
from fastmemit.targets import Target, TargetKey, TargetStore
from tiny_commands import make_place, refused
from tiny_commands import save_model as save_tiny
from tiny_models import tiny_model
from tiny_sweeps import cell
from tiny_sweeps import write as write_sweep

Write = Callable[[Path, int], None]
Capture = pytest.CaptureFixture[str]
KEY = TargetKey("{}")


def _moment(folder: Path, seed: int) -> None:
    moment = fastcov.SecondMoment(40).update(torch.full((3, 40), float(seed)))
    fastcov.save_moment(folder / "m.safetensors", moment, {"seed": seed})


def _delta(folder: Path, seed: int) -> None:
    Delta({"w": (torch.full((50, 2), float(seed)), torch.ones(60, 2))}).save(folder / "edit")


def _target(folder: Path, seed: int) -> None:
    target = Target(torch.full((400,), float(seed)), torch.zeros(400), (1.0,))
    TargetStore(folder).put(KEY, target)


def _line(folder: Path, seed: int) -> None:
    ResultsFile(folder / "results.jsonl").append({"key": str(seed), "value": "x" * 2000})


def _in_order(folder: Path, seed: int) -> None:
    lines = line_of({"key": "a", "value": seed}) + line_of({"key": "b", "value": "y" * 2000})
    if seed == 0:
        (folder / "results-1of1.jsonl").write_bytes(lines)
        (folder / "results.jsonl").write_bytes(b"")
    else:
        gather(folder, ["b", "a"])


def _bench(folder: Path, seed: int) -> None:
    from fastcov.bench.__main__ import new_run

    report.save(new_run(f"test {seed}", torch.device("cpu")), folder / "run.json")


WRITERS: dict[str, Write] = {
    "moment": _moment,
    "delta": _delta,
    "target": _target,
    "line of results": _line,
    "results in order": _in_order,
    "benchmark": _bench,
}


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }  # fmt: skip


class Refusing(io.FileIO):
    """A file whose second write, or a long one from the middle on, is refused."""

    number = errno.ENOSPC
    room = 100

    def write(self, data: Any) -> int:
        data = memoryview(data).cast("B")
        free = max(self.room - self.tell(), 0)
        if free == 0 and len(data):
            raise OSError(self.number, os.strerror(self.number), self.name)
        return super().write(data[:free])


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    """Make the system refuse `what` from now on."""

    def now(what: str, number: int) -> None:
        def fail(*args: Any, **more: Any) -> Any:
            raise OSError(number, os.strerror(number), str(args[0]))

        if what == "write":
            real = builtins.open

            def opened(name: Any, mode: str = "r", *args: Any, **more: Any) -> Any:
                if "b" not in mode or not set(mode) & set("wxa+"):
                    return real(name, mode, *args, **more)
                raw = Refusing(name, mode.replace("b", ""))
                raw.number = number
                raw.room = (os.path.getsize(name) if "a" in mode else 0) + 100
                unbuffered = more.get("buffering", args[0] if args else -1) == 0
                return raw if unbuffered else io.BufferedWriter(raw)

            monkeypatch.setattr(builtins, "open", opened)
        elif what == "open":
            real_open = builtins.open
            monkeypatch.setattr(
                builtins,
                "open",
                lambda name, mode="r", *a, **k: real_open(name, mode, *a, **k) if mode in ("r", "rb") else fail(name),
            )
        else:
            monkeypatch.setattr(os, what, fail)

    return now


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("what", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refuse: Callable[[str, int], None],
    writer: str,
    what: str,
    number: int,
) -> None:
    if (writer, what) == ("line of results", "replace"):
        pytest.skip("it adds to a file and replaces none")
    WRITERS[writer](tmp_path, 0)
    before = contents(tmp_path)
    refuse(what, number)
    with pytest.raises(OSError) as caught:
        WRITERS[writer](tmp_path, 1)
    monkeypatch.undo()
    assert caught.value.errno == number
    assert contents(tmp_path) == before
    WRITERS[writer](tmp_path, 1)  # room again, and run again
    assert contents(tmp_path) != before


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_folder_that_takes_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuse: Callable[[str, int], None], writer: str, number: int
) -> None:
    WRITERS[writer](tmp_path, 0)
    before = contents(tmp_path)
    refuse("open", number)
    with pytest.raises(OSError) as caught:
        WRITERS[writer](tmp_path, 1)
    monkeypatch.undo()
    assert caught.value.errno == number and contents(tmp_path) == before


def test_a_report(tmp_path: Path, refuse: Callable[[str, int], None]) -> None:
    pytest.importorskip("matplotlib")
    folder = write_sweep(tmp_path / "sweep", [cell(multiplier=m) for m in (1.0, 2.0)])
    refuse("fsync", errno.ENOSPC)
    with pytest.raises(OSError, match="No space left"):
        write_report([folder], tmp_path / "out", resamples=20)
    assert contents(tmp_path / "out") == {}


@pytest.mark.parametrize("what", ["fsync", "replace"])
def test_a_saved_model(tmp_path: Path, refuse: Callable[[str, int], None], what: str) -> None:
    refuse(what, errno.ENOSPC)
    with pytest.raises(OSError, match="No space left"):
        save_model(tiny_model("llama"), None, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 300 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(place)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"mount cannot be run ({error})")
    if done.returncode:
        pytest.skip(f"no file system can be mounted here ({done.stderr.strip()})")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    for writer in WRITERS.values():
        writer(small_disk, 0)
    with open(small_disk / "filler", "wb", buffering=0) as file, pytest.raises(OSError):
        while file.write(bytes(4096)):
            pass
    before = contents(small_disk)
    for name, writer in WRITERS.items():
        with pytest.raises(OSError, match="No space left"):
            writer(small_disk, 1)
        assert contents(small_disk) == before, name


def test_a_precompute_on_a_disk_that_is_really_full(tmp_path: Path, capsys: Capture, small_disk: Path) -> None:
    (tmp_path / "place").mkdir()
    place = make_place(tmp_path / "place", save_tiny(tmp_path / "model"))
    (small_disk / "filler").write_bytes(bytes(290 * 1024))
    model = (*place.model[:2], "--cache", str(small_disk), "--quiet")
    line = refused(capsys, place, "precompute", *model, "--corpus", place.corpus, "--multiplier",
                   "2", "--layers", "0-2")  # fmt: skip
    assert line.startswith("No space left on device")
    left = [path for path in small_disk.rglob("*") if path.is_file() and path.name != "filler"]
    assert all(fastcov.load_moment(path)[0].count for path in left)


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    """The system's own EFBIG, with the signal that kills by default left as Python sets it."""
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN  # else the process would be gone
    for writer in WRITERS.values():
        writer(tmp_path, 0)
    before = contents(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
        for name, writer in WRITERS.items():
            with pytest.raises(OSError, match="File too large"):
                writer(tmp_path, 1)
            assert contents(tmp_path) == before, name
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("kind", ["moment", "delta", "target"])
def test_every_cut_and_many_flipped_bits_are_noticed(tmp_path: Path, kind: str) -> None:
    WRITERS[kind](tmp_path, 1)
    (path,) = (p for p in tmp_path.rglob("*") if p.is_file())
    data = path.read_bytes()
    cuts = [data[:size] for size in range(0, len(data), max(len(data) // 40, 1))]
    flips = []
    for where in range(0, len(data), max(len(data) // 120, 1)):
        flipped = bytearray(data)
        flipped[where] ^= 1 << where % 8
        flips.append(bytes(flipped))
    for spoilt in [*cuts, *flips, data + b"\0"]:
        path.write_bytes(spoilt)
        if kind == "target":  # a damaged one counts as absent and is made again
            assert TargetStore(tmp_path).get(KEY) is None
            continue
        with pytest.raises((fastcov.StoreDamaged, DamagedFile)):
            fastcov.load_moment(path) if kind == "moment" else Delta.load(path)


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_file(tmp_path / "f") as file:
        file.write(b"x")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
