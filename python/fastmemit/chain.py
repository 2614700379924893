"""The bits that a weight had below each of the edits on it, without a copy for each.

The weight's bits without any edit are kept once. The bits between two edits come from adding the deltas again in their
order, to the copy that is nearest below, and a checksum that was taken when they were in the weight decides whether
these are they. A few copies are kept in between, so that going back through many edits does not begin at the bottom
every time.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmemit.delta import add_low_rank
from fastmemit.errors import BadUndo
from fastmemit.models import checksum

#: Copies of a weight beside the one without edits.
COPIES = 3
#: Further copies of bits that adding again does not give.
PINNED = 8

Factors = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class _Link:
    """One delta on the weight, the checksum with it, and what the addition may depend on."""

    owner: object
    factors: Factors
    checksum: str
    device: torch.device
    threads: int


class Chain:
    """The deltas on one weight.

    Args:
        weight: The weight, unedited.
    """

    def __init__(self, weight: Tensor) -> None:
        self._links: list[_Link] = []
        self._copies: dict[int, Tensor] = {0: weight.detach().clone()}  # below how many links
        self._pinned: set[int] = set()

    def __len__(self) -> int:
        """How many deltas there are."""
        return len(self._links)

    @property
    def checksum(self) -> str:
        """The checksum of the weight as it is to be now."""
        return self._links[-1].checksum if self._links else checksum(self._copies[0])

    def covered(self, weight: Tensor) -> Tensor:
        """A copy of the weight's bits, which another delta is about to cover.

        Raises:
            BadUndo: Adding the last delta again does not give these bits, and there are as many copies of such bits as
                may be.
        """
        place = len(self._links)
        if place in self._copies:
            return self._copies[place]
        copy = weight.detach().clone()
        below = self._copies.get(place - 1)
        if below is not None and not torch.equal(self._added(place - 1, below), copy):
            if len(self._pinned) >= PINNED:
                raise BadUndo(
                    f"Adding a delta to a weight on {weight.device} does not give the same bits "
                    f"twice, and {PINNED} copies are kept for that already; undo an edit first."
                )
            self._pinned.add(place)
        self._keep(place, copy)
        return copy

    def add(self, owner: object, factors: Factors, weight: Tensor, checksum: str) -> None:
        """Note a delta that was added to the weight.

        Args:
            owner: Whose it is.
            factors: The delta.
            weight: The weight with it.
            checksum: The weight's checksum.
        """
        link = _Link(owner, factors, checksum, weight.device, torch.get_num_threads())
        self._links.append(link)

    def cut(self, owner: object) -> None:
        """Forget the last delta if it is this one's, and copies of bits that nothing covers."""
        if self._links and self._links[-1].owner is owner:
            self._links.pop()
        for place in [place for place in self._copies if place >= max(len(self._links), 1)]:
            del self._copies[place]
            self._pinned.discard(place)

    def before(self) -> Tensor:
        """The bits below the last delta; the caller does not write to them.

        Raises:
            BadUndo: Adding the deltas again does not give them.
        """
        place = len(self._links) - 1
        start = max(below for below in self._copies if below <= place)
        if start == place:
            return self._copies[place]
        wanted = self._links[place - 1].checksum
        for recorded in (False, True):
            found = self._replayed(start, place, recorded=recorded)
            if checksum(found) == wanted:
                return found
        raise BadUndo(
            "The weights below this edit cannot be computed again bit for bit, because torch adds "
            "otherwise now than when the edits were applied (another device or library); load the "
            "model again to be rid of its edits."
        )

    def _replayed(self, start: int, place: int, *, recorded: bool) -> Tensor:
        bits = self._copies[start].clone()
        halfway = start + (place - start + 1) // 2
        for each in range(start, place):
            bits = self._added(each, bits, recorded=recorded, in_place=True)
            # Half of the way, then half of the rest: whoever goes back further will begin there.
            if each + 1 == halfway < place:
                halfway += (place - halfway + 1) // 2
                if checksum(bits) == self._links[each].checksum:
                    self._keep(each + 1, bits.clone())
        return bits

    def _added(self, place: int, bits: Tensor, *, recorded: bool = False, in_place: bool = False) -> Tensor:
        """The bits with the delta at a place on them."""
        link = self._links[place]
        bits = bits if in_place else bits.clone()
        if not recorded:
            add_low_rank(bits, *link.factors)
            return bits
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(link.threads)
            there = bits.to(link.device)
            add_low_rank(there, *link.factors)
            return there.to(bits.device)
        finally:
            torch.set_num_threads(threads)

    def _keep(self, place: int, copy: Tensor) -> None:
        """Keep a copy; where there are too many, drop the one that is missed least.

        That is the one whose neighbours are nearest to each other, as seen from the top.
        """
        self._copies[place] = copy
        free = sorted(self._copies.keys() - self._pinned - {0})
        if len(free) > COPIES:
            places = [*sorted(self._copies), len(self._links) + 1]

            def missed(one: int) -> float:
                at = places.index(one)
                return (places[at + 1] - places[at - 1]) / (places[-1] - one + 1)

            with suppress(KeyError):
                del self._copies[min(free[:-1], key=missed)]
