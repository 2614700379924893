"""The settings of an edit: one dataclass, presets by architecture and size, overrides by name."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from fastcov.shrinkage import SHRINKAGES
from fastmemit.editors.defaults import SINGLE, defaults
from fastmemit.editors.layers import parse_layers
from fastmemit.errors import BadConfig
from fastmemit.models import ModelAdapter
from fastmemit.targets import TargetSettings

Method = Literal["rome", "emmet", "memit", "pmet", "encore", "alphaedit"]
METHODS: tuple[Method, ...] = get_args(Method)
#: Those to which the keys of earlier edits belong: they are preserved without being asked for.
PRESERVING = ("encore", "alphaedit")
KEYS = ("consistent", "mean", "original")
SPREADS = ("linear", "sqrt")
#: With fewer keys than this many widths the smallest eigenvalues of C are noise, worst at 1. A
#: ridge of this share of the diagonal's mean is above that noise; where it is not needed it moved S
#: by less than the interval of S (docs/below-minimum.md).
SMALL_BUDGET = 3.0
SMALL_BUDGET_RIDGE = 0.1
STOPS = ("loss", "most-probable")


@dataclass(frozen=True)
class EditConfig:
    """Everything that an edit depends on but the model, the requests and the statistics.

    Attributes:
        method: One of `METHODS`.
        layers: The edited layers, ascending; one for ROME and EMMET.
        weight: w, how many tokens' worth the preserved keys weigh against one edit; None takes the
            key width d_k (see docs/second-moment.md).
        ridge: Added to the diagonal of ``w C``.
        relative_ridge: Added to it as well, as a multiple of the diagonal's mean. None takes
            `SMALL_BUDGET_RIDGE` where C has fewer keys than `SMALL_BUDGET` times the width,
            `ridge` is 0 and nothing is shrunk, else 0 (docs/below-minimum.md).
        shrinkage: How C is moved towards a multiple of the identity before: ``"none"``,
            ``"ledoit-wolf"`` or ``"oas"`` (see `fastcov.shrinkage`).
        lambda_e: EMMET only, batches above 1: how far the equality constraint is relaxed.
        spread: Of methods with several layers: ``"linear"``: each layer takes ``1 / (layers left)``
            of what is missing (MEMIT); ``"sqrt"``: ``1 / sqrt(layers left)`` (PMET).
        l2: AlphaEdit only: how much the size of the change counts.
        null_threshold: AlphaEdit only: eigenvalues of C below it count as zero.
        null_relative: AlphaEdit only, instead of `null_threshold` where it is not None: a multiple
            of the mean of C's diagonal.
        clamp: ``||delta|| <= clamp * ||v0||`` for target vectors.
        steps: Loss evaluations for a target vector at most.
        v_lr: Adam's learning rate for target vectors.
        weight_decay: Factor of ``||delta|| / ||v0||^2``.
        kl_factor: Factor of the KL term.
        early_stop: A target is finished once its loss is below this.
        stop: ``"loss"``, or ``"most-probable"``: a target is finished once its every token is the
            most probable one in every context, and `early_stop` says nothing.
        keys: ROME only.  ``"consistent"``: one key everywhere, half the bare prompt's and half the
            mean of the other contexts', as in EMMET; ``"mean"``: one key everywhere, the mean over
            all contexts (r-ROME); ``"original"``: as first released, with the bare prompt's key in
            the denominator.
        preset: The name of the preset that the values come from.
    """

    method: Method
    layers: tuple[int, ...]
    weight: float | None = None
    ridge: float = 0.0
    relative_ridge: float | None = None
    shrinkage: str = "none"
    lambda_e: float = 0.0
    spread: str = "linear"
    l2: float = 10.0
    null_threshold: float = 0.02
    null_relative: float | None = None
    clamp: float = 1.0
    steps: int = 25
    v_lr: float = 0.5
    weight_decay: float = 0.5
    kl_factor: float = 0.0625
    early_stop: float = 0.05
    stop: str = "loss"
    keys: str = "consistent"
    preset: str = "default"

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        _check(self)

    def targets(self) -> TargetSettings:
        """The part of the settings that target vectors depend on."""
        return TargetSettings(
            layer=self.layers[-1],
            site="projection" if self.method == "rome" else "block",
            steps=self.steps,
            learning_rate=self.v_lr,
            weight_decay=self.weight_decay,
            clamp=self.clamp,
            kl_factor=self.kl_factor,
            early_stop=self.early_stop,
            stop="most-probable" if self.stop == "most-probable" else "loss",
        )

    def settled(self, multiplier: float) -> EditConfig:
        """The settings with the relative ridge that they come to: 0 for AlphaEdit, which has no A.

        Args:
            multiplier: How many keys C has, as a multiple of their width; of the layer that has
                fewest (`fastmemit.factors.settled`).
        """
        if self.relative_ridge is not None:
            return self
        bare = self.method != "alphaedit" and not self.ridge and self.shrinkage == "none"
        few = multiplier < SMALL_BUDGET
        return dataclasses.replace(self, relative_ridge=SMALL_BUDGET_RIDGE if bare and few else 0.0)

    def replaced(self, overrides: Mapping[str, Any]) -> EditConfig:
        """The settings with some values replaced.

        Raises:
            BadConfig: An unknown name, or a value out of range.
        """
        fixed = {"method", "preset"}
        names = [f.name for f in dataclasses.fields(self) if f.name not in fixed]
        for name in overrides:
            if name not in names:
                raise BadConfig(f"There is no setting {name!r}; choose from {', '.join(names)}.")
        return dataclasses.replace(self, **overrides)


def find_config(
    adapter: ModelAdapter, method: str, overrides: Mapping[str, Any] | None = None
) -> EditConfig:
    """The settings for a model: its preset if there is one, else defaults made from its shape.

    Args:
        adapter: The model.
        method: One of `METHODS`.
        overrides: Values by name that replace the preset's.

    Raises:
        BadConfig: An unknown method or setting, or a value out of range.
        BadLayer: A layer that the model does not have.
    """
    if method not in METHODS:
        raise BadConfig(f"There is no method {method!r}; choose from {', '.join(METHODS)}.")
    values = defaults(adapter, method)
    config = EditConfig(method=method, **values).replaced(overrides or {})
    for layer in config.layers:
        adapter.check_layer(layer)
    return config


def parse_overrides(pairs: Iterable[str]) -> dict[str, Any]:
    """``["clamp=0.75", "layers=4,5,6"]`` as values for `find_config`.

    ``layers`` takes numbers and ranges (``4-8`` or ``4,6,8``); ``weight=none`` takes the default.

    Raises:
        BadConfig: No ``=``, an unknown name, or a value that is not of the setting's kind.
    """
    kinds = {f.name: str(f.type) for f in dataclasses.fields(EditConfig)}
    values: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        name, text = name.strip(), text.strip()
        if not equals or name not in kinds or name in ("method", "preset"):
            known = ", ".join(n for n in kinds if n not in ("method", "preset"))
            raise BadConfig(f"{pair!r} is not name=value with one of the settings {known}.")
        if name == "layers":
            values[name] = parse_layers(text)
            continue
        try:
            values[name] = _parse(kinds[name], text)
        except ValueError as error:
            raise BadConfig(
                f"The value {text!r} of {name} is not {_KINDS[kinds[name]]}; correct it."
            ) from error
    return values


_KINDS = {
    "float": "a number",
    "float | None": "a number or 'none'",
    "int": "a whole number",
    "str": "a word",
}


def _parse(kind: str, text: str) -> Any:
    if kind == "float | None" and text.lower() == "none":
        return None
    return {"int": int, "str": str}.get(kind, float)(text)


def _check(config: EditConfig) -> None:
    layers = config.layers
    if not layers or any(not isinstance(i, int) or isinstance(i, bool) for i in layers):
        raise BadConfig(f"layers must be whole numbers, at least one, but are {layers!r}.")
    if list(layers) != sorted(set(layers)):
        raise BadConfig(f"layers must be ascending and distinct but are {list(layers)}.")
    if config.method in SINGLE and len(layers) != 1:
        raise BadConfig(
            f"{config.method} edits one layer but layers are {list(layers)}; set layers=N."
        )
    if isinstance(config.steps, bool) or not isinstance(config.steps, int) or config.steps < 1:
        raise BadConfig(f"steps must be a whole number above 0 but is {config.steps!r}.")
    words = {"keys": KEYS, "shrinkage": tuple(SHRINKAGES), "spread": SPREADS, "stop": STOPS}
    for name, known in words.items():
        value = getattr(config, name)
        if value not in known:
            raise BadConfig(f"{name} must be one of {', '.join(known)} but is {value!r}.")
    positive = ["clamp", "v_lr", "null_threshold"]
    positive += [n for n in ("weight", "null_relative") if getattr(config, n) is not None]
    other = ["ridge", "lambda_e", "l2", "weight_decay", "kl_factor", "early_stop"]
    other += ["relative_ridge"] if config.relative_ridge is not None else []
    for name in (*positive, *other):
        value = getattr(config, name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value < 0 or (name in positive and value == 0):
            bound = "above 0" if name in positive else "0 or above"
            raise BadConfig(f"{name} must be a finite number {bound} but is {value!r}.")
