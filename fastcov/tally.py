"""What each hooked module has given so far, and how much of the next batch it may still give.

Nothing in here waits for a device. Keys are counted by the mask, which is on the CPU; whether they are finite is asked
on the device, and looked at there once in many batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastcov.batches import sent
from fastcov.checkpoint_file import Taken
from fastcov.errors import BadInput, WrongWidth
from fastcov.finite import Finite
from fastcov.keys import key_rows
from fastcov.mode import isolated
from fastcov.moments import SecondMoment
from fastcov.ring import Ring

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
            NonFiniteKeys: See `fastcov.finite.Finite.look`.
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
            NonFiniteKeys: See `fastcov.finite.Finite.look`.
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
            NonFiniteKeys: See `fastcov.finite.Finite.look`.
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
