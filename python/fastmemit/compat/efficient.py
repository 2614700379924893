"""The functions of the paper's own code (arXiv 2506.04226), with its shapes, on statistics made here.

It grew from MEMIT, and its functions have the names of MEMIT's but return more, and take arguments in another order:

    memit.memit_main.get_cov = emmet.emmet_main.get_cov = fastmemit.compat.efficient.get_cov
    rome.compute_u.get_inv_cov = fastmemit.compat.efficient.get_inv_cov

None of them reads ``force_recompute``, which there says that a file is not to be read; `fastmemit.compat.forget` takes
the model as it is for unedited.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fastcov.files import StrPath
from fastcov.hooks import isolated
from fastmemit.compat.drop_in import Applied, applying, covered, located
from fastmemit.compat.drop_in import layer_stats as layer_stats_alone
from fastmemit.compat.hparams import check_honoured, fields_of, finite
from fastmemit.errors import BadConfig


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
    fields = _honoured(hparams)
    if fields.get("calculate_objective_value"):
        raise BadConfig(
            "calculate_objective_value of hparams is true, but no keys are kept to measure it on; set it to false."
        )
    weight = finite(fields.get("mom2_update_weight", 1.0), "mom2_update_weight", "hparams")
    if fields.get("identity_cov"):
        found, layer = located(model, tok, layer_name)
        return weight * torch.eye(found.adapter.d_k(layer), device=found.place(layer)), []
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
    """The inverse of C, or with `constraint_rome` of ``C + constraint_lambda I``, as its ROME asks for it.

    Raises:
        BadConfig: A setting that cannot be honoured, or `constraint_lambda` is no finite number.
    """
    _honoured(hparams)
    ridge = finite(constraint_lambda, "constraint_lambda", "get_inv_cov") if constraint_rome else 0.0
    found, layer = covered(model, tok, layer_name, mom2_dataset, hparams, alone=True)
    return found.matrix(layer, inverse=True, ridge=ridge)


def _honoured(hparams: Any) -> dict[str, Any]:
    """The fields of hyper-parameters, if C is made here as they say; else a `BadConfig`."""
    fields = {} if hparams is None else fields_of(hparams)
    check_honoured(fields, "hparams")
    return fields


def layer_stats(
    model: nn.Module,
    tokenizer: Any,
    layer_name: str,
    stats_dir: StrPath | None,
    ds_name: str,
    to_collect: Sequence[str],
    *_: Any,
    hparams: Any = None,
    **__: Any,
) -> tuple[SimpleNamespace, list[Tensor]]:
    """The statistics of `fastmemit.compat.layer_stats`, and an empty list of keys; other arguments are not used."""
    _honoured(hparams)
    return layer_stats_alone(model, tokenizer, layer_name, stats_dir, ds_name, to_collect, hparams=hparams), []


#: What its code calls where ``dynamic`` is set, with the same shape.
layer_stats_dynamic = layer_stats


def _applying(method: str) -> Callable[..., tuple[Any, ...]]:
    return applying(
        method,
        f"Write facts by {method.upper()}, see `fastmemit.compat.apply_{method}_to_model`; the third value is None for "
        "ROME, else layer -> norms of the change and of the weight, with None for distances that need preserved keys.",
        lambda done: (done.model, done.before, None if method == "rome" else _distances(done)),
    )


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
        found[next(part for part in name.split(".") if part.isdecimal())] = {
            "preservation_distance": None,
            "new_edit_distance": None,
            "old_edit_distance": None,
            "delta_norm": float(change.norm()),
            "new_weights_norm": float(now.norm()),
            "original_weights_norm": float((now - change).norm()),
            "inside_norms": None,
        }
    return found
