"""Cholesky factors and null spaces of the statistics: made once, used many times."""

from __future__ import annotations

import logging
from collections import OrderedDict

import torch

import fastcov
from fastcov import CholeskyFactor, NullSpace
from fastcov.linalg import SHRINKAGES
from fastmemit.editors.config import AlphaEditConfig, Config, CovarianceConfig
from fastmemit.models import ModelAdapter
from fastmemit.statistics import Statistics

log = logging.getLogger(__name__)

CAPACITY = 8 << 30  # bytes; GPT-J's six layers in float64 are 13 GB, so big models factor again


# The layer, and all settings that A depends on.
_Key = tuple[int, float, float, float, str]
_SpaceKey = tuple[int, float, float | None]


def resolved(adapter: ModelAdapter, used: Statistics, config: Config) -> Config:
    """The settings with the relative ridge that they come to, one for all layers.

    Layers of unlike widths may have unlike multipliers where the corpus ended early: the widest one has fewest keys for
    its width and decides.
    """
    widest = max(adapter.d_k(layer) for layer in config.layers)
    return config.resolved(used.multiplier_of(widest))


class FactorCache:
    """Factors of ``A = w C + ridge I`` and null spaces of C, by all that they are made with.

    The least recently used go first.

    Args:
        capacity: Bytes to hold at most; one of them is always held.
    """

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._held: OrderedDict[_Key | _SpaceKey, CholeskyFactor | NullSpace] = OrderedDict()

    def clear(self) -> None:
        """Forget all; to be called when the statistics change."""
        self._held.clear()

    def get(self, adapter: ModelAdapter, used: Statistics, config: CovarianceConfig, layer: int) -> CholeskyFactor:
        """The factor of a layer's ``A = w C + ridge I`` in float64, on the weight's device.

        C is shrunk first where the settings say so, and the relative ridge joins the ridge.

        Raises:
            fastcov.NotPositiveDefinite: No jitter was enough.
            fastcov.QuarticUnknown: The file is older than what Ledoit-Wolf needs.
            fastcov.StoreDamaged: The second moment's file is not what was written.
        """
        weight = float(adapter.d_k(layer)) if config.weight is None else config.weight
        relative = resolved(adapter, used, config).relative_ridge or 0.0
        key = (layer, weight, config.ridge, relative, config.shrinkage)
        found = self._held.get(key)
        if not isinstance(found, CholeskyFactor):
            moment = used.moment(adapter.projection_name(layer))
            matrix = fastcov.regularised(
                moment.second_moment.to(_place(adapter, layer)),
                weight,
                config.ridge,
                relative_ridge=relative,
                shrinkage=SHRINKAGES[config.shrinkage](moment),
            )
            del moment  # its sum is not held beside the factorisation
            if relative and config.relative_ridge is None:
                log.info(
                    "C of layer %d has few keys (%s) and gets a ridge of %g of its mean diagonal; "
                    "relative_ridge=0 leaves it as it is",
                    layer,
                    used.describe(),
                    relative,
                )
            found = fastcov.factorize(matrix, in_place=True)
        self._hold(key, found)
        return found

    def null_space(self, adapter: ModelAdapter, used: Statistics, config: AlphaEditConfig, layer: int) -> NullSpace:
        """The null space of a layer's C in float64, on the weight's device, for AlphaEdit.

        A symmetric eigenproblem of the key width: about a second at 1,536 on one core, and the time grows with the cube
        of the width. It takes four to five matrices of float64 while it is made, and after that the basis, at most one
        matrix.

        Raises:
            fastcov.StoreDamaged: The second moment's file is not what was written.
        """
        relative = config.null_relative
        key = (layer, config.null_threshold if relative is None else 0.0, relative)
        found = self._held.get(key)
        if not isinstance(found, NullSpace):
            C = used.moment(adapter.projection_name(layer)).second_moment
            found = fastcov.null_space(C.to(_place(adapter, layer)), threshold=config.null_threshold, relative=relative)
            d_k = found.basis.shape[0]
            say = log.warning if found.rank == d_k else log.info
            say(
                "%d of %d directions of C of layer %d are below %g and count as its null space%s",
                found.rank,
                d_k,
                layer,
                found.threshold,
                ": edits preserve nothing" if found.rank == d_k else "",
            )
        self._hold(key, found)
        return found

    def _hold(self, key: _Key | _SpaceKey, found: CholeskyFactor | NullSpace) -> None:
        self._held[key] = found
        self._held.move_to_end(key)
        while len(self._held) > 1 and self._bytes() > self._capacity:
            self._held.popitem(last=False)

    def _bytes(self) -> int:
        return sum(held.nbytes for held in self._held.values())


def _place(adapter: ModelAdapter, layer: int) -> torch.device:
    """Where a layer's statistics are worked on: with its weight, but Apple's GPUs lack float64."""
    device = adapter.weight(layer).device
    return torch.device("cpu") if device.type == "mps" else device
