"""``apply_rome_to_model``, ``apply_memit_to_model``, ``apply_emmet_to_model``."""

from __future__ import annotations

import copy as copying
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fastmemit.compat.hparams import read_hparams
from fastmemit.compat.live import live
from fastmemit.editor import plan_edit
from fastmemit.request import EditRequest, check_batch

log = logging.getLogger(__name__)

Requests = Sequence[Mapping[str, Any] | EditRequest] | Mapping[str, Any] | EditRequest


def apply_memit_to_model(
    model: nn.Module,
    tok: Any,
    requests: Requests,
    hparams: Any,
    copy: bool = False,
    return_orig_weights: bool = False,
    cache_template: str | os.PathLike[str] | None = None,
    keep_original_weight: bool = False,
    **kwargs: Any,
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Write facts into a model by MEMIT, as the other codebases' function of this name does.

    C is that of the model when it was first seen (see `fastmemit.compat.get_cov`), so edits may lie one on the other,
    and weights may be put back in between.

    Args:
        model: The model; it is edited in place.
        tok: Its tokenizer.
        requests: The facts, in the spelling of MEMIT, EasyEdit or FastEdit (see `fastmemit.EditRequest.from_dict`), or
            `EditRequest`.
        hparams: Hyper-parameters of the ROME family, or a `MemitConfig`, whose defaults are then ours, the ridge for
            few keys among them; see `fastmemit.compat.read_hparams`.
        copy: Edit a copy instead; the model stays as it is.
        return_orig_weights: Return what the edited weights were before.
        cache_template: Not used: target vectors are kept in the cache, by what they depend on.
        keep_original_weight: The same as `return_orig_weights`.
        kwargs: Not used; named in the log where there are any.

    Returns:
        The edited model, and weight name -> the weight before, which is empty unless asked for. To copy them back
        undoes the edit bit for bit.

    Raises:
        BadRequest: A request that cannot be carried out, or two that contradict each other.
        BadConfig: Hyper-parameters that cannot be honoured.
        WrongModel: The layers were not collected while the model was unedited.
        BadCorpus: There is no text to collect C on.
    """
    wanted = return_orig_weights or keep_original_weight
    return _apply("memit", model, tok, requests, hparams, copy, wanted, kwargs)


def apply_emmet_to_model(
    model: nn.Module,
    tok: Any,
    requests: Requests,
    hparams: Any,
    copy: bool = False,
    return_orig_weights: bool = False,
    cache_template: str | os.PathLike[str] | None = None,
    keep_original_weight: bool = False,
    **kwargs: Any,
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Write facts into a model by EMMET; see `apply_memit_to_model`."""
    wanted = return_orig_weights or keep_original_weight
    return _apply("emmet", model, tok, requests, hparams, copy, wanted, kwargs)


def apply_rome_to_model(
    model: nn.Module,
    tok: Any,
    requests: Requests,
    hparams: Any,
    copy: bool = False,
    return_orig_weights: bool = False,
    cache_template: str | os.PathLike[str] | None = None,
    keep_original_weight: bool = False,
    **kwargs: Any,
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Write facts into a model by ROME, one after the other; see `apply_memit_to_model`.

    One key is used everywhere, as in r-ROME; a `RomeConfig` with ``keys="original"`` does as ROME was first released.
    """
    wanted = return_orig_weights or keep_original_weight
    return _apply("rome", model, tok, requests, hparams, copy, wanted, kwargs)


def _apply(
    method: str,
    model: nn.Module,
    tokenizer: Any,
    requests: Requests,
    hparams: Any,
    copy: bool,
    wanted: bool,
    unused: Mapping[str, Any],
) -> tuple[nn.Module, dict[str, Tensor]]:
    theirs = read_hparams(hparams, method)
    listed = [requests] if isinstance(requests, Mapping | EditRequest) else requests
    batch = check_batch(one if isinstance(one, EditRequest) else EditRequest.from_dict(one) for one in listed)
    if unused:
        log.info("not used here: %s", ", ".join(sorted(unused)))
    found = live(model, tokenizer, theirs.module)
    theirs.check(found.adapter)
    found.cover(theirs.config.layers, theirs.dataset, theirs.multiplier)
    if copy:  # with all that is remembered, so that both go on with the same contexts
        found.sources.contexts(method)
        model = copying.deepcopy(model)
        found = live(model, tokenizer, theirs.module)
        found.cover(theirs.config.layers, theirs.dataset, theirs.multiplier)
    found.stack.look()
    delta, _ = plan_edit(found.sources, found.stack, batch, theirs.config)
    weights = dict(model.named_parameters(remove_duplicate=False)) if wanted else {}
    before = {name: weights[name].detach().clone() for name in delta.factors if wanted}
    delta.add_to(model)
    log.info("%d facts written by %s into %s", len(batch), method, ", ".join(delta.factors))
    return model, before
