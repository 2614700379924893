"""Cholesky factors of the statistics: factored once, solved many times."""

from __future__ import annotations

from collections import OrderedDict

import torch

import fastcov
from fastcov import CholeskyFactor
from fastcov.shrinkage import SHRINKAGES
from fastmemit.editors.config import EditConfig
from fastmemit.models import ModelAdapter
from fastmemit.statistics import Statistics

CAPACITY = 8 << 30  # bytes; GPT-J's six layers in float64 are 13 GB, so big models factor again


# The layer, and all settings that A depends on.
_Key = tuple[int, float, float, float, str]


class FactorCache:
    """Factors of ``A = w C + ridge I`` by layer and by what A is made with.

    The least recently used go first.

    Args:
        capacity: Bytes to hold at most; one factor is always held.
    """

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._held: OrderedDict[_Key, CholeskyFactor] = OrderedDict()

    def clear(self) -> None:
        """Forget all; to be called when the statistics change."""
        self._held.clear()

    def get(
        self, adapter: ModelAdapter, used: Statistics, config: EditConfig, layer: int
    ) -> CholeskyFactor:
        """The factor of a layer's ``A = w C + ridge I`` in float64, on the weight's device.

        C is shrunk first where the settings say so, and the relative ridge joins the ridge.

        Raises:
            fastcov.NotPositiveDefinite: No jitter was enough.
            fastcov.QuarticUnknown: The file is older than what Ledoit-Wolf needs.
            fastcov.StoreDamaged: The second moment's file is not what was written.
        """
        weight = float(adapter.d_k(layer)) if config.weight is None else config.weight
        key = (layer, weight, config.ridge, config.relative_ridge, config.shrinkage)
        if key not in self._held:
            moment = used.moment(adapter.projection_name(layer))
            device = adapter.weight(layer).device
            # Apple's GPUs have no float64.
            place = torch.device("cpu") if device.type == "mps" else device
            matrix = fastcov.regularised(
                moment.second_moment.to(place),
                weight,
                config.ridge,
                relative_ridge=config.relative_ridge,
                shrinkage=SHRINKAGES[config.shrinkage](moment),
            )
            del moment  # its sum is not held beside the factorisation
            self._held[key] = fastcov.factorize(matrix, in_place=True)
        self._held.move_to_end(key)
        while len(self._held) > 1 and self._bytes() > self._capacity:
            self._held.popitem(last=False)
        return self._held[key]

    def _bytes(self) -> int:
        return sum(factor.nbytes for factor in self._held.values())
