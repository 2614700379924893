"""What each hooked module has given so far, and how much of the next batch it may still give.

Nothing in here waits for a device. Keys are counted by the mask, which is on the CPU; whether they are finite is asked
on the device, and looked at there once in many batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastcov.batching import sent
from fastcov.checkpoint import Taken
from fastcov.errors import BadInput, NonFiniteKeys, WrongWidth
from fastcov.hooks import isolated, key_rows
from fastcov.moments import SecondMoment


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


@dataclass(frozen=True)
class _Answer:
    """Whether a module's sum was finite after what it was given from some batches."""

    name: str
    dtype: torch.dtype
    first: int
    last: int
    finite: Tensor  # (), bool, on the device of the sum


class Finite:
    """Answers that were asked for and not looked at yet."""

    def __init__(self) -> None:
        self._answers: list[_Answer] = []

    @property
    def oldest(self) -> int | None:
        """The batch after which the oldest of them was asked for."""
        return self._answers[0].last if self._answers else None

    def ask(self, name: str, moment: SecondMoment, first: int, last: int) -> None:
        """Ask about a module's sum, to which keys of some batches were just added."""
        finite = moment.lower.diagonal().isfinite().all()
        self._answers.append(_Answer(name, moment.dtype, first, last, finite))

    def look(self, name: str = "", batch: int = -1, x: Tensor | None = None, mask: Tensor | None = None) -> None:
        """Look at all answers; this waits for their devices, once each.

        Args:
            name: A module whose keys are at hand, if there is one.
            batch: Which batch they are from.
            x: These keys (..., d_k), of which the message then says more.
            mask: Which of them count; None says that all do.

        Raises:
            NonFiniteKeys: Keys hold NaN or infinity, or their squares overflow the sum.
        """
        answers, self._answers = self._answers, []
        good: dict[int, bool] = {}
        for device in {answer.finite.device for answer in answers}:
            here = [i for i, answer in enumerate(answers) if answer.finite.device == device]
            read = torch.stack([answers[i].finite for i in here]).tolist()
            good.update(zip(here, read, strict=True))
        for i, answer in enumerate(answers):
            if not good[i]:
                at_hand = (answer.name, answer.first, answer.last) == (name, batch, batch)
                message = _late(answer) if x is None or not at_hand else _now(answer, x, mask)
                raise NonFiniteKeys(message)


def _now(answer: _Answer, x: Tensor, mask: Tensor | None) -> str:
    bad = ~x.isfinite().all(-1)
    if mask is not None:
        bad &= mask.to(x.device).reshape(bad.shape)
    rows = int(bad.sum())
    if rows == 0:
        return (
            f"The squares of the keys of {answer.name!r} overflow {answer.dtype} in batch "
            f"{answer.last} (largest key {float(x.abs().max()):.3g}); pass dtype=torch.float64."
        )
    return (
        f"{rows} of {bad.numel()} keys of {answer.name!r} hold NaN or infinity in batch "
        f"{answer.last}; "
        "run the model in another dtype (bfloat16 or float32)."
    )


def _late(answer: _Answer) -> str:
    where = (
        f"batch {answer.last}" if answer.first == answer.last else f"one of the batches {answer.first} to {answer.last}"
    )
    return (
        f"Keys of {answer.name!r} hold NaN or infinity, or their squares overflow {answer.dtype}, "
        f"in {where}; run the model in another dtype (bfloat16 or float32), or pass "
        "dtype=torch.float64."
    )


# Rows that one launch should have. On a CPU a kernel is efficient with a few hundred.
LAUNCH_ROWS = 8192
# Batches between two looks at what a GPU has found; on a CPU every batch is looked at.
_LOOK_EVERY = 16


class Kept:
    """Which tokens of one batch are keys.

    Args:
        mask: The batch's mask, non-zero means kept; None keeps every token.

    Attributes:
        count: How many tokens the mask keeps; None where there is none.
    """

    def __init__(self, mask: Tensor | None) -> None:
        # Once a batch: a mask that is on a GPU already has to be waited for here.
        self._mask = None if mask is None else mask.to("cpu", torch.bool)
        self.count = None if self._mask is None else int(self._mask.sum())
        self._cuts: dict[int, Tensor] = {}

    def first(self, rows: int, left: int | None) -> tuple[Tensor | None, int]:
        """The first `left` keys among some rows, counted row by row.

        Args:
            rows: How many rows there are, kept or not.
            left: How many keys may be taken, or None for all.

        Returns:
            A mask of the shape that the batch's has, or (rows,) where it has none, and how many keys it keeps. None
            keeps every row.
        """
        count = rows if self.count is None else self.count
        if left is None or count <= left:
            everything = self._mask is None or count == self._mask.numel()
            return (None if everything and count == rows else self._mask), count
        if left not in self._cuts:
            if self._mask is None:
                self._cuts[left] = torch.arange(rows) < left
            else:
                order = self._mask.flatten().cumsum(0).reshape(self._mask.shape)
                self._cuts[left] = self._mask & (order <= left)
        return self._cuts[left], left


@dataclass
class _Module:
    """One module's share of a tally."""

    name: str
    limit: int | None
    moment: SecondMoment
    ring: Ring | None = None
    waiting_since: int = -1  # the batch of the oldest key in the ring


class Tally:
    """Cuts the keys of each module at its budget, and sums them.

    Args:
        model: Where the modules are.
        wanted: How many keys of each, or None for all.
        dtype: Of the sums.
        launch_rows: How many rows a kernel should be given at once; batches that bring fewer wait in a ring. None takes
            `LAUNCH_ROWS` on a device and 1 on the CPU, which is no ring.
        look_every: After how many batches to look whether the sums are finite; None takes 1 on the CPU and 16
            elsewhere.
    """

    def __init__(
        self,
        model: nn.Module,
        wanted: Mapping[str, int | None],
        dtype: torch.dtype,
        launch_rows: int | None = None,
        look_every: int | None = None,
    ) -> None:
        self._model = model
        self._wanted = wanted
        self._dtype = dtype
        self._launch_rows = launch_rows
        self._look_every = look_every
        self._modules: dict[str, _Module] = {}
        self._found = dict.fromkeys(wanted, 0)  # those that wait in a ring included
        self._earlier: dict[str, Taken] = {}  # taken by an earlier run, not asked for yet
        self._finite = Finite()
        self._batch = -1
        self._before: dict[str, int] = {}
        self._kept = Kept(None)

    @property
    def wanted(self) -> Mapping[str, int | None]:
        """How many keys of each module are wanted, or None for all."""
        return self._wanted

    @property
    def batches(self) -> int:
        """How many batches were begun."""
        return self._batch + 1

    @property
    def tokens(self) -> int | None:
        """How many tokens the batch's mask keeps; None where it has no mask."""
        return self._kept.count

    @property
    def moments(self) -> dict[str, SecondMoment]:
        """The moments by module, in the order wanted; complete after `finish`."""
        return {name: self._modules[name].moment for name in self._wanted if name in self._modules}

    @property
    def most(self) -> int:
        """How many keys the module that took most has given."""
        return max(self._found.values(), default=0)

    def found(self, name: str) -> int:
        """How many of a module's keys were taken, or passed over."""
        return self._found[name]

    @isolated()
    def taken(self) -> dict[str, Taken]:
        """What every module has given, between two batches; views, not copies.

        Raises:
            NonFiniteKeys: See `fastcov.accumulate.Finite.look`.
        """
        self._finite.look()
        taken = dict(self._earlier)
        for name, module in self._modules.items():
            moment = module.moment
            waiting = None if module.ring is None else module.ring.rows
            since = module.waiting_since
            found = self._found[name]
            taken[name] = Taken(moment, module.limit, found, waiting, since, moment.device)
        return taken

    @isolated()
    def go_on(self, batches: int, taken: Mapping[str, Taken]) -> None:
        """Take over what an earlier run had after some batches; the next one is the one behind.

        What follows is summed in the same order, and so to the same bits.

        Args:
            batches: How many there were.
            taken: What `taken` gave then, for every module wanted.
        """
        self._batch = batches - 1
        self._earlier = {name: taken[name] for name in self._wanted}
        self._found = {name: one.found for name, one in self._earlier.items()}

    def describe(self) -> dict[str, Any]:
        """What decides on the order of the sums, as JSON values."""
        return {"dtype": str(self._dtype), "launch_rows": self._launch_rows or LAUNCH_ROWS}

    @isolated()
    def start(self, mask: Tensor | None) -> None:
        """Begin a batch with the mask of its tokens."""
        self._batch += 1
        self._kept = Kept(mask)
        self._before = dict(self._found)

    def pass_over(self, tokens: int) -> None:
        """Count the batch's keys and sum none of them: another process does.

        Args:
            tokens: How many positions the batch has, kept or not.
        """
        count = tokens if self._kept.count is None else self._kept.count
        for name, limit in self._wanted.items():
            found = self._found[name] + count
            self._found[name] = found if limit is None else min(found, limit)

    def took(self) -> dict[str, int]:
        """How many keys the batch gave, by module."""
        return {name: self.found(name) - before for name, before in self._before.items()}

    def done(self) -> bool:
        """Whether every budget is met."""
        return all(limit is not None and self.found(name) >= limit for name, limit in self._wanted.items())

    @isolated()
    def take(self, name: str, x: Tensor) -> None:
        """Add a module's keys x (..., d_k), as many as its budget leaves room for.

        Raises:
            WrongWidth: x is not as wide as the module, or the mask does not fit it.
            BadInput: x is not floating point.
            NonFiniteKeys: See `fastcov.accumulate.Finite.look`.
        """
        self._check(name, x)
        limit = self._wanted[name]
        left = None if limit is None else limit - self.found(name)
        if left == 0:
            return
        mask, count = self._kept.first(x.shape[:-1].numel(), left)
        pieces = list(key_rows(x, mask))
        module = self._modules.get(name) or self._begin(name, x.shape[-1], x.device)
        for rows, part in pieces:  # (n, d_k), (n,) on the CPU
            kept = rows.shape[0] if part is None else int(part.sum())
            if module.ring is not None and kept < self._rows(x.device):
                if module.ring.held == 0:
                    module.waiting_since = self._batch
                module.ring.add(rows, part)
            elif kept:
                some = None if part is None or kept == rows.shape[0] else sent(part, x.device)
                module.moment.update(rows, some, kept=kept, check=False)
                self._finite.ask(name, module.moment, self._batch, self._batch)
        self._found[name] += count
        if module.ring is not None and self._found[name] == limit:
            module.ring.close()
        if self._due(x.device):
            self._finite.look(name, self._batch, x if module.ring is None else None, mask)

    @isolated()
    def finish(self) -> None:
        """Sum what still waits, and look for the last time.

        Raises:
            NonFiniteKeys: See `fastcov.accumulate.Finite.look`.
        """
        for name in list(self._earlier):  # not one key more came
            self._begin(name, self._earlier[name].moment.d, self._earlier[name].device)
        for module in self._modules.values():
            if module.ring is not None:
                module.ring.close()
        self._finite.look()

    def _begin(self, name: str, d: int, device: torch.device) -> _Module:
        """A module's share: none, or what an earlier run took."""
        earlier = self._earlier.pop(name, None)
        if earlier is None:
            moment = SecondMoment(d, dtype=self._dtype, device=device)
            module = _Module(name, self._wanted[name], moment)
        else:
            moment = earlier.moment.to(device)
            module = _Module(name, earlier.limit, moment, None, earlier.waiting_since)
        size = self._rows(device)
        if size > 1:

            def full(rows: Tensor) -> None:
                moment.update(rows, check=False)
                self._finite.ask(name, moment, module.waiting_since, self._batch)
                module.waiting_since = self._batch

            module.ring = Ring(size, full)
            if earlier is not None and earlier.waiting is not None:
                module.ring.add(earlier.waiting.to(device))
        self._modules[name] = module
        return module

    def _rows(self, device: torch.device) -> int:
        if self._launch_rows is not None:
            return self._launch_rows
        return 1 if device.type == "cpu" else LAUNCH_ROWS

    def _due(self, device: torch.device) -> bool:
        every = self._look_every or (1 if device.type == "cpu" else _LOOK_EVERY)
        oldest = self._finite.oldest
        return oldest is not None and self._batch - oldest + 1 >= every

    def _check(self, name: str, x: Tensor) -> None:
        width = getattr(self._model.get_submodule(name), "in_features", None)
        module = self._modules.get(name)
        expected = module.moment.d if module is not None else width
        if isinstance(expected, int) and (x.dim() == 0 or x.shape[-1] != expected):
            raise WrongWidth(
                f"The input of {name!r} has shape {tuple(x.shape)} in batch {self._batch} but its "
                f"last dimension must be {expected}; name the projection whose input is the key."
            )
        if not x.is_floating_point():
            raise BadInput(f"The input of {name!r} is {x.dtype} and not floating point; name a projection.")
