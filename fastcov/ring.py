"""Rows held back until there are enough of them for one launch of a kernel.

A launch on a GPU reads and writes the whole triangle of the sum, whatever it adds; by the published rates of an H100
that takes as long as multiplying about 1053 rows. Batches that bring fewer keys are therefore copied together; those
that bring enough never come here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastcov.batches import sent


class Ring:
    """A buffer of keys that is handed on whenever it is full, and then filled from its start again.

    It takes ``size * d_k`` times the bytes of a key's number, allocated with the first keys: 268 MB for 8192 keys of
    GPT-J (d_k = 16384) in 16 bits.

    Args:
        size: How many rows to hand on at once.
        full: Called with rows (n, d_k), a view of the buffer, to be used before it returns (on a GPU: before what is
            launched later).
    """

    def __init__(self, size: int, full: Callable[[Tensor], None]) -> None:
        if size < 1:
            raise ValueError(f"A ring must hold at least 1 row but the size is {size}; pass more.")
        self._size = size
        self._full = full
        self._buffer: Tensor | None = None
        self._held = 0

    @property
    def held(self) -> int:
        """How many rows wait."""
        return self._held

    @property
    def rows(self) -> Tensor | None:
        """Those that wait (held, d_k), a view of the buffer; None where none does."""
        return self._buffer[: self._held] if self._held and self._buffer is not None else None

    def add(self, rows: Tensor, mask: Tensor | None = None) -> None:
        """Copy the kept rows, once, behind those that wait; the device is not waited for.

        Args:
            rows: Keys (n, d_k).
            mask: What to keep, bool (n,) on the CPU; None keeps all.
        """
        buffer = self._ready(rows)
        # Indices are made on the CPU: to find them on a GPU would be to wait for it.
        index = None if mask is None else sent(mask.nonzero().squeeze(1), rows.device)  # (m,)
        left = rows.shape[0] if index is None else index.shape[0]
        start = 0
        while left:
            fits = min(left, self._size - self._held)
            free = buffer[self._held : self._held + fits]
            if index is None:
                free.copy_(rows[start : start + fits])
            else:
                torch.index_select(rows, 0, index[start : start + fits], out=free)
            self._held += fits
            start += fits
            left -= fits
            if self._held == self._size:
                self.flush()

    def flush(self) -> None:
        """Hand on what waits, however little it is."""
        held, self._held = self._held, 0
        if held and self._buffer is not None:
            self._full(self._buffer[:held])

    def close(self) -> None:
        """Hand on what waits, and give the memory back."""
        self.flush()
        self._buffer = None

    def _ready(self, rows: Tensor) -> Tensor:
        """The buffer, made anew where it does not fit these rows."""
        buffer = self._buffer
        same = buffer is not None and (buffer.dtype, buffer.device, buffer.shape[1]) == (
            rows.dtype,
            rows.device,
            rows.shape[1],
        )
        if buffer is None or not same:
            self.close()
            buffer = rows.new_empty(self._size, rows.shape[1])
            self._buffer = buffer
        return buffer
