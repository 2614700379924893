"""What a `fastcov.collect` has summed so far, in a file, so that a killed one goes on from there.

One file has the state of all modules after the same batch, so it is consistent by itself. It holds everything that
decides on the bits of the sums to come: each sum as it is, the keys that wait for the next launch of a kernel, how many
batches there were, and a digest of their contents. The batches are then read again and not run.

`fastcov.checkpoint_file` describes the file.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastcov.batches import chained
from fastcov.checkpoint_file import Taken, read_checkpoint, write_checkpoint
from fastcov.errors import StaleCheckpoint, StoreDamaged
from fastcov.printable import printable_logger
from fastcov.store import atomic_file

if TYPE_CHECKING:
    from fastcov.tally import Tally

logger = printable_logger(__name__)

#: Seconds between two writes, and the share of the time that they may take beyond it.
SECONDS = 300.0
SHARE = 0.005

Batches = Iterable[Mapping[str, Any]]


class Checkpoint:
    """Where one `fastcov.collect` keeps what it has, and where the same one finds it again.

    What is damaged or of something else is reported, not used, and replaced by the next write. A write that fails is
    reported too, and the collect goes on: the file before it stays.

    Args:
        path: The file. Two collects must not have the same one at the same time.
        identity: JSON values: what the batches and the sums depend on (model, text, its order, the size of batches,
            versions). A checkpoint serves only where all of it is equal.
        seconds: At least so long between two writes; 0 writes after every batch, infinity never. None takes `SECONDS`,
            and longer where writing would take more than `SHARE` of the time.

    Raises:
        ValueError: `seconds` is negative or NaN.
    """

    def __init__(self, path: str | os.PathLike[str], identity: Mapping[str, Any], seconds: float | None = None) -> None:
        if seconds is not None and not seconds >= 0:
            raise ValueError(
                f"The seconds between two checkpoints must be 0 or more but are {seconds!r}; {SECONDS:g} is usual."
            )
        self.path = Path(path)
        self._identity = json.loads(json.dumps(dict(identity), sort_keys=True, allow_nan=False))
        self._seconds = seconds
        self._last = time.monotonic()
        self._took = 0.0  # the last write, in seconds
        self._batches = 0
        self._stream = b""  # a digest of all batches so far

    def resume(self, tally: Tally, batches: Batches) -> Iterator[Mapping[str, Any]]:
        """Give a tally what is kept, and pass over the batches that are in it.

        Args:
            tally: A new one.
            batches: The same as those of the interrupted run.

        Returns:
            The batches that are still to be run.

        Raises:
            StaleCheckpoint: They are not the same.
        """
        found = self._found(tally)
        self._batches, self._stream = 0, b""
        rest = self._read(batches)
        if found is not None:
            state, taken = found
            for _ in range(state["batches"]):
                if next(rest, None) is None:
                    break
            if (self._batches, self._stream.hex()) != (state["batches"], state["stream"]):
                raise StaleCheckpoint(
                    f"The text is not what it was when {str(self.path)!r} was written, somewhere "
                    f"in its {state['batches']} batches; delete that file and collect again."
                )
            tally.go_on(self._batches, taken)
            logger.info("going on behind batch %d of %s", self._batches, self.path)
        self._last = time.monotonic()
        return rest

    def keep(self, tally: Tally) -> None:
        """Write what a tally has, if it is time to.

        Raises:
            NonFiniteKeys: The sums hold NaN or infinity, which is found out before they are kept.
        """
        begun = time.monotonic()
        wait = max(SECONDS, self._took / SHARE) if self._seconds is None else self._seconds
        if begun - self._last < wait:
            return
        taken = tally.taken()
        state = {
            "identity": self._identity,
            "sums": tally.describe(),
            "machine": _machine(),
            "batches": self._batches,
            "stream": self._stream.hex(),
        }
        try:
            with atomic_file(self.path) as file:
                write_checkpoint(file, state, taken)
        except OSError as error:
            logger.warning("no checkpoint was written (%s); collecting goes on without", error)
        self._last = time.monotonic()
        self._took = self._last - begun

    def remove(self) -> None:
        """Forget what is kept, because it is not needed any more.

        Another user's is left where the folder lets nobody else remove it.
        """
        try:
            self.path.unlink(missing_ok=True)
        except PermissionError as error:
            logger.warning("a checkpoint that is not needed any more stays (%s)", error)

    def _read(self, batches: Batches) -> Iterator[Mapping[str, Any]]:
        """The batches, counted and digested as they are handed on."""
        for batch in batches:
            self._batches += 1
            self._stream = chained(self._stream, batch)
            yield batch

    def _found(self, tally: Tally) -> tuple[dict[str, Any], dict[str, Taken]] | None:
        """What is kept, if it is whole and of the same; else say why it is not used."""
        if not self.path.is_file():
            return None
        try:
            state, taken = read_checkpoint(self.path)
        except (StoreDamaged, OSError) as error:
            logger.warning("the checkpoint is not used: %s", error)
            return None
        limits = {name: module.limit for name, module in taken.items() if name in tally.wanted}
        stored = {**state["identity"], "order of the sums": state["sums"], "budget": limits}
        order = tally.describe()
        expected = {**self._identity, "order of the sums": order, "budget": dict(tally.wanted)}
        if differs := _differences(stored, expected):
            logger.warning("the checkpoint %s is of another %s and is not used", self.path, "; ".join(differs))
            return None
        if state["machine"] != _machine():
            logger.warning(
                "the checkpoint %s was written with %s and goes on with %s: the last bits may "
                "differ from those of an unbroken run",
                self.path,
                state["machine"],
                _machine(),
            )
        return state, taken


_ABSENT = object()


def _differences(stored: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """The fields that differ, each with the value in the file and the one that is expected."""
    differs = []
    for name in sorted(stored.keys() | expected.keys()):
        values = stored.get(name, _ABSENT), expected.get(name, _ABSENT)
        if values[0] != values[1]:
            said, wanted = ("nothing" if value is _ABSENT else f"{value!r:.80}" for value in values)
            differs.append(f"{name} ({said}, not {wanted})")
    return differs


def _machine() -> dict[str, Any]:
    """What last bits depend on besides the identity; another one is no reason to start again."""
    from fastcov.ops import kernels

    usable = [name for name, missing in kernels().items() if missing is None]
    return {"threads": torch.get_num_threads(), "kernels": usable}
