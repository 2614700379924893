"""Hyper-parameters of the ROME family and of EasyEdit as our settings, from objects and from JSON and YAML files."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastcov.files import StrPath, printable_logger
from fastmemit.data.reading import check_file, decode, parse_json
from fastmemit.errors import BadConfig
from fastmemit.methods import CONFIGS, EditConfig, MemitConfig
from fastmemit.methods.config import Method
from fastmemit.models import ModelAdapter
from fastmemit.targets import TargetSettings

log = printable_logger(__name__)

MAX_BYTES = 1 << 16  # a file of hyper-parameters has one or two thousand
_DEEPEST = 8
#: What their files are for -> the method here that is the same, by names in small letters with "-".
METHODS: dict[str, Method] = {
    "rome": "rome", "r-rome": "rome", "emmet": "emmet", "memit": "memit", "alphaedit": "alphaedit",
}  # fmt: skip
# Others that write in closed form with C, and so have much the same fields. Their files are none of the above.
_OTHERS = {
    "pmet": "it optimises what attention and MLP put out together; --method pmet is MEMIT with its spread alone",
    "sphere": "it is AlphaEdit with a projection of each change away from the weight's main directions",
    "eamet": "it aligns the target vectors with their keys",
    "memit-fe": "it has a target vector for each layer and spreads nothing; ours is for the last layer",
    "core": "it has contexts and a loss of its own",
    "nse": "it chooses neurons, and edits a layer until they fit",
    "ultraedit": "it writes the projections that its file lists; --method ultraedit writes ours (--set eta=LR)",
    "unke": "it trains a whole layer on longer texts, from their last token",
}
_NAMES = ("alg_name", "algo_name")  # fields that name the method: EasyEdit's, and those of a run of the paper's code
# Fields that tell what a file is for where nothing names it; the first that fits.
_MARKS = {
    "sphere": {"cumulative_ratio", "suppression_strength"},
    "nse": {"alpha", "max_iterations", "neuron_threshold", "upper_bound"},
    "pmet": {"nll_loss_factor", "rewrite_module_tmps"},
    "eamet": {"cs_factor", "ks_bs", "mse_factor"},
    "core": {"ctx_len", "ctx_num"},
    "unke": {"ex_data_num", "optim_num_step"},
    "alphaedit": {"L2", "P_loc", "nullspace_threshold"},
    "r-rome": {"enable_prompt_keys", "enable_random_prefix_keys", "original_implementation"},
}
#: Fields that ROME's family alone has.
_FAMILY = {"clamp_norm_factor", "emmet_lambda", "mom2_update_weight", "v_loss_layer", "v_lr", "v_num_grad_steps"}
_OURS = {
    "v_num_grad_steps": "steps",
    "v_lr": "v_lr",
    "v_weight_decay": "weight_decay",
    "clamp_norm_factor": "clamp",
    "kl_factor": "kl_factor",
    "mom2_update_weight": "weight",
    "update_norm_lambda": "ridge",
    "emmet_lambda": "lambda_e",
    "L2": "l2",
    "nullspace_threshold": "null_threshold",
}
# What is done here in one way only.
_FIXED: dict[str, tuple[Any, str]] = {
    "fact_token": ("subject_last", "edits enter at the subject's last token"),
    "layer_selection": ("all", "all layers are edited, none at random"),
    "context_template_length_params": ([[5, 10], [10, 10]], "these are the contexts' lengths"),
    "bias_update": (False, "biases are not edited"),
    "prob_cutoff": (0, "target vectors stop at their loss alone"),
    "norm_control": (0, "norms of updates are not bounded"),
    "shuffle_text": (False, "the tokens of a text keep their order"),
    "skill_preservation": (False, "C is of one corpus"),
    "random_vector_preservation": (False, "keys are those of a text"),
    "wikipedia_lang": ("en", "wikipedia is the English one; name another text as the corpus"),
}
# Found by the model's structure, done elsewhere, or of no meaning here.
_PASSED = {
    "alg_name", "algo_name", "attn_module_tmp", "batch_size", "calculate_objective_value", "dataset",
    "device", "dynamic", "dynamic_multiplier", "fp16", "identity_cov", "layer_module_tmp", "layers",
    "lm_head_module", "ln_f_module", "max_length", "mlp_module_tmp", "model_class", "model_name", "model_parallel",
    "mom2_adjustment", "mom2_dataset", "mom2_dtype", "mom2_n_samples", "n_edits", "proj_dim",
    "rewrite_module_tmp", "sequential", "skill_lambda", "skill_sample_size", "stats_dir", "tokenizer_class",
    "tokenizer_name", "v_loss_layer",
}  # fmt: skip

# As theirs: nothing is added to few keys, or relaxed, that the file does not name.
_THEIRS: dict[str, Any] = {
    "relative_ridge": 0.0, "lambda_e": 0.0, "scale": "published", "optimiser": "adam", "v_lr": 0.5, "steps": 25,
}  # fmt: skip
# The settings that a target vector depends on.
_OF_TARGETS = {"optimiser", "steps", "v_lr", "weight_decay", "clamp", "kl_factor", "scale"}


@dataclass(frozen=True)
class Hparams:
    """What hyper-parameters of another codebase say."""

    config: EditConfig
    module: str | None = None  # the edited projection with ``{}`` for the layer, where it is named
    loss_layer: int | None = None  # the block whose output the loss reads, which must be the last
    dataset: str = "wikipedia"  # what C is to be collected on
    multiplier: float | None = None  # d_m, where they say it (``dynamic`` with ``dynamic_multiplier``)

    def check(self, adapter: ModelAdapter) -> None:
        """Refuse a model that these are not for: its loss is read, or its keys are, at another place."""
        for layer in self.config.layers:
            adapter.check_layer(layer)
        last = adapter.n_layers - 1
        if self.loss_layer not in (None, last):
            raise BadConfig(
                f"v_loss_layer is {self.loss_layer} but the last block of this model is {last}, and the loss is read "
                "from the model's own output; set it to that if the settings are for this model."
            )
        if self.module not in (None, adapter.template):
            raise BadConfig(
                f"rewrite_module_tmp is {self.module!r} but {adapter.template!r} is edited here; name one of them."
            )

    def overrides(self) -> dict[str, Any]:
        """The settings by name, as `fastmemit.Editor.edit` takes them."""
        return {name: getattr(self.config, name) for name in self.config.settings()}


def read_hparams(hparams: Any, method: str | None = None, name: str = "hparams") -> Hparams:
    """Read hyper-parameters as other codebases hold them; names that are not known are logged and left out.

    Args:
        hparams: An object with attributes, a mapping, settings such as `MemitConfig`, or `Hparams`.
        method: ``"rome"``, ``"emmet"``, ``"memit"`` or ``"alphaedit"``; None tells it from the fields.
        name: What to call them in messages and in the settings' ``preset``.

    Raises:
        BadConfig: A value out of range, one that cannot be honoured, no layers, or they are for another method, or for
            one that is not here.
    """
    if isinstance(hparams, EditConfig):
        hparams = Hparams(hparams)
    if isinstance(hparams, Hparams):
        if method is not None and METHODS.get(method, method) != hparams.config.method:
            raise BadConfig(
                f"The settings are for {hparams.config.method} but not for {method}; pass those of {method}."
            )
        return hparams
    fields = fields_of(hparams)
    kind = _kind(fields, method, name)
    cls = CONFIGS[METHODS[kind]]
    check_honoured(fields, name)
    if fields.get("layers") in (None, [], ()):
        raise BadConfig(f"{name} has no layers; add them, such as [4, 5, 6, 7, 8].")
    values = {**_THEIRS, "layers": whole_numbers(fields["layers"], name), **_keys(fields, kind, name)}
    if _identity(fields, kind, name):
        values["covariance"] = "identity"
    values = {setting: v for setting, v in values.items() if setting in cls.settings()}
    values |= _settings(fields, name, cls.settings())
    known = {theirs for theirs in _OURS if theirs not in _MARKS["alphaedit"]} | _MARKS.get(kind, set())
    unknown = sorted(fields.keys() - known - _FIXED.keys() - _PASSED)
    if unknown:
        log.warning("%s: not used here: %s", name, ", ".join(f"{field:.40}" for field in unknown))
    return Hparams(
        cls(**values, preset=name),
        module=_text(fields, "rewrite_module_tmp", name),
        loss_layer=_loss_layer(fields, name),
        dataset=_text(fields, "mom2_dataset", name) or "wikipedia",
        multiplier=multiplier_of(fields),
    )


def check_honoured(fields: Mapping[str, Any], name: str) -> None:
    """Refuse values of what is done here in one way only, by a `BadConfig`."""
    for field, (value, why) in _FIXED.items():
        if fields.get(field) is not None and _plain(fields[field]) != value:
            raise BadConfig(_not_honoured(fields, field, name, why, json.dumps(value)))


def target_settings(fields: Mapping[str, Any], layer: int, adapter: ModelAdapter) -> TargetSettings:
    """How MEMIT's hyper-parameters have target vectors optimised at a layer, for any method; else a BadConfig."""
    check_honoured(fields, "hparams")
    values = {setting: v for setting, v in _THEIRS.items() if setting in _OF_TARGETS}
    config = MemitConfig(layers=(layer,), **{**values, **_settings(fields, "hparams", _OF_TARGETS)})
    Hparams(config, loss_layer=_loss_layer(fields, "hparams")).check(adapter)
    return config.targets()


def _settings(fields: Mapping[str, Any], name: str, wanted: Collection[str]) -> dict[str, Any]:
    """The numbers that are there of the settings wanted, by our names."""
    values: dict[str, Any] = {}
    for theirs, ours in _OURS.items():
        if fields.get(theirs) is not None and ours in wanted:
            number = finite(fields[theirs], theirs, name)
            values[ours] = int(number) if ours == "steps" and number.is_integer() else number
    return values


def _loss_layer(fields: Mapping[str, Any], name: str) -> int | None:
    value = fields.get("v_loss_layer")
    if value is None:
        return None
    number = finite(value, "v_loss_layer", name)
    if not number.is_integer():
        raise BadConfig(f"v_loss_layer of {name} must be a whole number but is {_shown(value)}; name the last block.")
    return int(number)


def fields_of(hparams: Any) -> dict[str, Any]:
    """Names and values of hyper-parameters, whatever holds them; a `BadConfig` where nothing does."""
    if isinstance(hparams, EditConfig):
        return {"layers": list(hparams.layers)}
    if isinstance(hparams, Hparams):
        about = {"mom2_dataset": hparams.dataset, "dynamic": True, "dynamic_multiplier": hparams.multiplier}
        return fields_of(hparams.config) | about
    if has_names(hparams):
        return dict(hparams)
    names = [name for name in dir(hparams) if not name.startswith("_")]
    values = {name: getattr(hparams, name, None) for name in names}
    found = {name: value for name, value in values.items() if not callable(value)}
    if isinstance(hparams, str | bytes | int | float | list | tuple | Mapping) or not found:
        raise BadConfig(
            f"hparams must be an object with fields, a mapping of names or an EditConfig but is "
            f"{type(hparams).__name__}; read a file with fastmemit.compat.load_hparams."
        )
    return found


def multiplier_of(fields: Mapping[str, Any]) -> float | None:
    """d_m where hyper-parameters have it, as those of the paper's own code."""
    if not fields.get("dynamic") or fields.get("dynamic_multiplier") is None:
        return None
    return finite(fields["dynamic_multiplier"], "dynamic_multiplier", "hparams")


def device_of(hparams: Any) -> torch.device | None:
    """Where EasyEdit's ``device`` is, a number of a GPU or a name; None where there is none."""
    value = None if hparams is None else fields_of(hparams).get("device")
    if value is None or isinstance(value, bool):
        return None
    number = str(value).strip()
    try:
        return torch.device(f"cuda:{number}" if number.isdecimal() else number) if number else None
    except RuntimeError as error:
        raise BadConfig(f"device of hparams is {_shown(value)}, which is no device; write 0 or 'cpu'.") from error


def _kind(fields: Mapping[str, Any], method: str | None, name: str) -> str:
    """What hyper-parameters are for, one of `METHODS`."""
    named = next((fields[field] for field in _NAMES if fields.get(field)), None)
    marked = next((kind for kind, marks in _MARKS.items() if any(fields.get(mark) is not None for mark in marks)), None)
    asked = None if method is None else _small(method)
    kind = marked or asked if named is None else _small(named)
    if kind is None and not fields.keys() & _FAMILY:
        raise BadConfig(
            f"{name} names no method (alg_name) and has none of the fields {', '.join(sorted(_FAMILY))}, so it is for "
            "another one than ROME, R-ROME, EMMET, MEMIT and AlphaEdit; set its values one by one (--set)."
        )
    if kind is None:
        one = isinstance(fields.get("layers"), Sequence) and len(fields["layers"]) == 1
        kind = "emmet" if fields.get("emmet_lambda") is not None and one else "memit"
        kind = "rome" if fields.get("mom2_update_weight") is None else kind
    if kind not in METHODS:
        why = f": {_OTHERS[kind]}" if kind in _OTHERS else ""
        raise BadConfig(
            f"{name} is for {named or kind.upper()!s:.60}, whose settings are not read{why}. Those of ROME, R-ROME, "
            "EMMET, MEMIT and AlphaEdit are; set what others share with them one by one (--set)."
        )
    if asked not in (None, kind, METHODS[kind]):
        raise BadConfig(f"{name} is for {named or kind} but not for {method}; name the method that it is for.")
    return kind


def _small(name: object) -> str:
    return str(name).lower().replace("_", "-")


def _keys(fields: Mapping[str, Any], kind: str, name: str) -> dict[str, Any]:
    """Which keys R-ROME takes: the mean over contexts in both places, where its file says nothing."""
    if kind != "r-rome":
        return {}
    if fields.get("original_implementation"):
        return {"keys": "original"}
    if fields.get("enable_prompt_keys") or fields.get("enable_random_prefix_keys") is False:
        why = "r-ROME's key is the mean over contexts here"
        raise BadConfig(
            _not_honoured(fields, "enable_prompt_keys", name, why, "false and enable_random_prefix_keys to true")
        )
    return {"keys": "mean"}


def _identity(fields: Mapping[str, Any], kind: str, name: str) -> bool:
    """Whether I stands in the place of C."""
    without = fields.get("mom2_adjustment") is False
    if without and METHODS[kind] != "rome":
        log.warning("%s: mom2_adjustment is false, which %s never reads there; C is used as there", name, kind.upper())
    return bool(fields.get("identity_cov")) or (without and METHODS[kind] == "rome")


def _not_honoured(fields: Mapping[str, Any], field: str, name: str, why: str, value: str) -> str:
    return f"{field} of {name} is {_shown(fields.get(field))}, which cannot be honoured, for {why}; set it to {value}."


def finite(value: Any, field: str, name: str) -> float:
    """A finite number, also one in text, as which YAML reads ``5e-1``; a `BadConfig` for anything else."""
    try:
        if isinstance(value, bool) or not isinstance(value, int | float | str) or not math.isfinite(float(value)):
            raise ValueError
        return float(value)
    except (ValueError, OverflowError) as error:
        raise BadConfig(f"{field} of {name} must be a finite number but is {_shown(value)}.") from error


def whole_numbers(values: Any, name: str) -> tuple[int, ...]:
    """Layers, or the one layer, that somebody names; a `BadConfig` where one is no whole number."""
    listed = values if isinstance(values, Sequence) and not isinstance(values, str | bytes) else [values]
    for value in listed:
        if isinstance(value, bool) or not isinstance(value, int):
            raise BadConfig(f"layers of {name} must be whole numbers but are {_shown(values)}.")
    return tuple(listed)


def _text(fields: Mapping[str, Any], field: str, name: str) -> str | None:
    value = fields.get(field)
    if value is not None and not isinstance(value, str):
        raise BadConfig(f"{field} of {name} must be text but is {_shown(value)}.")
    return value


def has_names(values: Any) -> bool:
    """Whether these are names with values."""
    return isinstance(values, Mapping) and all(isinstance(key, str) for key in values)


def _plain(value: Any) -> Any:
    """Tuples as lists, as JSON has them."""
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _shown(value: Any) -> str:
    return f"{value!r:.60}"


def open_hparams(path: StrPath, method: str | None = None) -> Hparams:
    """Read a file of hyper-parameters: JSON (ROME, MEMIT, EMMET) or YAML (EasyEdit).

    Args:
        path: A .json, .yaml or .yml file.
        method: Which method they are for; None takes ``alg_name``, else the folder's name
            (``hparams/MEMIT/gpt2-xl.json``), else what the fields tell.

    Raises:
        BadConfig: The file is not there, too large, or not an object of names and values; its folder and its
            ``alg_name`` say different methods; or see `read_hparams`.
    """
    path = Path(path)
    check_file(path, BadConfig)
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise BadConfig(f"{path} has {size} bytes, which is no file of hyper-parameters; name another.")
    text = decode(path.read_bytes(), path, 0, BadConfig)
    yaml = path.suffix.lower() in (".yaml", ".yml")
    values = _parse_yaml(text, path) if yaml else parse_json(text, str(path), BadConfig)
    if not has_names(values):
        raise BadConfig(f"{path} holds no names with values; give a file of hyper-parameters.")
    folder = path.resolve().parent.name
    if method is None and folder.lower() in (*METHODS, *_OTHERS):
        field = next((field for field in _NAMES if values.get(field)), None)
        if field is not None and _small(values[field]) != folder.lower():
            raise BadConfig(
                f"{str(path)!r} lies among the files of {folder} but says {field} {_shown(values[field])}; say which "
                "of the two it is for with method= (--method)."
            )
        method = folder
    return read_hparams(values, method, path.name)


def load_hparams(path: StrPath, method: str | None = None) -> EditConfig:
    """The settings in a file of hyper-parameters; see `open_hparams`."""
    return open_hparams(path, method).config


def _parse_yaml(text: str, path: Path) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML brings no types
        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            # An alias may stand for a list of aliases, and so on: a small text of a large value.
            if self.check_event(yaml.AliasEvent):
                raise BadConfig(f"{path} uses YAML aliases, which are not read; write values out.")
            if self.depth >= _DEEPEST and not self.check_event(yaml.ScalarEvent):
                raise BadConfig(f"{path} is nested too deep, beyond {_DEEPEST} levels; write plain lists.")
            self.depth += 1
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            names = [name.value for name, _ in node.value if isinstance(name, yaml.ScalarNode)]
            for place, name in enumerate(names):
                if name in names[:place]:  # of which YAML takes the last
                    raise BadConfig(f"{path} has {name!r:.80} twice in one place; keep one of the two.")
            return node

    try:
        return Loader(text).get_single_data()
    except BadConfig:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        said = " ".join(str(error).split())
        raise BadConfig(f"{path} is not YAML ({said:.160}); correct it.") from error
