"""When keys are enough: a rule that stops collecting once the solution is near its limit.

The update for a key k runs along ``u = S^-1 k / (k^T S^-1 k)``, with S the mean of n keys. What it disturbs in other
text is ``u^T C u``, with C what S tends to, and the least it can disturb is ``1 / (k^T C^-1 k)``. By Pythagoras

    excess = (u^T C u) / least - 1 = ||u - best||^2 / ||best||^2        in the norm of C,

the share that is disturbed needlessly: in the mean ``(d - 1) / (n - d)`` for Gaussian keys (Reed, Mallett and Brennan,
1974), and but for terms of the order of 1 / n what S^-1 alone is off by,

    leverage = mean over fresh keys of k^T S^-1 k / d = n / (n - d - 1).

That one is measured from two sums alone: the keys that came after S are fresh to it. Leave one key out of S, and by
Sherman and Morrison its leverage rises from h to ``h / (1 - h / n)``; so for independent keys of any distribution

    leverage = 1 / (1 - c d / n),        c = trace((S + ridge)^-1 S) / d,

with c = 1 without a ridge. Tokens of a document share its topic: c is then larger, and is measured.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastcov.errors import BadInput, NotPositiveDefinite
from fastcov.hooks import isolated
from fastcov.linalg import factorize, place_of_float64, regularised
from fastcov.moments import SecondMoment, budget, check_moment

logger = logging.getLogger(__name__)


#: The excess that is good enough: what an edit disturbs is at most half more than the least.
TOLERANCE = 0.5
#: The bound on the keys, as a multiplier: what is recommended where nothing is measured.
LIMIT = 10.0

_BLOCK = 1024  # rows of the triangle that are multiplied at a time


@dataclass(frozen=True)
class Look:
    """What the rule saw in a moment."""

    keys: int
    multiplier: float  # the keys over their width
    #: Mean ``k^T A^-1 k`` of the keys since the last look, over that of the keys before, with A of the keys before;
    #: infinite or NaN where there was nothing to solve with.
    leverage: float
    worth: float  # c of the law, how many keys are worth one independent key; NaN where not known
    excess: float  # by the law, what an edit disturbs needlessly over the least; infinite where not known


def checkpoints(d_k: int, limit: float = LIMIT) -> list[int]:
    """The numbers of keys to look at: the width d_k, 1.5, 2, 3, 4, 5, 6, 8, 10, 15 of it, and so on, up to `limit`.

    Each look costs a factorisation, and what a coarser step costs is keys that were not needed. BadInput as `budget`.
    """
    last = budget(limit, d_k)
    steps = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)  # of each decade
    decades = range(1 + max(0, math.ceil(math.log10(limit))))
    looks = [budget(step * 10**decade, d_k) for decade in decades for step in steps]
    return [keys for keys in looks if keys < last] + [last]


class StoppingRule:
    """Whether the moment of one module has enough keys, asked each time that it has grown.

    A look costs one factorisation in float64 and products with random signs, which estimate traces (Hutchinson, 1990).
    The signs are the same each time, so equal moments give equal decisions. `looks` has a `Look` for each update.

    Args:
        tolerance: The excess that is good enough, above 0.
        limit: The multiplier at which it is enough in any case.
        relative_ridge: That of the solution, as in `fastcov.regularised`; with one, fewer keys are enough.
        probes: How many vectors of signs, at least 1.

    Raises:
        ValueError: A tolerance or a number of probes that is not above 0.
        BadInput: A limit that is not above 0.
    """

    def __init__(
        self, *, tolerance: float = TOLERANCE, limit: float = LIMIT, relative_ridge: float = 0.0, probes: int = 64
    ) -> None:
        if not tolerance > 0:
            raise ValueError(
                f"The tolerance of a stopping rule must be above 0 but is {tolerance!r}; {TOLERANCE} is usual."
            )
        if probes < 1:
            raise ValueError(f"There must be at least 1 probe but there are {probes}; pass more.")
        budget(limit, 1 << 30)  # raises where that is no multiplier
        self._tolerance, self._limit = tolerance, limit
        self._ridge, self._probes = relative_ridge, probes
        self._before: _Probed | None = None
        self.looks: list[Look] = []

    @property
    def converged(self) -> bool:
        """Whether the last look was within the tolerance, and not merely at the limit."""
        return bool(self.looks) and self.looks[-1].excess <= self._tolerance

    @isolated()
    def update(self, moment: SecondMoment) -> bool:
        """Look at a moment that has grown: the keys of the last look are its first.

        Returns:
            True where it is enough: the excess is within the tolerance, or the limit is reached.

        Raises:
            BadInput: It is no moment, is of another width than the one before, or has no more keys than at the last
                look.
            NonFinite: The sum holds NaN or infinity.
        """
        check_moment(moment, "A stopping rule")
        n, d = moment.count, moment.d
        if self.looks and n <= self.looks[-1].keys:
            raise BadInput(
                f"The moment has {n} keys and had {self.looks[-1].keys} at the last look; "
                "add keys to it before it is looked at again."
            )
        leverage, worth, excess = math.nan, math.nan, math.inf
        if (before := self._before) is not None:
            if len(before.V) != d:
                raise BadInput(
                    f"The moment is {d} wide and the one before was {len(before.V)}; make a rule for each module."
                )
            leverage = before.leverage(moment)
            if math.isfinite(leverage):
                worth = (1 - 1 / leverage) * before.count / d if leverage > 0 else math.nan
                left = 1 - worth * d / n
                excess = 1 / left - 1 if left > 0 else math.inf
        self.looks.append(Look(n, n / d, leverage, worth, excess))
        logger.info("%d keys of width %d: leverage %.3f, excess %.3f", n, d, leverage, excess)
        if self.converged or n >= budget(self._limit, d):
            self._before = None
            return True
        self._before = _probed(moment, self._ridge, self._probes)
        return False


@dataclass(frozen=True)
class _Probed:
    """What is held of a moment: ``V = L^-T Z`` with L of its A and Z random signs, (d, m)."""

    V: Tensor
    count: int
    form: float  # sum of v^T (sum of k k^T) v, over the columns v of V

    def leverage(self, later: SecondMoment) -> float:
        """Mean ``k^T A^-1 k`` of the keys that were added, over that of the ones before."""
        grown = _form(later.lower, self.V) - self.form
        return (grown / (later.count - self.count)) / (self.form / self.count)


def _probed(moment: SecondMoment, ridge: float, probes: int) -> _Probed | None:
    """The moment, seen by the probes; None where there is nothing to solve with."""
    if moment.count <= moment.d and ridge == 0:
        return None  # it is singular
    place = place_of_float64(moment.device)
    moment = moment.to(place)
    try:
        # With the jitter that an edit would take, if it takes one.
        factor = factorize(regularised(moment, 1.0, 0.0, relative_ridge=ridge), in_place=True)
    except NotPositiveDefinite:
        return None
    signs = torch.randint(0, 2, (moment.d, probes), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    V = factor.back_solve((2 * signs - 1).to(place))  # (d, m)
    return _Probed(V, moment.count, _form(moment.lower, V))


def _form(lower: Tensor, V: Tensor) -> float:
    """The sum of ``v^T S v`` over the columns of V (d, m), for the S with this lower triangle."""
    lower = lower.to(V.device)
    total = 0.0
    for start in range(0, V.shape[0], _BLOCK):
        rows = slice(start, start + _BLOCK)
        left = lower[rows, :start].double() @ V[:start] if start else 0  # (b, m)
        corner = lower[rows, rows].double()
        below = left + corner.tril(-1) @ V[rows]
        total += float((V[rows] * (2 * below + corner.diagonal()[:, None] * V[rows])).sum())
    return total
