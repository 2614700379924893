"""``get_cov``, ``get_inv_cov`` and ``layer_stats``: C for other codebases, in seconds."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

import fastcov
from fastcov.hooks import isolated
from fastmemit.compat.hparams import fields_of, multiplier_of, whole_numbers
from fastmemit.compat.live import Live, forget, live
from fastmemit.compat.settings import current
from fastmemit.editors import find_config
from fastmemit.errors import BadConfig

log = logging.getLogger(__name__)

#: Layers collected together where only the first is known: MEMIT edits five or six in a row.
IN_A_ROW = 6


@isolated()
def get_cov(
    model: nn.Module,
    tok: Any,
    layer_name: str,
    mom2_dataset: str,
    mom2_n_samples: int | str | None,
    mom2_dtype: str,
    inv: bool = False,
    force_recompute: bool = False,
    hparams: Any = None,
) -> Tensor:
    """The second moment C of a layer's keys, as MEMIT's function of this name returns it.

    It is the mean of ``k k^T`` over 10 d_k tokens, or as `fastmemit.compat.configure` has it, of the model as it was
    when it was first seen: MEMIT asks for the second layer when the first is written already. So all layers that will
    be asked for are collected at the first call, in one pass: those of `hparams`, else those of
    ``configure(layers=...)``, else those that our settings of MEMIT have for this model if the layer is one of them,
    else the layer and the next five.

    Args:
        model: The model. At the first call it is taken for unedited.
        tok: Its tokenizer.
        layer_name: The module whose input is meant, ``"transformer.h.13.mlp.c_proj"``.
        mom2_dataset: What to collect on, where nothing is configured and nothing is kept.
        mom2_n_samples: Not used: the number of keys is the multiplier's.
        mom2_dtype: Not used: sums are float32, of products in float32 or wider.
        inv: Return the inverse of C.
        force_recompute: Take the model as it is now for unedited, and forget what it was.
        hparams: The caller's, of which ``layers`` and ``dynamic_multiplier`` are read.

    Returns:
        C or its inverse, float32 (d_k, d_k), on the device of the layer's weight; the caller's own.

    Raises:
        WrongModel: The layer was not collected while the model was unedited.
        BadCorpus: There is no text to collect on; ``configure(corpus=FILE)`` names one.
        BadConfig: The name has no layer's number, or hparams have layers that are no numbers.
        UnknownArchitecture: The model has no such module.
        fastcov.NotPositiveDefinite: There is no inverse.
    """
    found, layer = _covered(model, tok, layer_name, mom2_dataset, hparams, force_recompute, False)
    return found.matrix(layer, inverse=inv).to(found.place(layer), copy=True)


@isolated()
def get_inv_cov(
    model: nn.Module,
    tok: Any,
    layer_name: str,
    mom2_dataset: str,
    mom2_n_samples: int | str | None,
    mom2_dtype: str,
    hparams: Any = None,
) -> Tensor:
    """The inverse of C, as ROME's function of this name returns it; see `get_cov`.

    Only this layer is collected, where neither `hparams` nor ``configure`` name more. The inverse is made in float64
    and with a jitter only where there is none without, which is logged.
    """
    found, layer = _covered(model, tok, layer_name, mom2_dataset, hparams, False, True)
    return found.matrix(layer, inverse=True).to(found.place(layer), copy=True)


class LayerMoment:
    """What ``layer_stats(...).mom2`` is.

    Attributes:
        count: How many keys were summed.
    """

    def __init__(self, moment: fastcov.SecondMoment) -> None:
        self._moment = moment
        self.count = moment.count

    @property
    def mom2(self) -> Tensor:
        """The sum of ``k k^T``, (d_k, d_k) on the CPU."""
        return self._moment.sum

    def moment(self) -> Tensor:
        """The mean of ``k k^T``, (d_k, d_k) on the CPU."""
        return self._moment.second_moment


@dataclass(frozen=True)
class LayerStats:
    """What `layer_stats` returns: as much of the other codebases' object as their callers use."""

    mom2: LayerMoment


@isolated()
def layer_stats(
    model: nn.Module,
    tokenizer: Any,
    layer_name: str,
    stats_dir: str | os.PathLike[str] | None,
    ds_name: str,
    to_collect: Sequence[str],
    model_name: str | None = None,
    sample_size: int | None = None,
    precision: str | None = None,
    batch_tokens: int | None = None,
    download: bool = True,
    progress: Any = None,
    force_recompute: bool = False,
    hparams: Any = None,
) -> LayerStats:
    """The statistics of a layer's keys, as ROME's function of this name returns them.

    They are those of `get_cov`. Files in `stats_dir` are neither read nor written: what is there can be imported once,
    and what is here exported (`fastmemit.interop`).

    Args:
        model: See `get_cov`.
        tokenizer: See there.
        layer_name: See there.
        stats_dir: Not used.
        ds_name: See `get_cov`.
        to_collect: ``["mom2"]``.
        model_name: Not used.
        sample_size: Not used: the number of keys is the multiplier's.
        precision: Not used.
        batch_tokens: Not used.
        download: Not used.
        progress: Not used; ``configure(progress=True)`` shows bars.
        force_recompute: See `get_cov`.
        hparams: See there.

    Raises:
        BadConfig: Anything else shall be collected.
    """
    if list(to_collect) != ["mom2"]:
        raise BadConfig(
            f"Only 'mom2' is collected here but to_collect is {list(to_collect)!r}; use the "
            "original layer_stats for other statistics."
        )
    found, layer = _covered(model, tokenizer, layer_name, ds_name, hparams, force_recompute, False)
    return LayerStats(LayerMoment(found.moment(layer)))


def _covered(
    model: nn.Module, tokenizer: Any, layer_name: str, dataset: str, hparams: Any, force_recompute: bool, alone: bool
) -> tuple[Live, int]:
    """The model's memory with statistics of a layer in it, and the layer's number."""
    module, layer = _parted(layer_name)
    if force_recompute:
        forget(model)
    found = live(model, tokenizer, module)
    found.adapter.check_layer(layer)
    fields = {} if hparams is None else fields_of(hparams)
    if not found.covers([layer]):
        layers = _together(found, layer, fields, alone)
        log.info("the second moments of the layers %s of %s", layers, found.name)
        found.cover(layers, dataset, multiplier_of(fields), needed=[layer])
    return found, layer


def _parted(layer_name: str) -> tuple[str, int]:
    """``"a.b.13.c"`` as ``("a.b.{}.c", 13)``."""
    parts = layer_name.split(".")
    for place, part in enumerate(parts):
        if part.isdecimal():
            return ".".join([*parts[:place], "{}", *parts[place + 1 :]]), int(part)
    raise BadConfig(
        f'The module {layer_name!r} has no layer\'s number in its name; name one such as "transformer.h.13.mlp.c_proj".'
    )


def _together(found: Live, layer: int, fields: dict[str, Any], alone: bool) -> list[int]:
    """The layers to collect with one; see `get_cov`."""
    named = fields.get("layers") or current().layers
    if named:
        return sorted({*whole_numbers(named, "hparams"), layer})
    if alone:
        return [layer]
    usual = find_config(found.adapter, "memit")
    if usual.preset != "default" and layer in usual.layers:
        return list(usual.layers)
    row = range(layer, min(layer + IN_A_ROW, found.adapter.n_layers))
    return [other for other in row if found.has(other)]
