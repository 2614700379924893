"""The functions of the paper's own code (arXiv 2506.04226), with its shapes, on statistics made here.

It grew from MEMIT, and its functions have the names of MEMIT's but return more, and take arguments in another order:

    memit.memit_main.get_cov = emmet.emmet_main.get_cov = fastmemit.compat.efficient.get_cov
    rome.compute_u.get_inv_cov = fastmemit.compat.efficient.get_inv_cov

None of them reads ``force_recompute``, which there says that a file is not to be read; `fastmemit.compat.forget` takes
the model as it is for unedited.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import fastcov
from fastcov.hooks import isolated
from fastmemit.compat.drop_in import Applied, covered, live, write_facts
from fastmemit.compat.drop_in import layer_stats as layer_stats_alone
from fastmemit.compat.hparams import check_honoured, fields_of
from fastmemit.errors import BadConfig
from fastmemit.request import Fact


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
) -> tuple[Tensor, list[Tensor]]:
    """The second moment times ``mom2_update_weight``, and no preserved keys, as its MEMIT and EMMET unpack them.

    Its own `inv` has no effect, and has none here. With ``identity_cov`` the matrix is the weight times I.

    Returns:
        ``w C`` float32 (d_k, d_k) on the device of the layer's weight, the caller's own; and an empty list.

    Raises:
        BadConfig: ``calculate_objective_value``, for which keys would have to be kept; or a setting that cannot be
            honoured.
    """
    fields = {} if hparams is None else fields_of(hparams)
    check_honoured(fields, "hparams")
    if fields.get("calculate_objective_value"):
        raise BadConfig(
            "calculate_objective_value of hparams is true, but no keys are kept to measure it on; set it to false."
        )
    weight = float(fields.get("mom2_update_weight", 1.0))
    if fields.get("identity_cov"):
        projection = live(model, tok, fields.get("rewrite_module_tmp")).adapter.model.get_submodule(layer_name)
        place = next(projection.parameters())
        return weight * torch.eye(int(fields["proj_dim"]), device=place.device), []
    found, layer = covered(model, tok, layer_name, mom2_dataset, hparams)
    return found.matrix(layer).mul_(weight), []


@isolated()
def get_inv_cov(
    model: nn.Module,
    tok: Any,
    hparams: Any,
    layer_name: str,
    mom2_dataset: str,
    mom2_n_samples: int | str | None,
    mom2_dtype: str,
    constraint_rome: bool = False,
    constraint_lambda: float = 100,
) -> Tensor:
    """The inverse of C, or with `constraint_rome` of ``C + constraint_lambda I``, as its ROME asks for it."""
    found, layer = covered(model, tok, layer_name, mom2_dataset, hparams, alone=True)
    if not constraint_rome:
        return found.matrix(layer, inverse=True)
    C = found.matrix(layer)
    place = "cpu" if C.device.type == "mps" else C.device  # Apple's GPUs have no float64
    A = fastcov.regularised(C.to(place).double(), 1.0, float(constraint_lambda))
    return torch.cholesky_inverse(fastcov.factorize(A, in_place=True).L).float().to(C.device)


def layer_stats(
    model: nn.Module,
    tokenizer: Any,
    layer_name: str,
    stats_dir: str | os.PathLike[str] | None,
    ds_name: str,
    to_collect: Sequence[str],
    *_: Any,
    hparams: Any = None,
    **__: Any,
) -> tuple[SimpleNamespace, list[Tensor]]:
    """The statistics of `fastmemit.compat.layer_stats`, and an empty list of keys; other arguments are not used."""
    return layer_stats_alone(model, tokenizer, layer_name, stats_dir, ds_name, to_collect, hparams=hparams), []


#: What its code calls where ``dynamic`` is set, with the same shape.
layer_stats_dynamic = layer_stats


def _applying(method: str) -> Callable[..., tuple[nn.Module, dict[str, Tensor], dict[str, Any] | None]]:
    def apply(
        model: nn.Module,
        tok: Any,
        requests: Fact | Sequence[Fact],
        hparams: Any,
        copy: bool = False,
        return_orig_weights: bool = False,
        cache_template: str | os.PathLike[str] | None = None,
    ) -> tuple[nn.Module, dict[str, Tensor], dict[str, Any] | None]:
        done = write_facts(method, model, tok, requests, hparams, copy=copy, keep=return_orig_weights)
        return done.model, done.before, None if method == "rome" else _distances(done)

    apply.__name__ = apply.__qualname__ = f"apply_{method}_to_model"
    apply.__doc__ = (
        f"Write facts by {method.upper()}, see `fastmemit.compat.apply_{method}_to_model`; the third value is None for "
        "ROME, else layer -> norms of the change and of the weight, with None for distances that need preserved keys."
    )
    return apply


apply_rome_to_model = _applying("rome")
apply_emmet_to_model = _applying("emmet")
apply_memit_to_model = _applying("memit")


def _distances(done: Applied) -> dict[str, Any]:
    """What its scripts write into JSON of an edit, by the layer's number in the weight's name."""
    found: dict[str, Any] = {}
    weights: Mapping[str, nn.Parameter] = dict(done.model.named_parameters(remove_duplicate=False))
    for name, (left, right) in done.delta.factors.items():
        now = weights[name].detach().double()
        change = left.to(now) @ right.to(now).T
        found[name.split(".")[2]] = {
            "preservation_distance": None,
            "new_edit_distance": None,
            "old_edit_distance": None,
            "delta_norm": float(change.norm()),
            "new_weights_norm": float(now.norm()),
            "original_weights_norm": float((now - change).norm()),
            "inside_norms": None,
        }
    return found
