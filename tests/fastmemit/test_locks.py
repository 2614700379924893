"""Locks: one at a time, freed by whoever dies, and no obstacle where there are none."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastmemit import files as locks
from fastmemit.files import alone

HOLD = """
import sys, time
from pathlib import Path
from fastmemit.files import alone
with alone(Path(sys.argv[1]), "testing"):
    print("inside", flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "_PATIENCE", 0.02)
    monkeypatch.setattr(locks, "_POLL", 0.01)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process inside of the lock."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", HOLD, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None and process.stdout.readline() == "inside\n"
        yield process
        process.kill()


def test_it_leaves_no_file(tmp_path: Path) -> None:
    with alone(tmp_path / "deep" / "lock", "testing") as ours:
        assert ours and (tmp_path / "deep" / "lock").is_file()
    assert not list((tmp_path / "deep").iterdir())


def test_a_killed_process_frees_it_and_one_that_waits_says_so(
    tmp_path: Path, holder: subprocess.Popen[str], caplog: pytest.LogCaptureFixture
) -> None:
    def kill_when_told() -> None:
        while "another process is testing; waiting for it" not in caplog.text:
            time.sleep(0.01)
        holder.send_signal(signal.SIGKILL)

    thread = threading.Thread(target=kill_when_told)
    thread.start()
    with alone(tmp_path / "lock", "testing") as ours:
        assert ours and holder.wait(60) == -signal.SIGKILL
    thread.join()
    assert str(tmp_path / "lock") in caplog.text and len(caplog.records) == 1
    assert not list(tmp_path.iterdir())


def test_many_threads_go_in_one_by_one(tmp_path: Path) -> None:
    """Each removes the file on leaving, which must not let two in at once."""
    inside, most, rounds = 0, 0, 0

    def enter() -> None:
        nonlocal inside, most, rounds
        for _ in range(20):
            with alone(tmp_path / "lock", "testing"):
                inside += 1
                most = max(most, inside)
                time.sleep(0.0005)
                inside -= 1
                rounds += 1

    threads = [threading.Thread(target=enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, rounds) == (1, 80)


def test_an_error_inside_frees_it(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), alone(tmp_path / "lock", "testing"):
        raise KeyboardInterrupt
    with alone(tmp_path / "lock", "testing") as ours:
        assert ours


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    fcntl = pytest.importorskip("fcntl")

    def refuse(file: int, what: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with alone(tmp_path / "lock", "testing") as ours, alone(tmp_path / "lock", "testing"):
        assert not ours
    assert "file system without locks" in caplog.text
    open_files = Path("/proc/self/fd")
    if open_files.is_dir():
        assert not [f for f in open_files.iterdir() if str(tmp_path) in os.path.realpath(f)]


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_folder_that_takes_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(path: Path, *args: object) -> int:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OSError, match="lock") as caught, alone(tmp_path / "lock", "testing"):
        pass
    assert caught.value.errno == number


ANOTHER_USER = """
import os, sys
from pathlib import Path
from fastmemit.files import alone
os.setgid(2000), os.setuid(2001)
with alone(Path(sys.argv[1]), "testing") as ours:
    print(ours)
"""


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root becomes others")
@pytest.mark.parametrize("mode", [0o644, 0o600])
@pytest.mark.parametrize("folder", [0o777, 0o1777])
def test_what_another_user_has_left_is_no_obstacle(mode: int, folder: int) -> None:
    # Not in tmp_path, whose parents are for their owner alone.
    shared = Path(tempfile.mkdtemp())
    shared.chmod(folder)
    lock = shared / "lock"
    lock.touch()
    lock.chmod(mode)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", ANOTHER_USER, str(lock)]
    made = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    # One that nobody else may read cannot be locked either; then nobody waits.
    shutil.rmtree(shared)
    assert made.stdout == ("True\n" if mode == 0o644 else "False\n"), made.stderr


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(locks.os, "open", refused)
    with pytest.raises(PermissionError), alone(tmp_path / "lock", "testing"):
        pass
