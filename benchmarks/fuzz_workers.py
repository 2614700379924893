"""Damaged files read one by one in a process with a limit on its memory and on its time.

What may come of a mutant:

    same        read, with the content of the valid file
    other       read, with other content: right for plain text and JSON, a defect under a checksum
    forged      read, with other content and a checksum that was made to fit it
    refused     an error of this package, or the reader's word that there is nothing to use
    unreadable  an error of the operating system
    crash       any other exception
    hang        no answer in time; the process was ended
    died        the process ended by itself: a signal, or an exit
    memory      far more memory was taken than the file has
    wordy       an error whose message is longer than a screen
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import logging
import multiprocessing
import random
import resource
import shutil
import tempfile
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import fuzz_mutations as mutations
from benchmarks.fuzz_readers import Absent, Reader, described, readers
from fastcov import FastcovError
from fastcov.bench.measure import peak_beyond
from fastmemit.errors import FastmemitError

DEFECTS = ("other under a checksum", "crash", "hang", "died", "memory", "wordy")
ROOM = 1 << 30  # address space that a process may take beyond what it has at its start
PEAK = (32 << 20, 64)  # bytes, and bytes for each byte of the file, that reading may need
_START = 120.0
PATIENCE = 10.0  # seconds for one file
_LONGEST_MESSAGE = 4000


@dataclass(frozen=True)
class Outcome:
    """What came of one mutant; reader, seed and number make it again."""

    reader: str
    seed: int
    number: int
    kind: str
    size: int
    result: str
    error: str = ""
    message: str = ""
    peak: int = 0


def mutant(reader: Reader, valid: bytes, seed: int, number: int, others: list[bytes]) -> Any:
    """The kind of a mutant, its bytes (None: a place), and whether its checksums were made to fit.

    The first ones of every reader are the places of `fuzz_mutations.PLACES`.
    """
    if number < len(mutations.PLACES):
        return mutations.PLACES[number], None, False
    draw = random.Random(f"{seed}:{reader.name}:{number}")
    informed = draw.random() < 0.6
    if reader.family == "safetensors" and informed:
        kind, data = mutations.damaged_header(draw, valid)
        if reader.seal is not None and draw.random() < 0.5:
            return f"{kind}, sealed", sealed(reader, data), True
        return kind, data, False
    if reader.family in ("json", "lines") and informed:
        kind, data = mutations.damaged_json(draw, valid, lines=reader.family == "lines")
        return kind, data, False
    if reader.damage is not None and informed:
        return *reader.damage(draw, valid), True
    kind, data = mutations.damaged_bytes(draw, valid, others)
    return kind, data, False


def run(reader: Reader, numbers: Iterable[int], seed: int, patience: float = PATIENCE) -> Iterator[Outcome]:
    """Read mutants in a process of their own, which is replaced when it hangs or dies."""
    fork = multiprocessing.get_context("fork")  # everything is imported already
    _valid_files()  # made once, and seen by every process
    waiting = list(numbers)
    while waiting:
        ours, theirs = fork.Pipe(duplex=False)
        worker = fork.Process(target=_work, args=(reader.name, tuple(waiting), seed, theirs))
        worker.start()
        theirs.close()
        try:
            if ours.poll(_START):  # the valid file is read, which may import much
                with contextlib.suppress(EOFError):  # it died, as will be seen
                    ours.recv()
            while waiting:
                if not ours.poll(patience):
                    worker.kill()
                    yield _lost(reader, waiting.pop(0), seed, "hang")
                    break
                try:
                    found = ours.recv()
                except EOFError:
                    worker.join()
                    yield _lost(reader, waiting.pop(0), seed, "died", str(worker.exitcode))
                    break
                waiting.pop(0)
                yield Outcome(**found)
        finally:
            worker.kill()
            worker.join()
            ours.close()


def is_defect(reader: Reader, outcome: Outcome) -> bool:
    """Whether the reader must be fixed."""
    under_checksum = reader.strict and outcome.result == "other"
    return under_checksum or outcome.result in DEFECTS


def _lost(reader: Reader, number: int, seed: int, result: str, error: str = "") -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        valid = reader.make(Path(folder)).read_bytes()
    kind, data, _ = mutant(reader, valid, seed, number, valid_others(reader))
    return Outcome(reader.name, seed, number, kind, len(data or b""), result, error)


def sealed(reader: Reader, data: bytes) -> bytes:
    """The file with checksums that fit, where its header can still be read as one."""
    size = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + size])
    except (ValueError, RecursionError):
        return data
    if not isinstance(header, dict):
        return data
    assert reader.seal is not None
    try:
        reader.seal(header, data[8 + size :])
        return mutations.with_header(json.dumps(header), data[8 + size :])
    except (ValueError, RecursionError):  # a number or a depth that json cannot write again
        return data


def valid_others(reader: Reader) -> list[bytes]:
    """Valid files of readers, without those that this one would rightly take for its own."""
    sealed = reader.seal is not None
    return [data for other, data in _valid_files() if not (sealed and other is reader.seal)]


@functools.cache
def _valid_files() -> list[tuple[Any, bytes]]:
    """A valid file of every reader, and by what its checksums are made."""
    found = []
    for reader in readers().values():
        with tempfile.TemporaryDirectory() as folder:
            found.append((reader.seal, reader.make(Path(folder)).read_bytes()))
    return found


def _work(name: str, numbers: tuple[int, ...], seed: int, pipe: Any) -> None:
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    reader = readers()[name]
    others = valid_others(reader)
    with tempfile.TemporaryDirectory() as folder:
        original = reader.make(Path(folder))
        valid = original.read_bytes()
        content = described(reader.read(original))  # and whatever is imported late is there
        pipe.send("ready")
        gc.collect()
        gc.freeze()
        _limit_memory()
        for number in numbers:
            kind, data, forged = mutant(reader, valid, seed, number, others)
            home = Path(folder, str(number))
            home.mkdir()
            path = reader.make(home)
            path.unlink()
            if data is None:
                mutations.put(kind, path)
            else:
                path.write_bytes(data)
            result: dict[str, Any] = {}
            peak = peak_beyond(functools.partial(attempt, reader, path, content, forged, result), _CPU)
            outcome = Outcome(name, seed, number, kind, len(data or b""), peak=peak or 0, **result)
            if outcome.peak > PEAK[0] + PEAK[1] * outcome.size:
                outcome = Outcome(**{**asdict(outcome), "result": "memory"})
            pipe.send(asdict(outcome))
            shutil.rmtree(home)
    pipe.close()


_CPU = torch.device("cpu")


def attempt(reader: Reader, path: Path, content: Any, forged: bool, found: dict[str, Any]) -> None:
    """Read one file; what came of it goes into `found`."""
    try:
        same = described(reader.read(path)) == content
    except Absent:
        found.update(result="refused", error="Absent")
    except (FastcovError, FastmemitError) as error:
        short = len(str(error)) <= _LONGEST_MESSAGE
        found.update(result="refused" if short else "wordy", error=type(error).__name__)
        found["message"] = str(error)[:400]
    except OSError as error:
        found.update(result="unreadable", error=type(error).__name__, message=str(error)[:400])
    except BaseException as error:
        with contextlib.suppress(BaseException):  # a traceback of a deep recursion may fail too
            found["message"] = "".join(traceback.format_exception(error, limit=-6))[-1500:]
        found.update(result="crash", error=type(error).__name__)
    else:
        found["result"] = "same" if same else "forged" if forged else "other"


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
