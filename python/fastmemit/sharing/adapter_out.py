"""A delta as a LoRA adapter that PEFT loads: two files, written here and not by PEFT.

LoRA (Hu et al. 2021, equation 3) adds ``(alpha / r) B A`` to a map's weight, with A (r, in) and
B (out, r).  A delta is that with a scaling of 1, so an exported edit can be served beside its
model, stacked with others and switched off without a weight being touched.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastcov.hooks import isolated
from fastcov.store import write_safetensors
from fastmemit.delta import Delta
from fastmemit.errors import BadAdapter
from fastmemit.models import ModelAdapter, new_folder
from fastmemit.models.structure import linear_shape

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
#: The metadata entry with what a delta has and an adapter has no place for.
OURS = "fastmemit"
PREFIX = "base_model.model."


@isolated()
def save_adapter(
    delta: Delta,
    model: nn.Module | ModelAdapter,
    folder: str | os.PathLike[str],
    *,
    base_model: str | None = None,
    pad: bool = True,
) -> Path:
    """Write a delta as a LoRA adapter for ``PeftModel.from_pretrained(model, folder)``.

    All ranks are padded with zeros to the largest, so that one rank and one scaling hold for every module: not every
    server reads the patterns with which PEFT says it per module.

    Args:
        delta: The edit.
        model: The model that it is of, or one of the same structure without weights (`fastmemit.models.load_skeleton`):
            it tells which way round each weight is stored.
        folder: Where to; it must not exist, or be empty.
        base_model: The base model's name in the adapter's config; None takes the name on record.
        pad: Pad ranks; else modules have their own ranks in ``rank_pattern`` and ``alpha_pattern``.

    Returns:
        The folder.

    Raises:
        WrongModel: The model lacks a weight or has it in another shape.
        BadAdapter: The delta changes nothing, a weight of no linear map, or one that several modules share.
        FileExistsError: `folder` holds something already.
        OSError: The disk refused; nothing is left of the attempt.
    """
    net = model.model if isinstance(model, ModelAdapter) else model
    delta.check(net)
    if not delta.factors:
        raise BadAdapter("The edit changes no weight, so there is no adapter to write.")
    modules = {_module_of(net, name): name for name in delta.factors}
    ranks = {module: delta.factors[name][0].shape[1] for module, name in modules.items()}
    most = max(1, *ranks.values())
    tensors: dict[str, Tensor] = {}
    for module, name in modules.items():
        rank = most if pad else max(1, ranks[module])
        a, b = _oriented(net.get_submodule(module), *delta.factors[name])
        tensors[f"{PREFIX}{module}.lora_A.weight"] = padded(a, rank, 0)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = padded(b, rank, 1)
    ours = {
        "digest": delta.digest(),
        "ranks": {name: ranks[module] for module, name in modules.items()},
        "provenance": delta.provenance,
    }
    on_record = delta.provenance.get("model_name")
    own = {} if pad else {f"^{re.escape(m)}": max(1, r) for m, r in ranks.items() if r != most}
    config = _config(
        modules,
        rank=most,
        patterns=own,
        base_model=base_model or (on_record if isinstance(on_record, str) else None),
        transposed=any(is_transposed(net.get_submodule(module)) for module in modules),
    )
    with new_folder(folder) as partial:
        metadata = {"format": "pt", OURS: json.dumps(ours, sort_keys=True)}
        with open(partial / WEIGHTS, "wb") as file:
            write_safetensors(file, tensors, metadata)
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return Path(folder)


def is_transposed(module: nn.Module) -> bool:
    """Whether a module stores its weight as (in, out), as Conv1D does: PEFT's fan_in_fan_out."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def padded(factor: Tensor, rank: int, side: int) -> Tensor:
    """A copy of a factor with zeros up to `rank` along one side."""
    lacking = list(factor.shape)
    lacking[side] = rank - factor.shape[side]
    return torch.cat([factor, factor.new_zeros(lacking)], dim=side).contiguous()


def _oriented(module: nn.Module, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) of ``left @ right^T``, which is (out, in), or transposed storage."""
    return (left.T, right) if is_transposed(module) else (right.T, left)


def _module_of(model: nn.Module, name: str) -> str:
    """The linear module that a weight belongs to, alone.

    Raises:
        BadAdapter: There is none.
    """
    module, _, last = name.rpartition(".")
    part = model.get_submodule(module)
    if last != "weight" or linear_shape(part) is None:
        raise BadAdapter(
            f"The edit changes {name}, which is not the weight of a linear map "
            f"({type(part).__name__}), and LoRA adapters change only those; save the whole model "
            "instead."
        )
    named = dict(model.named_parameters(remove_duplicate=False))
    others = [other for other in named if other != name and named[other] is named[name]]
    if others:
        raise BadAdapter(
            f"The edit changes {name}, which {others[0]} shares, while an adapter would change one "
            "of the two; save the whole model instead."
        )
    return module


def _config(
    modules: Mapping[str, str], *, rank: int, patterns: Mapping[str, int], base_model: str | None, transposed: bool
) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "revision": None,
        "inference_mode": True,
        # A pattern and not a list of names: PEFT takes a name in a list for every module that ends
        # in it, but a pattern has to fit the whole of a module's name.
        "target_modules": "|".join(re.escape(module) for module in modules),
        "r": rank,
        "lora_alpha": rank,  # the scaling is alpha / r
        "rank_pattern": dict(patterns),
        "alpha_pattern": dict(patterns),
        "fan_in_fan_out": transposed,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
