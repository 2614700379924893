"""Which layers to edit, from the effects of restored MLP outputs."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from fastmemit.tracing.averages import LEVEL, resampled

#: Published ranges have 5 layers (GPT-2 XL 13-17, Llama-2-7B 4-8) or 6 (GPT-J 3-8).
LONGEST = 5
SHARE = 0.5


@dataclass(frozen=True)
class Proposal:
    """Layers to edit.

    Attributes:
        peak: The layer of the largest averaged effect; ROME and EMMET edit this one.
        layers: Ascending and ending at `peak`; MEMIT edits these.
        low: Lower end of the 95 % interval of the peak's place over other draws of the facts.
        high: Its upper end.
    """

    peak: int
    layers: tuple[int, ...]
    low: int
    high: int


def propose(effects: NDArray[np.float64], seed: int = 0) -> Proposal | None:
    """Choose layers by the MLP's effect at the subject's last token.

    ROME edits where this effect is largest.  MEMIT edits a range of MLPs that carry the fact and
    writes its target at the last of them (its section 4.1).  Here that range is: the peak and the
    layers below it, downwards as long as the averaged effect is at least half the peak's, and five layers at most.

    Args:
        effects: (facts, layers) of the kind ``"mlp"`` in the group ``"last subject"``.
        seed: Of the bootstrap draws.

    Returns:
        The layers; None where there is but one fact, or the peak is not above zero: its normal interval must be, at a
        level of 95 % over all layers together (Bonferroni), for the largest of many averages is above zero by chance
        too.
    """
    count, n_layers = effects.shape
    mean = effects.mean(0)
    peak = int(mean.argmax())
    quantile = NormalDist().inv_cdf(1 - (1 - LEVEL) / (2 * n_layers))
    if count < 2 or mean[peak] <= quantile * effects[:, peak].std(ddof=1) / count**0.5:
        return None
    first = peak
    while first > max(0, peak - LONGEST + 1) and mean[first - 1] >= SHARE * mean[peak]:
        first -= 1
    tail = 50 * (1 - LEVEL)
    peaks = resampled(effects, seed).argmax(1)
    low, high = np.percentile(peaks, [tail, 100 - tail], method="nearest")
    return Proposal(peak, tuple(range(first, peak + 1)), int(low), int(high))
