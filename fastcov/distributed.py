"""Several processes that collect one moment together, and what they tell each other meanwhile.

Sums are added by `torch.distributed`; everything else is said through its key-value store, because a collective
operation waits for ever for a process that has failed, and a store can be asked. So a failure in one process reaches
the others at their next batch, wherever they are.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastcov.errors import FailedElsewhere, FastcovError, ProcessLost

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store
    from torch.distributed import ProcessGroup

#: How long a process may give no sign of life, in seconds. A sign is a batch, or a file written.
TIMEOUT = 3600.0

_FAILED = "failed"
_WAIT = (0.002, 0.25)  # seconds between two looks into the store: the first, and the most
_PANEL_BYTES = 64 << 20  # of a sum that are copied and added up at a time
_PANEL_ROWS = 256  # and its rows at least: smaller sums are one panel


class Processes:
    """This process and the others that do the same work; all must make the same calls of `gather` in the same order.

    Args:
        store: What `torch.distributed` keeps its keys in, under a prefix of its own.
        rank: Which one this is, from 0, of `size`.
        size: How many there are.
        timeout: See `TIMEOUT`.

    Raises:
        ValueError: A rank outside of ``[0, size)``.
    """

    def __init__(self, store: Store, rank: int, size: int, *, timeout: float = TIMEOUT) -> None:
        if not 0 <= rank < size:
            raise ValueError(f"The rank {rank} is not among {size} processes; give one from 0 to {size - 1}.")
        self.rank, self.size = rank, size
        self._store, self._timeout = store, timeout
        self._round = 0

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and speaks for all."""
        return self.rank == 0

    def runs(self, batch: int) -> bool:
        """Whether a batch of this number, from 0, is this process's to run."""
        return batch % self.size == self.rank

    def check(self) -> None:
        """Give a sign of life, and look whether another process has failed.

        Raises:
            FailedElsewhere: One has.
            ProcessLost: The store is gone, and with it the process that kept it.
        """
        with self._asking():
            self._store.add(f"alive/{self.rank}", 1)
            failed = self._store.check([_FAILED])
        if failed:
            raise self._elsewhere()

    def gather(self, what: str, value: Any = None) -> list[Any]:
        """What each process says, by rank, as JSON values; so nobody goes on before all have come this far.

        All name the same `what`.

        Raises:
            FailedElsewhere: A process failed before it came here.
            ProcessLost: One gave no sign of life for too long.
            FastcovError: The processes do not do the same.
        """
        number, self._round = self._round, self._round + 1
        with self._asking():
            self._store.set(f"{number}/{self.rank}", json.dumps([what, value]))
        said = [self._said(number, rank) for rank in range(self.size)]
        for rank, (other, _) in enumerate(said):
            if other != what:
                raise FastcovError(
                    f"Process {rank} has come to {other!r} where process {self.rank} is at "
                    f"{what!r}; start all of them with the same command."
                )
        return [value for _, value in said]

    def leave(self) -> None:
        """Wait until all are done: nobody leaves while another may still fail.

        Raises:
            FailedElsewhere: Another process failed.
            ProcessLost: One gave no sign of life for too long.
        """
        self.gather("the end")
        with self._asking():
            left = self._store.add("left", 1)
            until = time.monotonic() + 10.0
            # The first one may be the store's keeper, with whom it is gone.
            while self.first and left < self.size and time.monotonic() < until:
                time.sleep(_WAIT[0])
                left = self._store.add("left", 0)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Tell the others of any error inside the block.

        The first of several that fail raises its own error: one sentence is printed, not many.

        Raises:
            FailedElsewhere: Another process failed, and before this one.
        """
        try:
            yield
        except FailedElsewhere:
            raise
        except BaseException as error:
            said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            mine = json.dumps([self.rank, said])
            try:
                first = self._store.compare_set(_FAILED, "", mine).decode()
            except RuntimeError:  # the store is gone: this error is the one to see
                first = mine
            if first != mine:
                raise self._elsewhere() from error
            raise

    def _said(self, number: int, rank: int) -> list[Any]:
        """What a process said in a round, as soon as it has."""
        key, wait = f"{number}/{rank}", _WAIT[0]
        seen, since = -1, time.monotonic()
        while True:
            self.check()
            with self._asking():
                if self._store.check([key]):
                    said: list[Any] = json.loads(self._store.get(key))
                    return said
                alive = self._store.add(f"alive/{rank}", 0)
            if alive != seen:
                seen, since = alive, time.monotonic()
            elif time.monotonic() - since > self._timeout:
                raise ProcessLost(
                    f"Process {rank} of {self.size} has given no sign of life for "
                    f"{self._timeout:g} seconds; see what became of it, and run again.",
                    rank=rank,
                )
            time.sleep(wait)
            wait = min(2 * wait, _WAIT[1])

    @contextmanager
    def _asking(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # torch's errors of the network are of this type
            raise ProcessLost(
                f"Process {self.rank} of {self.size} can no longer reach the others "
                f"({str(error).splitlines()[0]:.120}); see which of them has ended, and run again."
            ) from error

    def _elsewhere(self) -> FailedElsewhere:
        rank, said = json.loads(self._store.get(_FAILED))
        return FailedElsewhere(f"Process {rank} of {self.size} failed ({said})", rank=rank)


def add_up_lower(lower: Tensor, group: ProcessGroup | None = None) -> None:
    """Add up the lower triangles of all processes' matrices (d, d), in place.

    Panels of rows go one after the other, each as wide as its last row, so that little more than half of the matrix is
    sent and little memory is needed. What lies above the diagonal is undefined afterwards, as it was before.
    """
    import torch.distributed as dist

    d = lower.shape[0]
    device = reducing_device(lower.device)
    rows = max(_PANEL_ROWS, -(-d // 16))
    rows = max(1, min(rows, _PANEL_BYTES // (lower.element_size() * d)))
    for start in range(0, d, rows):
        stop = min(start + rows, d)
        own = lower[start:stop, :stop]
        panel = own.to(device).contiguous()
        dist.all_reduce(panel, group=group)
        if panel.data_ptr() != own.data_ptr():
            own.copy_(panel)


def reducing_device(device: torch.device) -> torch.device:
    """Where a sum that lives on a device is added up with those of other processes.

    NCCL has one device for each process; sums on others, of a model that is spread over several, go by way of the CPU.
    """
    own = device.type == "cuda" and device.index in (None, torch.cuda.current_device())
    return device if own else torch.device("cpu")
