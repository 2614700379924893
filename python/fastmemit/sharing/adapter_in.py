"""A LoRA adapter in PEFT's format as a delta: our own with all that was on record, and others'."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastcov.hooks import isolated
from fastcov.parsing import parse_json
from fastmemit.delta import Delta
from fastmemit.errors import BadAdapter, DamagedFile
from fastmemit.models import fingerprint
from fastmemit.models.structure import linear_shape
from fastmemit.sharing.adapter_out import CONFIG, OURS, PREFIX, WEIGHTS, is_transposed
from fastmemit.sharing.patterns import BadPattern, Patterns

_NAME = re.compile(re.escape(PREFIX) + r"(.+)\.lora_([AB])\.weight")
_CONFIG_BYTES = 1 << 20
#: What a tensor of another kind is, by a part of its name.
_KINDS = {
    "lora_embedding": "LoRA on an embedding",
    "lora_magnitude": "DoRA",
    "modules_to_save": "a module that was trained whole",
    "bias": "a bias",
}
#: Fields that do not change what is added to a weight, or that are read below. A field that is in
#: neither list and is set may mean anything, so it is refused.
_KNOWN = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "megatron_core",
    "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
    "runtime_config", "target_modules", "task_type", "use_rslora",
}  # fmt: skip
#: Ways of starting a training that leave the base model as it is; the others move part of its
#: weights into the adapter, which then means nothing without the rest.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


@isolated()
def load_adapter(folder: str | os.PathLike[str], model: nn.Module) -> Delta:
    """Read a LoRA adapter as the change that it makes to a model's weights.

    Args:
        folder: With ``adapter_config.json`` and ``adapter_model.safetensors``.
        model: The unedited model that the adapter is for.

    Returns:
        A delta; not applied.  From `save_adapter` it comes back bit for bit with its provenance,
        from elsewhere it says that it is of this model.

    Raises:
        FileNotFoundError: One of the two files is not there.
        DamagedFile: A file cannot be read, or its tensors do not fit each other.
        BadAdapter: It is not plain LoRA on linear maps (DoRA, biases, embeddings, whole modules).
        WrongModel: The model lacks a module, or has it in another shape.
        QuantisedWeight: A weight to change is not stored in floating point.
    """
    config, tensors, ours = _read(Path(folder))
    _check_config(folder, config)
    factors = {}
    alphas = _Alphas(folder, config)
    for module, (a, b) in _pairs(folder, tensors).items():
        part = _linear(folder, model, module)
        b = b if (s := alphas.scaling(module, a.shape[0])) == 1 else b * s
        left, right = (a.T, b) if is_transposed(part) else (b, a.T)
        factors[f"{module}.weight"] = (left.contiguous(), right.contiguous())
    delta = _as_written(folder, factors, ours) if ours else Delta(factors, {})
    delta.check_stored(model)  # before the shapes: a packed weight has another
    delta.check(model)
    if ours:
        return delta
    about = {k: config.get(k) for k in ("r", "lora_alpha", "use_rslora", "target_modules")}
    return Delta(
        factors,
        {
            "model": fingerprint(model),
            "model_name": config.get("base_model_name_or_path"),
            "method": "lora",
            "settings": about,
            "requests": [],
        },
    )


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"The folder {str(folder)!r} has no {name}; name one that holds a LoRA adapter in "
                "PEFT's format, with safetensors."
            )
    try:
        if (folder / CONFIG).stat().st_size > _CONFIG_BYTES:
            raise ValueError("it is too large")
        config = parse_json((folder / CONFIG).read_bytes())
        if not isinstance(config, dict):
            raise ValueError("it is no object")
    except ValueError as error:
        raise _damaged(folder, f"has an {CONFIG} that cannot be read ({error})") from error
    try:
        with safe_open(str(folder / WEIGHTS), framework="pt") as file:
            text = (file.metadata() or {}).get(OURS)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise _damaged(folder, f"has an {WEIGHTS} that cannot be read ({error!s:.120})") from error
    try:
        ours = {} if text is None else parse_json(text)
    except ValueError as error:
        raise _damaged(folder, "has metadata that cannot be read") from error
    return config, tensors, ours if isinstance(ours, dict) else {}


def _check_config(folder: str | os.PathLike[str], config: Mapping[str, Any]) -> None:
    """Refuse what changes more, or otherwise, than ``scaling B A`` on linear maps."""
    if config.get("peft_type") != "LORA":
        raise _bad(folder, f"is of the type {config.get('peft_type')!r:.40} and not LoRA")
    if config.get("bias", "none") != "none":
        raise _bad(folder, f"trains biases too (bias={config['bias']!r:.40})")
    start = config.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise _bad(
            folder,
            f"was started by {start!r:.40}, which moves a part of the base model into it; convert "
            "it to plain LoRA with PEFT first",
        )
    strange = [name for name, value in config.items() if name not in _KNOWN and value]
    if strange:
        raise _bad(folder, f"uses {strange[0]}, which is more than plain LoRA")


def _pairs(folder: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Module -> A (r, in) and B (out, r) in float32."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None:
            kind = next((what for part, what in _KINDS.items() if part in name), "no LoRA factor")
            raise _bad(folder, f"holds {name!r:.120}, which is {kind}")
        if not tensor.is_floating_point() or tensor.dim() != 2:
            raise _bad(folder, f"holds {name!r:.120} as {tensor.dtype} of {tensor.dim()} sides")
        found.setdefault(match[1], {})[match[2]] = tensor.float()
    if not found:
        raise _bad(folder, "holds no tensor")
    for module, pair in found.items():
        if len(pair) != 2 or pair["A"].shape[0] != pair["B"].shape[1]:
            raise _damaged(folder, f"holds factors of {module!r:.120} that do not fit each other")
    return {module: (pair["A"], pair["B"]) for module, pair in sorted(found.items())}


class _Alphas:
    """The factors before B A: alpha / r, or alpha / sqrt(r) in rank-stabilised LoRA."""

    def __init__(self, folder: str | os.PathLike[str], config: Mapping[str, Any]) -> None:
        self._folder = folder
        self._config = config
        found = config.get("alpha_pattern") or {}
        if not isinstance(found, dict):
            raise _damaged(folder, f"has an alpha_pattern of {found!r:.40}")
        self._values = list(found.values())
        try:
            self._patterns = Patterns(list(found))
        except BadPattern as error:
            raise _bad(folder, f"has {error}, which is more than names and simple patterns of them") from error

    def scaling(self, module: str, rank: int) -> float:
        """The factor of one module."""
        number = self._patterns.first(module)
        alpha = self._config.get("lora_alpha", 8) if number is None else self._values[number]
        # A whole number in JSON has no largest; compared, it need not become a float.
        if type(alpha) not in (int, float) or not abs(alpha) <= sys.float_info.max or rank < 1:
            raise _damaged(self._folder, f"has an alpha of {alpha!r:.40} for a rank of {rank}")
        return alpha / math.sqrt(rank) if self._config.get("use_rslora") else alpha / rank


def _linear(folder: str | os.PathLike[str], model: nn.Module, module: str) -> nn.Module:
    try:
        part = model.get_submodule(module)
    except AttributeError:
        part = nn.Identity()  # the delta's own check says that the model has no such weight
    else:
        if linear_shape(part) is None:
            kind = type(part).__name__
            raise _bad(folder, f"changes {module}, which is a {kind} and no linear map")
        named = dict(model.named_parameters(remove_duplicate=False))
        weight = named.get(f"{module}.weight")
        others = [n for n, p in named.items() if p is weight and n != f"{module}.weight"]
        if others:
            raise _bad(folder, f"changes {module}, whose weight {others[0]} shares")
    return part


def _as_written(
    folder: str | os.PathLike[str], factors: Mapping[str, tuple[Tensor, Tensor]], ours: Mapping[str, Any]
) -> Delta:
    """The delta that was exported: without the padding, and checked by its digest."""
    ranks, provenance = ours.get("ranks"), ours.get("provenance")
    if not (isinstance(ranks, dict) and isinstance(provenance, dict) and ranks.keys() == factors.keys()):
        raise _damaged(folder, "is not what was exported")
    cut = {
        name: (left[:, : ranks[name]].contiguous(), right[:, : ranks[name]].contiguous())
        for name, (left, right) in factors.items()
        if isinstance(ranks[name], int) and 0 <= ranks[name] <= left.shape[1]
    }
    delta = Delta(cut, provenance)
    rest = [t[:, ranks[n] :] for n in cut for t in factors[n]]
    if delta.digest() != ours.get("digest") or any(bool(torch.any(t != 0)) for t in rest):
        raise _damaged(folder, "holds other numbers than were exported")
    return delta


def _bad(folder: str | os.PathLike[str], what: str) -> BadAdapter:
    return BadAdapter(f"The adapter {os.fspath(folder)!r} {what}, so it cannot be read as an edit.")


def _damaged(folder: str | os.PathLike[str], what: str) -> DamagedFile:
    return DamagedFile(f"The adapter {os.fspath(folder)!r} {what}; get or export it again.")
