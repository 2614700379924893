"""LoRA adapters in PEFT's format: a delta as one, and one as a delta, ours with all that was on record.

LoRA (Hu et al. 2021, equation 3) adds ``(alpha / r) B A`` to a map's weight, with A (r, in) and B (out, r). A delta is
that with a scaling of 1, so an exported edit can be served beside its model, stacked with others and switched off
without a weight being touched. The two files are written here and not by PEFT.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastcov.files import StrPath, parse_json, write_safetensors
from fastcov.hooks import isolated
from fastmemit.delta import Delta
from fastmemit.errors import BadData, DamagedFile
from fastmemit.models import ModelAdapter, fingerprint, new_folder
from fastmemit.models.adapter import is_transposed, linear_shape

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OURS = "fastmemit"  # the metadata entry with what a delta has and an adapter has no place for
PREFIX = "base_model.model."

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
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "eva_config", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config",
    "lora_alpha", "lora_dropout", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r",
    "rank_pattern", "revision", "runtime_config", "target_modules", "task_type", "use_rslora",
}  # fmt: skip
#: Ways of starting a training that leave the base model as it is; the others move part of its
#: weights into the adapter, which then means nothing without the rest.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


@isolated()
def save_adapter(
    delta: Delta, model: nn.Module | ModelAdapter, folder: StrPath, *, base_model: str | None = None, pad: bool = True
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

    Raises:
        BadData: The delta changes nothing, a weight of no linear map, or one that several modules share.
    """
    net = model.model if isinstance(model, ModelAdapter) else model
    delta.check(net)
    if not delta.factors:
        raise BadData("The edit changes no weight, so there is no adapter to write.")
    modules = {_module_of(net, name): name for name in delta.factors}
    ranks = {module: delta.factors[name][0].shape[1] for module, name in modules.items()}
    most = max(1, *ranks.values())
    tensors: dict[str, Tensor] = {}
    for module, name in modules.items():
        rank = most if pad else max(1, ranks[module])
        left, right = delta.factors[name]
        # A (r, in) and B (out, r) of ``left @ right^T``, which is (out, in), or transposed storage.
        a, b = (left.T, right) if is_transposed(net.get_submodule(module)) else (right.T, left)
        lacking = rank - ranks[module]
        tensors[f"{PREFIX}{module}.lora_A.weight"] = nn.functional.pad(a, (0, 0, 0, lacking)).contiguous()
        tensors[f"{PREFIX}{module}.lora_B.weight"] = nn.functional.pad(b, (0, lacking)).contiguous()
    on_record = delta.provenance.get("model_name")
    own = {} if pad else {f"^{re.escape(m)}": max(1, r) for m, r in ranks.items() if r != most}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model or (on_record if isinstance(on_record, str) else None),
        "revision": None,
        "inference_mode": True,
        # A pattern and not a list of names: PEFT takes a name in a list for every module that ends
        # in it, but a pattern has to fit the whole of a module's name.
        "target_modules": "|".join(re.escape(module) for module in modules),
        "r": most,
        "lora_alpha": most,  # the scaling is alpha / r
        "rank_pattern": own,
        "alpha_pattern": own,
        "fan_in_fan_out": any(is_transposed(net.get_submodule(module)) for module in modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    ours = {
        "digest": delta.digest(),
        "ranks": {name: ranks[module] for module, name in modules.items()},
        "provenance": delta.provenance,
    }
    with new_folder(folder) as partial:
        with open(partial / WEIGHTS, "wb") as file:
            write_safetensors(file, tensors, {"format": "pt", OURS: json.dumps(ours, sort_keys=True)})
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return Path(folder)


def _sharing(model: nn.Module, name: str) -> str | None:
    """Another name of a weight, if it has one."""
    named = dict(model.named_parameters(remove_duplicate=False))
    return next((other for other in named if other != name and named[other] is named.get(name)), None)


def _module_of(model: nn.Module, name: str) -> str:
    """The linear module that a weight belongs to, alone."""
    module, _, last = name.rpartition(".")
    part = model.get_submodule(module)
    if last != "weight" or linear_shape(part) is None:
        raise BadData(
            f"The edit changes {name}, which is not the weight of a linear map ({type(part).__name__}), and LoRA "
            "adapters change only those; save the whole model instead."
        )
    if other := _sharing(model, name):
        raise BadData(
            f"The edit changes {name}, which {other} shares, while an adapter would change one of the two; save the "
            "whole model instead."
        )
    return module


@isolated()
def load_adapter(folder: StrPath, model: nn.Module) -> Delta:
    """Read a LoRA adapter as the change that it makes to a model's weights.

    Args:
        folder: With ``adapter_config.json`` and ``adapter_model.safetensors``.
        model: The unedited model that the adapter is for.

    Returns:
        A delta; not applied. From `save_adapter` it comes back bit for bit with its provenance, from elsewhere it says
        that it is of this model.
    """
    config, tensors, ours = _read(Path(folder))
    _check_config(folder, config)
    pairs = _pairs(folder, tensors)
    scalings = _scalings(folder, config, {module: a.shape[0] for module, (a, _) in pairs.items()})
    factors = {}
    for module, (a, b) in pairs.items():
        part = _linear(folder, model, module)
        b = b if scalings[module] == 1 else b * scalings[module]
        left, right = (a.T, b) if is_transposed(part) else (b, a.T)
        factors[f"{module}.weight"] = (left.contiguous(), right.contiguous())
    delta = _as_written(folder, factors, ours) if ours else Delta(factors, {})
    delta.check_stored(model)  # before the shapes: a packed weight has another
    delta.check(model)
    if ours:
        return delta
    about: dict[str, Any] = {
        "model": fingerprint(model),
        "model_name": config.get("base_model_name_or_path"),
        "method": "lora",
        "settings": {k: config.get(k) for k in ("r", "lora_alpha", "use_rslora", "target_modules")},
        "requests": [],
    }
    return Delta(factors, about)


def read_about(folder: StrPath) -> tuple[dict[str, Any], dict[str, int], dict[str, Any]]:
    """What an adapter's folder says without its model: its config, rank by module, and a delta's record if it is ours.

    The record (``digest``, ``provenance``) is as it stands there; `load_adapter` compares it with the numbers.
    """
    config, tensors, ours = _read(Path(folder))
    return config, {module: a.shape[0] for module, (a, _) in _pairs(folder, tensors).items()}, ours


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """The config, the tensors, and what of a delta is on record."""
    from safetensors import SafetensorError, safe_open

    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"The folder {str(folder)!r} has no {name}; name one that holds a LoRA adapter in PEFT's format, with "
                "safetensors."
            )
    try:
        if (folder / CONFIG).stat().st_size > _CONFIG_BYTES:
            raise ValueError("it is too large")
        config = parse_json((folder / CONFIG).read_bytes())
        if not isinstance(config, dict):
            raise ValueError("it is no object")
    except ValueError as error:
        raise DamagedFile(_damaged(folder, f"has an {CONFIG} that cannot be read ({error})")) from error
    try:
        with safe_open(str(folder / WEIGHTS), framework="pt") as file:
            text = (file.metadata() or {}).get(OURS)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise DamagedFile(_damaged(folder, f"has an {WEIGHTS} that cannot be read ({error!s:.120})")) from error
    try:
        ours = {} if text is None else parse_json(text)
    except ValueError as error:
        raise DamagedFile(_damaged(folder, "has metadata that cannot be read")) from error
    return config, tensors, ours if isinstance(ours, dict) else {}


def _check_config(folder: StrPath, config: Mapping[str, Any]) -> None:
    """Refuse what changes more, or otherwise, than ``scaling B A`` on linear maps."""
    if config.get("peft_type") != "LORA":
        raise BadData(_bad(folder, f"is of the type {config.get('peft_type')!r:.40} and not LoRA"))
    if config.get("bias", "none") != "none":
        raise BadData(_bad(folder, f"trains biases too (bias={config['bias']!r:.40})"))
    start = config.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        moved = "moves a part of the base model into it; convert it to plain LoRA with PEFT first"
        raise BadData(_bad(folder, f"was started by {start!r:.40}, which {moved}"))
    if strange := [name for name, value in config.items() if name not in _KNOWN and value]:
        raise BadData(_bad(folder, f"uses {strange[0]}, which is more than plain LoRA"))


def _pairs(folder: StrPath, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Module -> A (r, in) and B (out, r) in float32."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None:
            kind = next((what for part, what in _KINDS.items() if part in name), "no LoRA factor")
            raise BadData(_bad(folder, f"holds {name!r:.120}, which is {kind}"))
        if not tensor.is_floating_point() or tensor.dim() != 2:
            raise BadData(_bad(folder, f"holds {name!r:.120} as {tensor.dtype} of {tensor.dim()} sides"))
        found.setdefault(match[1], {})[match[2]] = tensor.float()
    if not found:
        raise BadData(_bad(folder, "holds no tensor"))
    for module, pair in found.items():
        if len(pair) != 2 or pair["A"].shape[0] != pair["B"].shape[1]:
            raise DamagedFile(_damaged(folder, f"holds factors of {module!r:.120} that do not fit each other"))
    return {module: (pair["A"], pair["B"]) for module, pair in sorted(found.items())}


def _scalings(folder: StrPath, config: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, float]:
    """The factors before B A: alpha / r, or alpha / sqrt(r) in rank-stabilised LoRA."""
    own = config.get("alpha_pattern") or {}
    if not isinstance(own, dict):
        raise DamagedFile(_damaged(folder, f"has an alpha_pattern of {own!r:.40}"))
    try:
        patterns = Patterns(list(own))
    except ValueError as error:
        raise BadData(_bad(folder, f"has {error}, which is more than names and simple patterns of them")) from error
    found = {}
    for module, rank in ranks.items():
        number = patterns.first(module)
        alpha = config.get("lora_alpha", 8) if number is None else list(own.values())[number]
        # A whole number in JSON has no largest; compared, it need not become a float.
        if type(alpha) not in (int, float) or not abs(alpha) <= sys.float_info.max or rank < 1:
            raise DamagedFile(_damaged(folder, f"has an alpha of {alpha!r:.40} for a rank of {rank}"))
        found[module] = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return found


def _linear(folder: StrPath, model: nn.Module, module: str) -> nn.Module:
    try:
        part = model.get_submodule(module)
    except AttributeError:
        return nn.Identity()  # the delta's own check says that the model has no such weight
    if linear_shape(part) is None:
        raise BadData(_bad(folder, f"changes {module}, which is a {type(part).__name__} and no linear map"))
    if other := _sharing(model, f"{module}.weight"):
        raise BadData(_bad(folder, f"changes {module}, whose weight {other} shares"))
    return part


def _as_written(folder: StrPath, factors: Mapping[str, tuple[Tensor, Tensor]], ours: Mapping[str, Any]) -> Delta:
    """The delta that was exported: without the padding, and checked by its digest."""
    ranks, provenance = ours.get("ranks"), ours.get("provenance")
    if not (isinstance(ranks, dict) and isinstance(provenance, dict) and ranks.keys() == factors.keys()):
        raise DamagedFile(_damaged(folder, "is not what was exported"))
    cut = {
        name: (left[:, : ranks[name]].contiguous(), right[:, : ranks[name]].contiguous())
        for name, (left, right) in factors.items()
        if isinstance(ranks[name], int) and 0 <= ranks[name] <= left.shape[1]
    }
    delta = Delta(cut, provenance)
    rest = [t[:, ranks[n] :] for n in cut for t in factors[n]]
    if delta.digest() != ours.get("digest") or any(bool(torch.any(t != 0)) for t in rest):
        raise DamagedFile(_damaged(folder, "holds other numbers than were exported"))
    return delta


def _bad(folder: StrPath, what: str) -> str:
    return f"The adapter {os.fspath(folder)!r} {what}, so it cannot be read as an edit."


def _damaged(folder: StrPath, what: str) -> str:
    return f"The adapter {os.fspath(folder)!r} {what}; get or export it again."


# Patterns of a configuration, matched without backtracking. PEFT takes a key of ``alpha_pattern`` for a module where
# ``(.*\.)?(KEY)$`` fits its name. A stranger's regular expression may be searched for ever, so those read here are few:
# text, ``.``, ``\d``, ``\w``, ``\.`` and its like, sets such as ``[0-9]``, each with ``*``, ``+`` or ``?``; groups of
# alternatives, which may be missing (``?``) but not repeated; ``^`` and ``$``. All places of a name that can be reached
# are followed at once, as the bits of a number: the time is that of the pattern's length times the name's.

_MAX_TEXT = 100_000  # characters of all patterns of an adapter together
_MAX_DEPTH = 20
_TOKEN = re.compile(
    r"(?P<anchor>[\^$])|(?P<open>\((?:\?:)?)|(?P<close>\)\??)|(?P<bar>\|)"
    r"|(?P<one>\\[dw_\W]|\[\^?\]?(?:[^\]\[\\]|\\.)*\]|[^\\\[*+?{}])(?P<times>(?:[*+?]\??)?)"
)


class _Step(NamedTuple):
    """One part of a pattern."""

    kind: str | None  # anchor, bar, open, close; or "times", one character that fits, so many times
    text: str  # what stands there
    test: Callable[[str], object] | None  # whether a character fits; None: only the text itself
    many: bool
    absent: bool  # whether it may be missing


class Patterns:
    """Patterns in the order in which PEFT tries them; a ValueError names one that is more than is matched here."""

    def __init__(self, patterns: list[str]) -> None:
        if sum(map(len, patterns)) > _MAX_TEXT:
            raise ValueError(f"patterns of more than {_MAX_TEXT} characters")
        self._patterns = [_parsed(pattern) for pattern in patterns]

    def first(self, name: str) -> int | None:
        """The number of the first pattern that fits a module's name, None where none does."""
        places: dict[str, int] = {}
        for index, character in enumerate(name):
            places[character] = places.get(character, 0) | 1 << index
        starts = 1 | places.get(".", 0) << 1
        last = 1 << len(name)
        return next((i for i, steps in enumerate(self._patterns) if _after(steps, starts, places, last) & last), None)


def _parsed(pattern: str) -> list[_Step]:
    bad = ValueError(f"the pattern {pattern!r:.60}")
    steps: list[_Step] = []
    at = depth = 0
    while at < len(pattern):
        token = _TOKEN.match(pattern, at)
        if token is None:
            raise bad
        at, kind, one = token.end(), token.lastgroup, token["one"]
        depth += (kind == "open") - (kind == "close")
        if not 0 <= depth <= _MAX_DEPTH:
            raise bad
        try:
            test = re.compile(one).fullmatch if one and (len(one) > 1 or one == ".") else None
        except re.error:
            raise bad from None
        times = (token["times"] or "")[:1]  # a lazy one fits the same names
        steps.append(_Step(kind, one or token[0], test, times in ("*", "+"), times in ("*", "?") or token[0] == ")?"))
    if depth:
        raise bad
    return steps


def _after(steps: Sequence[_Step], at: int, places: dict[str, int], last: int) -> int:
    """The places that are reached from those in `at`; bit i stands before character i."""
    begun, ended = at, 0  # where the alternatives begin that are read, and where those before this one have ended
    outer: list[tuple[int, int]] = []
    for kind, text, test, many, absent in steps:
        if kind == "anchor":
            at &= 1 if text == "^" else last
        elif kind == "bar":
            at, ended = begun, ended | at
        elif kind == "open":
            outer.append((begun, ended))
            begun, ended = at, 0
        elif kind == "close":
            at |= ended | (begun if absent else 0)
            begun, ended = outer.pop()
        elif at:
            fitting = places.get(text, 0) if test is None else sum(where for c, where in places.items() if test(c))
            reached = new = (at & fitting) << 1
            while many and new:
                new = (new & fitting) << 1 & ~reached
                reached |= new
            at = reached | at if absent else reached
    return at | ended
