"""A precompute that is killed goes on to the same files, byte for byte, and leaves nothing else."""

from __future__ import annotations

import copy
import errno
import logging
import math
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import fastcov
from fastmemit import statistics
from fastmemit.data import Corpus, corpora, corpus_from_texts
from fastmemit.edits import EditStack
from fastmemit.files import alone, lock_of
from fastmemit.models import find_adapter
from fastmemit.statistics import Collection, Statistics, StatisticsStore
from tiny_editors import texts, tiny_corpus
from tiny_models import tiny_model, tiny_tokenizer

ADAPTER, TOKENIZER = find_adapter(tiny_model("llama")), tiny_tokenizer()
NAMES = [ADAPTER.projection_name(layer) for layer in (0, 1)]
Capture = pytest.LogCaptureFixture


class Killed(Exception):
    """Stands in for the end of the process."""


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "BATCH_TOKENS", 120)


def store(folder: Path, seconds: float | None, adapter: Any = ADAPTER, tokenizer: Any = TOKENIZER) -> StatisticsStore:
    made = StatisticsStore(adapter, tokenizer, EditStack.of(adapter.model), folder)
    made.checkpoint_seconds = seconds
    return made


def run(folder: Path, kill_after: float = math.inf, seconds: float = 0, **more: Any) -> Any:
    """Precompute with a checkpoint after every batch; the statistics, and the batches that ran."""
    ran, counting = 0, False

    def count(*_: Any) -> None:
        nonlocal ran
        if not counting:
            return
        if ran >= kill_after:
            raise Killed
        ran += 1

    settings = {"layers": (0, 1), "multiplier": 6, "corpus": tiny_corpus(), **more}
    hook = ADAPTER.model.register_forward_pre_hook(count)
    ADAPTER.look()
    assert ADAPTER.traits.causal  # measured before runs are counted
    counting = True
    try:
        after = settings.pop("after", None)
        found = store(folder, seconds).collect(Collection(**settings), after=after)
    except Killed:
        found = None
    finally:
        hook.remove()
    return found, ran


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def contents(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in files(folder)}


@pytest.mark.parametrize("settings", [{}, {"bos": False, "max_length": 20, "multiplier": 12}], ids=str)
def test_killed_after_every_batch(tmp_path: Path, settings: dict[str, Any]) -> None:
    _, number = run(tmp_path / "whole", seconds=math.inf, **settings)
    whole = contents(tmp_path / "whole")
    assert number > 4 and len(whole) == 2
    for after in range(1, number):
        folder = tmp_path / str(after)
        assert run(folder, after, **settings) == (None, after)
        (kept,) = files(folder)
        assert kept.name.endswith(".checkpoint")
        assert run(folder, **settings)[1] == number - after
        assert contents(folder) == whole  # and no checkpoint, lock or temporary file any more


def test_killed_on_the_way_to_a_larger_multiplier(tmp_path: Path) -> None:
    def both(folder: Path, kill_after: float) -> tuple[int, int]:
        first, _ = run(folder, multiplier=2)
        return tuple(run(folder, k, after=first)[1] for k in (kill_after, math.inf))  # type: ignore[return-value]  # two runs

    number, none = both(tmp_path / "whole", math.inf)
    assert number > 2 and none == 0
    assert both(tmp_path / "parts", 2) == (2, number - 2)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_killed_between_two_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, number = run(tmp_path / "whole")
    save = fastcov.save_moment

    def killed_at_the_second(path: Path, *args: Any) -> None:
        if path.name.startswith(NAMES[1]):
            raise Killed
        save(path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(fastcov, "save_moment", killed_at_the_second)
        assert run(tmp_path / "parts") == (None, number)
    # The last checkpoint is one batch older than the end.
    assert run(tmp_path / "parts")[1] == 1
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_other_layers_leave_a_checkpoint_alone_until_it_is_useless(tmp_path: Path) -> None:
    run(tmp_path, 2)
    run(tmp_path, layers=(2,))
    assert [path.suffix for path in files(tmp_path)] == [".checkpoint", ".safetensors"]
    run(tmp_path, layers=(0, 1, 2))  # now that all of its layers are there
    assert [path.suffix for path in files(tmp_path)] == [".safetensors"] * 3


def test_unfinished_statistics_are_not_found(tmp_path: Path) -> None:
    run(tmp_path, 2)
    assert store(tmp_path, None).find((0, 1)) is None
    done, _ = run(tmp_path)
    found = store(tmp_path, None).find((0, 1))
    assert isinstance(found, Statistics) and found.paths == done.paths


@pytest.mark.parametrize("change", ["versions", "batches", "damage"])
def test_a_checkpoint_that_does_not_fit_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Capture, change: str
) -> None:
    run(tmp_path / "parts", 2)
    if change == "versions":
        changed = {**statistics.versions(), "torch": "9.9"}
        monkeypatch.setattr(statistics, "versions", lambda: changed)
    elif change == "batches":
        monkeypatch.setattr(corpora, "BATCH_TOKENS", 60)
    else:
        (path,) = files(tmp_path / "parts")
        path.write_bytes(path.read_bytes()[:-1])
    _, number = run(tmp_path / "whole")
    assert run(tmp_path / "parts")[1] == number
    assert "not used" in caplog.text
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_text_that_changed_under_its_name_is_noticed(tmp_path: Path, caplog: Capture) -> None:
    """A data set whose order is another one in a new version of its library, for example."""
    one, other = texts(60, 0), texts(60, 1)

    def named(documents: list[str]) -> Corpus:
        return Corpus("same", "c" * 64, lambda seed: iter(documents))

    run(tmp_path / "parts", 2, corpus=named(one))
    _, number = run(tmp_path / "whole", corpus=named(other))
    _, ran = run(tmp_path / "parts", corpus=named(other))
    assert ran == number
    assert "collecting begins anew" in caplog.text and "The text is not what it was" in caplog.text
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_what_can_only_end_the_same_way_is_not_kept(tmp_path: Path) -> None:
    with pytest.raises(fastcov.BudgetNotMet):
        run(tmp_path, corpus=corpus_from_texts("short", texts(4)))
    assert files(tmp_path) == []


def test_a_corpus_that_breaks_off_is_read_on(tmp_path: Path) -> None:
    broken: Callable[[], bool] = iter([True, False, False]).__next__

    def read(seed: int) -> Iterator[str]:
        breaks = broken()
        for number, text in enumerate(texts(60)):
            if breaks and number == 20:
                raise OSError("the line is down")
            yield text

    corpus = Corpus("far", "d" * 64, read)
    settings = {"corpus": corpus, "multiplier": 20}
    # A window of documents is read before its batches are run, so the windows are small here.
    with pytest.MonkeyPatch.context() as patch:
        bucket = fastcov.bucket
        patch.setattr(fastcov, "bucket", lambda documents, size: bucket(documents, size, window=8))
        with pytest.raises(OSError, match="the line is down"):
            run(tmp_path / "parts", **settings)
        assert [path.suffix for path in files(tmp_path / "parts")] == [".checkpoint"]
        _, again = run(tmp_path / "parts", **settings)
        _, number = run(tmp_path / "whole", **settings)
    assert 0 < again < number
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_temporary_files_of_the_killed_are_removed(tmp_path: Path) -> None:
    found, _ = run(tmp_path)
    home = next(iter(found.paths.values())).parent
    for path in found.paths.values():
        path.unlink()
    (home / ".collecting-0.checkpoint.123-abcd.tmp").write_bytes(b"half")
    run(tmp_path, 2)
    assert not list(home.glob("*.tmp"))


@pytest.mark.parametrize("refused", [False, True])
def test_killed_when_all_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: bool) -> None:
    def killed(self: fastcov.Checkpoint) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(fastcov.Checkpoint, "remove", killed)
        run(tmp_path)
    (home,) = (path.parent for path in tmp_path.rglob("*.checkpoint"))
    lock_of(home).touch()
    (home / ".collecting-0.checkpoint.123-abcd.tmp").write_bytes(b"half")
    assert len(files(tmp_path)) == 5
    if refused:  # what is there serves, in a folder that cannot be written too

        def refuse(path: Any, *args: Any) -> int:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

        with monkeypatch.context() as patch:
            patch.setattr(os, "open", refuse)
            assert run(tmp_path)[1] == 0
        assert len(files(tmp_path)) == 5
    assert run(tmp_path)[1] == 0
    assert [path.suffix for path in files(tmp_path)] == [".safetensors"] * 2


def test_it_does_not_wait_for_others_where_all_is_there(tmp_path: Path) -> None:
    run(tmp_path)
    home = files(tmp_path)[0].parent
    (home / ".half.tmp").touch()  # of the other one
    with alone(lock_of(home), "collecting other layers"):
        assert run(tmp_path)[1] == 0
        assert (home / ".half.tmp").exists()


@pytest.mark.parametrize("locks_there", [True, False])
def test_two_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks_there: bool, caplog: Capture) -> None:
    """Locks tell two threads from each other as they do two processes."""
    resume = fastcov.Checkpoint.resume
    if not locks_there:

        def refuse(*_: Any) -> None:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", refuse)
        begun = threading.Barrier(2)

        def both(*args: Any) -> Any:
            """Both have begun before either leaves a checkpoint that the other would go on from."""
            rest = resume(*args)
            begun.wait(60)
            return rest

        monkeypatch.setattr(fastcov.Checkpoint, "resume", both)
    counts, gate = [0, 0], threading.Barrier(2)
    # Made one after the other: they draw from one generator, and a tokenizer is not for two.
    made = [(find_adapter(tiny_model("llama")), copy.deepcopy(TOKENIZER)) for _ in counts]

    def collect(number: int) -> None:
        def counted(*_: Any) -> None:
            counts[number] += 1

        made[number][0].model.register_forward_pre_hook(counted)
        made[number][0].look()
        assert made[number][0].traits.causal
        counts[number] = 0  # what is measured is not counted
        gate.wait()
        store(tmp_path / "two", 0, *made[number]).collect(Collection(tiny_corpus(), (0, 1), 6))

    threads = [threading.Thread(target=collect, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    monkeypatch.setattr(fastcov.Checkpoint, "resume", resume)
    _, number = run(tmp_path / "one")
    assert sorted(counts) == ([0, number] if locks_there else [number, number])
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert ("without locks" in caplog.text) is not locks_there


def test_it_says_what_is_wrong_with_a_place_before_it_collects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Any, *args: Any, **more: Any) -> Any:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(OSError, match="Read-only file system"):
        run(tmp_path / "new")


def test_by_default_a_short_run_writes_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Capture
) -> None:
    monkeypatch.setattr("fastcov.store.write_checkpoint", None)  # to call it would raise
    with caplog.at_level(logging.INFO):
        found = store(tmp_path, None).collect(Collection(tiny_corpus(), (0, 1), 6))
    assert found.keys == 384
