"""Precomputes that are killed at random moments and started again, against an unbroken one."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# What a process was doing when it was killed; it writes the number where its parent reads it.
PHASES = (
    "starting",
    "before the first checkpoint",
    "writing a checkpoint",
    "between checkpoints",
    "writing the statistics",
    "removing the checkpoint",
    "finished",
)
STARTING, BEFORE, WRITING, BETWEEN, SAVING, TIDYING, FINISHED = range(len(PHASES))
_PRELOAD = [
    "fastmemit.statistics",
    "fastmemit.models",
    "tiny_editors",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
]
_PATIENCE = 300.0  # seconds that a process may take
_FILE = 10  # how many batches the writing of a final file counts for, when a moment is drawn
_PAIRS = 3  # how often two run at once
_LATER = 0.01  # up to so many seconds after the moment drawn


@dataclass
class Kills:
    """What happened to the processes of all cycles.

    Attributes:
        phases: How many were killed doing what.
        temporary: Files under a temporary name that they left for the next run to remove.
        kept: Kills that left a checkpoint.
        torn: Files under their own name that are not whole; there must be none.
        leftovers: Files besides the statistics after a finished cycle; there must be none.
        different: Cycles whose statistics are not those of the unbroken run, byte for byte.
    """

    phases: Counter[str] = field(default_factory=Counter)
    temporary: int = 0
    kept: int = 0
    torn: list[str] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)
    different: list[int] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Whether nothing was lost."""
        return not (self.torn or self.leftovers or self.different)


def soak_kills(
    cycles: int, *, seconds: Sequence[float], multiplier: float, seed: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Kill and resume, cycle by cycle; each is killed once or more, and then runs to its end.

    A moment is drawn among the batches and the files of a whole pass, so that a machine that is slower now than it was
    before does not change where the kills fall.

    Args:
        cycles: How many.
        seconds: Between two checkpoints; the cycles take turns.
        multiplier: How long a pass is.
        seed: Of the moments.
        say: Called with a line now and then.

    Returns:
        JSON values.

    Raises:
        SystemExit: The unbroken precompute left no file, or another one failed.
    """
    draw, kills = random.Random(seed), Kills()
    # A clean server forks the processes, so that each costs no import; it has started no thread.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    # The server is to import what this process does, before it is told its search path.
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        at = Path(name)
        start = Starter(context, multiplier)
        start(at / "warm").join(_PATIENCE)
        begun = time.perf_counter()
        start(at / "whole").join(_PATIENCE)
        took, steps = time.perf_counter() - begun, start.steps.value
        wanted = _contents(at / "whole")
        if not wanted:
            raise SystemExit("The unbroken precompute left no file.")
        say(f"an unbroken precompute takes {took:.2f} s")
        batches = [_two_at_once(start, at / f"two-{number}", wanted) for number in range(_PAIRS)]
        for cycle in range(cycles):
            folder, killed = at / f"cycle-{cycle}", 0
            start.seconds = seconds[cycle % len(seconds)]
            while True:
                process = start(folder)
                moment = draw.randrange(steps)
                while process.exitcode is None and start.steps.value < moment:
                    process.join(0.001)
                process.join(draw.uniform(0, _LATER))
                process.kill()  # SIGKILL: nothing in it can notice
                process.join(_PATIENCE)
                if process.exitcode == 0 and killed:
                    break
                if process.exitcode == 0:  # too late: the cycle would have no kill
                    shutil.rmtree(folder)
                elif process.exitcode == -signal.SIGKILL:
                    killed += 1
                    kills.phases[PHASES[start.phase.value]] += 1
                    _inspect(folder, kills)
                else:
                    raise SystemExit(f"A precompute failed with exit code {process.exitcode}.")
            found = _contents(folder)
            kills.leftovers += [f"{cycle}: {path}" for path in sorted(found.keys() - wanted.keys())]
            if any(found.get(path) != data for path, data in wanted.items()):
                kills.different.append(cycle)
            shutil.rmtree(folder)
            if (cycle + 1) % 10 == 0:
                say(f"{cycle + 1} cycles, {sum(kills.phases.values())} kills")
    return {
        "cycles": cycles,
        "kills": sum(kills.phases.values()),
        "killed_while": {phase: kills.phases[phase] for phase in PHASES},
        "kills_that_left_a_checkpoint": kills.kept,
        "temporary_files_left_by_kills": kills.temporary,
        "batches_of_two_at_once": batches,
        "torn_files": kills.torn,
        "files_left_after_a_cycle": kills.leftovers,
        "cycles_with_other_bits": kills.different,
        "sound": kills.sound and all(min(pair) == 0 for pair in batches),
        "seconds_unbroken": round(took, 3),
        "checkpoint_seconds": list(seconds),
        "multiplier": multiplier,
        "seed": seed,
    }


def _two_at_once(start: Starter, folder: Path, wanted: dict[Path, bytes]) -> list[int]:
    """Two precomputes of the same; how much each of them did. One of them has nothing to do."""
    other = Starter(start._context, start._multiplier)
    processes = [start(folder), other(folder)]
    for process in processes:
        process.join(_PATIENCE)
    if [process.exitcode for process in processes] != [0, 0] or _contents(folder) != wanted:
        raise SystemExit("Two precomputes at once did not make what one makes.")
    return [start.steps.value, other.steps.value]


class Starter:
    """Starts precomputes that say what they are doing.

    Attributes:
        phase: What the last one is or was doing, an index of `PHASES`.
        seconds: Between two checkpoints.
        steps: How many batches and files it has done, files counted as `_FILE`.
    """

    def __init__(self, context: Any, multiplier: float) -> None:
        self._context, self._multiplier = context, multiplier
        self.seconds = math.inf
        self.phase = context.Value("i", STARTING, lock=False)
        self.steps = context.Value("i", 0, lock=False)

    def __call__(self, folder: Path) -> Any:
        """Start one that keeps its files in this folder."""
        self.phase.value, self.steps.value = STARTING, 0
        arguments = (folder, self.seconds, self._multiplier, self.phase, self.steps)
        process = self._context.Process(target=_precompute, args=arguments)
        process.start()
        return process


def _precompute(folder: Path, seconds: float, multiplier: float, phase: Any, steps: Any) -> None:
    """One precompute of a tiny model, in a process of its own."""
    import torch

    import fastcov
    from fastcov import store as stored
    from fastmemit import statistics
    from fastmemit.data import corpora
    from fastmemit.edits import EditStack
    from fastmemit.models import find_adapter
    from fastmemit.statistics import Collection, StatisticsStore
    from tiny_editors import tiny_corpus
    from tiny_models import tiny_model, tiny_tokenizer

    torch.set_num_threads(1)
    corpora.BATCH_TOKENS = 256  # many batches, so many moments
    write, save, remove = stored.atomic_file, fastcov.save_moment, stored.Checkpoint.remove

    @contextlib.contextmanager
    def told(path: Path) -> Iterator[Any]:
        moment = phase.value == SAVING
        phase.value = SAVING if moment else WRITING
        with write(path) as file:
            yield file
        phase.value = SAVING if moment else BETWEEN

    def saving(*args: Any) -> None:
        phase.value = SAVING
        save(*args)
        steps.value += _FILE

    def removing(self: Any) -> None:
        phase.value = TIDYING
        remove(self)

    class Batches:
        """Counts batches where a bar of keys would."""

        def __init__(self, what: str) -> None:
            self._counts = what == "keys"

        def __call__(self, keys: int) -> None:
            steps.value += self._counts

        def note(self, text: str) -> None:
            """Says nothing."""

    @contextlib.contextmanager
    def bar(what: str, *_: Any) -> Iterator[Any]:
        yield Batches(what)

    statistics.bar = bar  # type: ignore[attr-defined]  # imported there, and no name of its own
    stored.atomic_file, fastcov.save_moment = told, saving  # type: ignore[assignment]  # these count as they write
    stored.Checkpoint.remove = removing  # type: ignore[method-assign]  # the moment is told
    phase.value = BETWEEN if list(folder.rglob("*.checkpoint")) else BEFORE
    adapter = find_adapter(tiny_model("llama"))
    store = StatisticsStore(adapter, tiny_tokenizer(), EditStack.of(adapter.model), folder, progress=True)
    store.checkpoint_seconds = seconds
    store.collect(Collection(tiny_corpus(1500), (0, 1), multiplier))
    phase.value = FINISHED


def _contents(folder: Path) -> dict[Path, bytes]:
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def _inspect(folder: Path, kills: Kills) -> None:
    """Read whatever a killed process left."""
    import fastcov
    from fastcov.store import read_checkpoint

    checkpoints = list(folder.rglob("*.checkpoint"))
    kills.kept += bool(checkpoints)
    kills.temporary += len(list(folder.rglob("*.tmp")))
    for path in [*checkpoints, *folder.rglob("*.safetensors")]:
        try:
            (read_checkpoint if path in checkpoints else fastcov.load_moment)(path)
        except fastcov.FastcovError as error:
            kills.torn.append(str(error))
