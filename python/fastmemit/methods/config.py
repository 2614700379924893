"""The settings of an edit: one class a method, presets by model, changes by name."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, ClassVar, Literal, TypeVar, get_args

from fastcov.files import parse_json
from fastmemit.errors import BadConfig, BadLayer
from fastmemit.models import ModelAdapter
from fastmemit.targets import TargetSettings


def parse_layers(text: str) -> tuple[int, ...]:
    """``"4-8"``, ``"4,6"`` or ``"3-5,9"`` as layer numbers, ascending as they are written; else a BadConfig."""
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        try:
            numbers = range(int(first), (int(last) if dash else int(first)) + 1)
        except ValueError as error:
            raise BadConfig(f"The layers {text!r} are not numbers and ranges; write them as 4-8 or 4,6.") from error
        if not numbers:
            raise BadConfig(f"The range {part!r} of layers is empty; write it as 4-8.")
        layers += numbers
    return tuple(layers)


Method = Literal["rome", "emmet", "memit", "pmet", "encore", "rlsedit", "alphaedit", "ultraedit"]
Keys = Literal["consistent", "mean", "original"]
Shrinkage = Literal["none", "ledoit-wolf", "oas"]
Spread = Literal["linear", "sqrt"]
Stop = Literal["loss", "nll", "most-probable"]
Optimiser = Literal["adam", "rotate"]
Scale = Literal["published", "median"]
Site = Literal["block", "projection"]
Covariance = Literal["collected", "identity"]
Tokens = Literal["answer", "all"]

METHODS: tuple[Method, ...] = get_args(Method)
#: Those to which the keys of earlier edits belong: they are preserved without being asked for.
PRESERVING = ("encore", "rlsedit", "alphaedit")
#: With fewer keys than this many widths the smallest eigenvalues of C are noise, worst at 1. A
#: ridge of this share of the diagonal's mean is above that noise; where it is not needed it moved S
#: by less than the interval of S; from three widths on it costs some models paraphrases (docs/results/ridge.md).
SMALL_BUDGET = 3.0
SMALL_BUDGET_RIDGE = 0.1

# What values a setting takes, by its name: words, numbers above 0; all others are 0 or above.
_WORDS: dict[str, tuple[str, ...]] = {
    "keys": get_args(Keys),
    "shrinkage": get_args(Shrinkage),
    "spread": get_args(Spread),
    "stop": get_args(Stop),
    "scale": get_args(Scale),
    "optimiser": get_args(Optimiser),
    "site": get_args(Site),
    "covariance": get_args(Covariance),
    "tokens": get_args(Tokens),
}
_ABOVE_ZERO = {"clamp", "v_lr", "rho", "null_threshold", "weight", "null_relative", "eta"}

Config = TypeVar("Config", bound="EditConfig")


@dataclass(frozen=True, kw_only=True)
class EditConfig:
    """What the settings of all methods share.

    Each method has a class of its own with its settings and no others. An object that you make yourself is taken as it
    is; `fastmemit.Editor.config` begins with the model's preset.

    Attributes:
        method: The method's name, one of `METHODS`.
        layers: The edited layers, ascending; one for ROME and EMMET.
        preset: The name of the preset that the values come from; not a setting.

    Raises:
        BadConfig: A value out of range, or one that nothing would read.
    """

    method: ClassVar[Method]
    single_layer: ClassVar[bool] = False

    layers: tuple[int, ...]
    preset: str = "default"

    def __post_init__(self) -> None:
        if not hasattr(self, "method"):
            raise TypeError(f"{type(self).__name__} belongs to no method; use MemitConfig or alike.")
        object.__setattr__(self, "layers", _layers(self.layers))
        self._check()
        for name, why in self._unread(vars(self)).items():
            value, default = getattr(self, name), self.settings()[name]
            if value != default:
                raise BadConfig(f"{name}={value!r} would change nothing, for {why}; leave {name} at {default!r}.")

    @classmethod
    def settings(cls) -> dict[str, Any]:
        """The method's settings with their defaults; layers have None, for theirs is the model's."""
        own = [f for f in dataclasses.fields(cls) if f.name != "preset"]
        return {f.name: None if f.default is dataclasses.MISSING else f.default for f in own}

    @classmethod
    def check_name(cls, name: str) -> None:
        """Refuse what is not a setting of this method.

        Raises:
            BadConfig: It belongs to another method, which is named, or to none.
        """
        own = list(cls.settings())
        if name in own:
            return
        has = f"{cls.method} has {', '.join(own)}"
        owners = [method for method, other in CONFIGS.items() if name in other.settings()]
        if owners:
            raise BadConfig(f"{name} is a setting of {_listed(owners)}; {has}.")
        every = [n for other in CONFIGS.values() for n in other.settings()]
        near = (*difflib.get_close_matches(name, own, 1), *difflib.get_close_matches(name, every, 1))
        meant = f"did you mean {near[0]!r}? " if near else ""
        raise BadConfig(f"There is no setting {name!r}; {meant}{has}.")

    def replaced(self: Config, changes: Mapping[str, Any]) -> Config:
        """The settings with some values replaced.

        Raises:
            BadConfig: A name that is not a setting of the method, or a value out of range.
        """
        for name in changes:
            self.check_name(name)
        values = {**vars(self), **changes}
        values["layers"] = _layers(values["layers"])
        if "optimiser" in changes and values["optimiser"] != vars(self)["optimiser"] and "steps" not in changes:
            values["steps"] = None  # the other's count
        # What a preset has for a setting that the changes put out of use is nobody's wish.
        idle = [name for name in self._unread(values) if name not in changes]
        return type(self)(**{**values, **{name: self.settings()[name] for name in idle}})

    def as_dict(self) -> dict[str, Any]:
        """The method and its settings by name, as provenance has them."""
        return {"method": self.method, **vars(self)}

    def targets(self) -> TargetSettings | None:
        """The part of the settings that target vectors depend on, or None where the method has no target vectors."""
        return None

    @property
    def quartic(self) -> bool:
        """Whether statistics must have the sum of ``||k||^4``."""
        return getattr(self, "shrinkage", "none") == "ledoit-wolf"

    def resolved(self: Config, multiplier: float) -> Config:
        """The settings with what depends on the statistics put in.

        Args:
            multiplier: How many keys C has, as a multiple of their width; of the layer that has fewest
                (`fastmemit.statistics.Statistics.resolved`).
        """
        return self

    @property
    def needs_statistics(self) -> bool:
        """Whether there is a C in the method's formula that has to be collected."""
        return True

    @classmethod
    def _unread(cls, values: Mapping[str, Any]) -> dict[str, str]:
        """The settings that can never matter beside the others, each with the reason."""
        return {}

    def _check(self) -> None:
        if self.single_layer and len(self.layers) != 1:
            raise BadConfig(f"{self.method} edits one layer but layers are {list(self.layers)}; set layers=N.")
        for name, kind in _kinds(type(self)).items():
            value = getattr(self, name)
            if name == "layers" or (value is None and kind.endswith("| None")):
                continue
            if name in _WORDS:
                if value not in _WORDS[name]:
                    known = ", ".join(_WORDS[name])
                    raise BadConfig(f"{name} must be one of {known} but is {value!r}.")
            elif kind.startswith("int"):
                if type(value) is not int or value < 1:
                    raise BadConfig(f"{name} must be a whole number above 0 but is {value!r}.")
            elif not _is_number(value) or value < 0 or (name in _ABOVE_ZERO and value == 0):
                bound = "above 0" if name in _ABOVE_ZERO else "0 or above"
                raise BadConfig(f"{name} must be a finite number {bound} but is {value!r}.")


@dataclass(frozen=True, kw_only=True)
class TargetConfig(EditConfig):
    """How target vectors are optimised: settings of all methods that lead a layer to them.

    Attributes:
        clamp: ``||delta|| <= clamp * ||v0||`` for target vectors.
        scale: What `clamp`, `v_lr` and `weight_decay` are measured by. ``"published"``: as above. ``"median"``: by a
            typical coordinate of v0, ``m = median |v0| / 0.6745``: Adam's steps are ``v_lr * m``, and ``m * sqrt(d)``
            stands for ``||v0||``, so that a few coordinates that are hundreds of times larger than the rest (Gemma) do
            not count. None takes ``"published"`` where the model has a preset for the method, else ``"median"``.
        optimiser: How target vectors are optimised. ``"adam"``: as published, on all contexts at every step.
            ``"rotate"``: on two prompts a step, with steps of a length of their own, `fastmemit.targets.Rotate`.
        steps: Loss evaluations for a target vector at most. None takes 25, or 14 of ``"rotate"``.
        v_lr: Adam's learning rate for target vectors. None takes the published 0.5, or 0.2 where the scale is
            ``"median"``: on SmolLM2 the two are the same.
        rho: The longest step of ``"rotate"``, as a share of what `clamp` allows.
        weight_decay: Factor of ``||delta|| / ||v0||^2``.
        kl_factor: Factor of the KL term.
        early_stop: A target is finished once its loss is below this.
        stop: What is compared with `early_stop`: ``"loss"``, the published sum, whose KL term alone is often above it;
            or ``"nll"``, the costs of the target's tokens. ``"most-probable"`` compares nothing: a target is finished
            once its every token is the most probable one in every context.
    """

    clamp: float = 1.0
    optimiser: Optimiser = "adam"
    steps: int | None = None
    v_lr: float | None = None
    rho: float = 0.3
    weight_decay: float = 0.5
    kl_factor: float = 0.0625
    early_stop: float = 0.05
    stop: Stop = "loss"
    scale: Scale | None = None

    def targets(self) -> TargetSettings:
        """The part of the settings that target vectors depend on, once `find_config` has put in the model's part."""
        assert self.steps is not None and self.scale is not None
        return TargetSettings(
            layer=self.layers[-1],
            optimiser=self.optimiser,
            steps=self.steps,
            learning_rate=self.v_lr or PUBLISHED_STEP,
            rho=self.rho,
            weight_decay=self.weight_decay,
            clamp=self.clamp,
            kl_factor=self.kl_factor,
            early_stop=self.early_stop,
            stop=self.stop,
            scale=self.scale,
            site=getattr(self, "site", "projection"),  # ROME's has no other
        )

    @classmethod
    def _unread(cls, values: Mapping[str, Any]) -> dict[str, str]:
        idle = {"rho": "optimiser='adam' has v_lr"}
        if values["optimiser"] == "rotate":
            idle = {"v_lr": "optimiser='rotate' has rho"}
        if values["stop"] == "most-probable":
            idle["early_stop"] = f"a target is finished as stop={values['stop']!r} says"
        return idle


@dataclass(frozen=True, kw_only=True)
class CovarianceConfig(TargetConfig):
    """What the methods share that solve with ``A = w C + ridge I``: all but AlphaEdit and UltraEdit.

    Attributes:
        weight: w, how many tokens' worth the preserved keys weigh against one edit; None takes the key width d_k (see
            docs/guide/second-moment.md).
        ridge: Added to the diagonal of ``w C``.
        relative_ridge: Added to it as well, as a multiple of the diagonal's mean. None takes `SMALL_BUDGET_RIDGE` where
            C has fewer keys than `SMALL_BUDGET` times the width, `ridge` is 0 and nothing is shrunk, else 0
            (docs/results/ridge.md).
        shrinkage: How C is moved towards a multiple of the identity before: ``"none"``, ``"ledoit-wolf"`` or ``"oas"``
            (see `fastcov.linalg`).
        covariance: ``"collected"``; or ``"identity"``, which puts I in the place of C: nothing is collected, and what
            is preserved is the weight itself and not what it does to keys.
    """

    weight: float | None = None
    ridge: float = 0.0
    relative_ridge: float | None = None
    shrinkage: Shrinkage = "none"
    covariance: Covariance = "collected"

    @property
    def needs_statistics(self) -> bool:
        """Whether C is collected."""
        return self.covariance == "collected"

    def resolved(self: Config, multiplier: float) -> Config:
        """The settings with the relative ridge that they come to; see `EditConfig.resolved`."""
        assert isinstance(self, CovarianceConfig)
        if self.relative_ridge is not None:
            return self
        bare = not self.ridge and self.shrinkage == "none" and self.needs_statistics
        few = multiplier < SMALL_BUDGET
        return dataclasses.replace(self, relative_ridge=SMALL_BUDGET_RIDGE if bare and few else 0.0)

    @classmethod
    def _unread(cls, values: Mapping[str, Any]) -> dict[str, str]:
        idle = super()._unread(values)
        return idle if values["covariance"] == "collected" else {**idle, "shrinkage": "the identity shrinks to itself"}


@dataclass(frozen=True, kw_only=True)
class RomeConfig(CovarianceConfig):
    """Settings of ROME.

    Its target is the projection's own output, which is short against the stream that it joins: so the clamp is 4.

    Attributes:
        keys: ``"consistent"``: one key everywhere, half the bare prompt's and half the mean of the other contexts', as
            in EMMET; ``"mean"``: one key everywhere, the mean over all contexts (r-ROME); ``"original"``: as first
            released, with the bare prompt's key in the denominator.
    """

    method: ClassVar[Method] = "rome"
    single_layer: ClassVar[bool] = True

    clamp: float = 4.0
    keys: Keys = "consistent"


@dataclass(frozen=True, kw_only=True)
class EmmetConfig(CovarianceConfig):
    """Settings of EMMET.

    Attributes:
        lambda_e: How far the equality constraint is relaxed, in batches above 1.
        site: Where target vectors are optimised: ``"block"``, at the last edited block's output, or ``"projection"``,
            at its projection's, as ROME's are. The default where a model has no preset and the block normalises or
            scales what its projection puts out: so what is asked for can be put out.
        iterations: How often to solve, each time for what is still missing; 1 is as published.
    """

    method: ClassVar[Method] = "emmet"
    single_layer: ClassVar[bool] = True

    lambda_e: float = 0.1
    site: Site = "block"
    iterations: int = 1


@dataclass(frozen=True, kw_only=True)
class MemitConfig(CovarianceConfig):
    """Settings of MEMIT.

    Attributes:
        spread: ``"linear"``: each layer takes ``1 / (layers left)`` of what is missing (MEMIT); ``"sqrt"``: ``1 /
            sqrt(layers left)`` (PMET).
        site: Where target vectors are optimised, as in `EmmetConfig`. ``"projection"`` is the default behind a norm, in
            the default layers alone and with a weight of a quarter of d_k.
        iterations: How often to solve, each time for what is still missing; 1 is as published.
    """

    method: ClassVar[Method] = "memit"

    spread: Spread = "linear"
    site: Site = "block"
    iterations: int = 1

    @classmethod
    def _unread(cls, values: Mapping[str, Any]) -> dict[str, str]:
        return {**super()._unread(values), **_one_layer(values)}


@dataclass(frozen=True, kw_only=True)
class PmetConfig(MemitConfig):
    """Settings of PMET's spread: those of MEMIT, with the square root of the layers left."""

    method: ClassVar[Method] = "pmet"

    spread: Spread = "sqrt"


@dataclass(frozen=True, kw_only=True)
class EncoreConfig(MemitConfig):
    """Settings of ENCORE: those of MEMIT with a ridge and a stopping rule of its own.

    Attributes:
        ridge: The weight of the change's squared norm. No published number is known here for any model: 10 is
            AlphaEdit's weight of the same penalty.
    """

    method: ClassVar[Method] = "encore"

    ridge: float = 10.0
    stop: Stop = "most-probable"


@dataclass(frozen=True, kw_only=True)
class RlsEditConfig(MemitConfig):
    """Settings of RLSEdit: those of MEMIT with a ridge; the keys of earlier edits are preserved.

    Attributes:
        relative_ridge: The weight of the change's squared norm, as a multiple of the mean of ``w C``'s diagonal.
    """

    method: ClassVar[Method] = "rlsedit"

    relative_ridge: float | None = 0.1


@dataclass(frozen=True, kw_only=True)
class AlphaEditConfig(TargetConfig):
    """Settings of AlphaEdit, which has no A: it edits in the null space of C.

    Attributes:
        spread: ``"linear"`` or ``"sqrt"``, as in `MemitConfig`.
        l2: How much the size of the change counts.
        null_threshold: Eigenvalues of C below it count as zero.
        null_relative: Instead of `null_threshold` where it is not None: a multiple of the mean of C's diagonal.
        site: As in `MemitConfig`.
        iterations: How often to solve, each time for what is still missing; 1 is as published.
    """

    method: ClassVar[Method] = "alphaedit"

    spread: Spread = "linear"
    l2: float = 10.0
    null_threshold: float = 0.02
    null_relative: float | None = None
    site: Site = "block"
    iterations: int = 1

    @classmethod
    def _unread(cls, values: Mapping[str, Any]) -> dict[str, str]:
        idle = {**super()._unread(values), **_one_layer(values)}
        if values["null_relative"] is not None:
            idle["null_threshold"] = "null_relative is used instead"
        return idle


@dataclass(frozen=True, kw_only=True)
class UltraEditConfig(EditConfig):
    """Settings of UltraEdit, which has neither C nor target vectors.

    Attributes:
        eta: The length of its step.
        tokens: Where keys and gradients are read: ``"answer"``, where the answer's tokens are predicted, or ``"all"``,
            at every token of the prompt too.
    """

    method: ClassVar[Method] = "ultraedit"

    eta: float = 1e-6
    tokens: Tokens = "answer"

    @property
    def needs_statistics(self) -> bool:
        """Nothing is collected."""
        return False


#: Those that share MEMIT's target vectors: what a preset has for it holds for them too.
RELATIVES: tuple[type[EditConfig], ...] = (MemitConfig, PmetConfig, EncoreConfig, RlsEditConfig, AlphaEditConfig)
_CLASSES: tuple[type[EditConfig], ...] = (RomeConfig, EmmetConfig, *RELATIVES, UltraEditConfig)
CONFIGS: dict[str, type[EditConfig]] = {cls.method: cls for cls in _CLASSES}


def config_class(method: str) -> type[EditConfig]:
    """The class of a method's settings; a BadConfig if there is no such method."""
    if not isinstance(method, str) or method not in CONFIGS:
        near = difflib.get_close_matches(method, METHODS, 1) if isinstance(method, str) else ()
        meant = f"did you mean {near[0]!r}? Choose" if near else "choose"
        raise BadConfig(f"There is no method {method!r}; {meant} from {', '.join(METHODS)}.")
    return CONFIGS[method]


def find_config(
    adapter: ModelAdapter, method: str | EditConfig, changes: Mapping[str, Any] | None = None
) -> EditConfig:
    """The settings for a model: its preset if there is one, else defaults made from its shape.

    Args:
        adapter: The model.
        method: One of `METHODS`, or settings, which are taken as they are but for what they leave to the model.
        changes: Values by name that replace the preset's, or those of the settings.

    Raises:
        BadConfig: An unknown method, a setting that is not the method's, or a value out of range.
        BadLayer: A layer that the model does not have.
    """
    if isinstance(method, EditConfig):
        config = method
    else:
        cls = config_class(method)
        asked = (changes or {}).get("layers")
        config = cls(**defaults(adapter, cls, None if asked is None else _layers(asked)))
    config = config.replaced(changes or {})
    config = config.replaced(units(adapter, config))
    for layer in config.layers:
        adapter.check_layer(layer)
    return config


def parse_overrides(pairs: Iterable[str], methods: str | Sequence[str]) -> dict[str, Any]:
    """``["clamp=0.75", "layers=4,5,6"]`` as values for `find_config`.

    ``layers`` takes numbers and ranges (``4-8`` or ``4,6,8``); ``weight=none`` takes the default.

    Args:
        pairs: As people write them.
        methods: The method, or several, all of which must have each of the settings.

    Raises:
        BadConfig: No ``=``, a name that is not a setting of a method, or a value that is not of the setting's kind.
    """
    classes = [config_class(m) for m in ([methods] if isinstance(methods, str) else methods)]
    values: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        name, text = name.strip(), text.strip()
        if not equals or not name:
            known = ", ".join(classes[0].settings())
            raise BadConfig(f"{pair!r} is not name=value with one of the settings {known}.")
        for cls in classes:
            cls.check_name(name)
        values[name] = _parse(name, _kinds(classes[0])[name], text)
    return values


def _parse(name: str, kind: str, text: str) -> Any:
    if name == "layers":
        return parse_layers(text)
    if kind.endswith("| None") and text.lower() == "none":
        return None
    if name in _WORDS:
        return text
    try:
        return int(text) if kind.startswith("int") else float(text)
    except ValueError as error:
        wanted = "a whole number" if kind.startswith("int") else "a number"
        wanted += " or 'none'" if kind.endswith("| None") else ""
        raise BadConfig(f"The value {text!r} of {name} is not {wanted}; correct it.") from error


def _kinds(cls: type[EditConfig]) -> dict[str, str]:
    """The types of a class's settings, as they are written above."""
    return {f.name: str(f.type) for f in dataclasses.fields(cls) if f.name != "preset"}


def _layers(value: Any) -> tuple[int, ...]:
    listed = (value,) if isinstance(value, int | str) or not isinstance(value, Iterable) else value
    layers = tuple(listed)
    if not layers or any(not isinstance(i, int) or isinstance(i, bool) for i in layers):
        raise BadConfig(f"layers must be whole numbers, at least one, but are {value!r}.")
    if list(layers) != sorted(set(layers)):
        raise BadConfig(f"layers must be ascending and distinct but are {list(layers)}.")
    return layers


def _one_layer(values: Mapping[str, Any]) -> dict[str, str]:
    return {"spread": "one layer takes all that is missing"} if len(values["layers"]) == 1 else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


#: Adam's step in typical coordinates of v0, where nobody has tuned it: the published 0.5 is 0.2 of
#: them on SmolLM2, whose typical coordinate is 2.3 to 2.8 in the blocks that are edited.
PUBLISHED_STEP, RELATIVE_STEP = 0.5, 0.2
#: Loss evaluations: those of the papers, and those that `fastmemit.targets.Rotate` was measured with.
STEPS = {"adam": 25, "rotate": 14}
#: A layer that can move its block by less than this share of what is usual is no default.
FAR_LESS = 0.1


def defaults(adapter: ModelAdapter, cls: type[EditConfig], asked: tuple[int, ...] | None = None) -> dict[str, Any]:
    """The settings by name that a method has for a model, without those that its class has.

    What a preset has for MEMIT holds for its relatives too, but for what makes them others: where the class's default
    is not MEMIT's. What it has for a method itself comes before all. Where the caller has asked for layers, others are
    not looked for.

    Raises:
        BadConfig: A preset has a setting that its method does not have.
    """
    preset = _preset(adapter)
    exact = preset["methods"].get(cls.method, {}) if preset else {}
    shared = preset["methods"].get("memit", {}) if preset and cls in RELATIVES else {}
    if preset is None or not (exact or shared):
        return _untuned(adapter, cls, asked)
    try:
        for name in exact:
            cls.check_name(name)
    except BadConfig as error:
        raise BadConfig(f"The preset {preset['name']!r}: {error}") from error
    own, memits = cls.settings(), MemitConfig.settings()
    inherited = {name: value for name, value in shared.items() if name in own and own[name] == memits[name]}
    return {**inherited, **exact, "preset": preset["name"]}


def candidates(adapter: ModelAdapter) -> list[int]:
    """The layers that a default may choose from, ascending: those that can be edited; a BadLayer if none can."""
    found = list(adapter.layers)
    if not found:
        raise BadLayer(
            f"No block of {type(adapter.model).__name__} has a projection of its own to edit; name "
            "another one (--module)."
        )
    return found


def _by_depth(adapter: ModelAdapter, cls: type[EditConfig]) -> tuple[int, ...]:
    """The layers of a model that nobody has tuned.

    The published choices of layers for models of 28 to 32 blocks begin at an eighth of the depth;
    single-layer methods take the second of these, and UltraEdit, whose gradients are of the answer's
    tokens, five that end one before the last.  The others take five, or where blocks normalise what
    their projections put out two, of which the last is where a single one would be edited.  Where
    not every block can be edited, the nearest layers above serve, and below where there are none.
    A layer is passed by whose projection can move its block far less than those of the other layers
    can.
    """
    first = round(adapter.n_layers / 8)
    found = _able(adapter, candidates(adapter))
    above = [layer for layer in found if layer >= first]
    below = [layer for layer in found if layer < first]
    if not issubclass(cls, TargetConfig):
        return tuple(found[-6:-1] or found)
    if cls.single_layer:
        return tuple(above[1:2] or above[:1] or below[-1:])
    five = tuple(above[:5] or below[-5:])
    return five if all(map(adapter.moves_freely, five)) else tuple(above[:2] or below[-2:])


def _able(adapter: ModelAdapter, found: list[int]) -> list[int]:
    """Those layers that are not far behind the others in what they can do.

    Where a weight is NaN or infinite there is nothing to compare: such layers stay, and what uses them says what is
    wrong with the model.
    """
    if all(adapter.adds_plainly(layer) for layer in found):
        return found
    reach = {layer: adapter.reach(layer) for layer in found}
    finite = sorted(value for value in reach.values() if math.isfinite(value))
    usual = finite[len(finite) // 2] if finite else 0.0
    return [layer for layer in found if not reach[layer] < FAR_LESS * usual]


def units(adapter: ModelAdapter, config: EditConfig) -> dict[str, Any]:
    """The scale, the steps and the learning rate that settings leave to the model and the optimiser, by name.

    Where nobody has tuned the method for the model, they ask nothing of the size of its activations.
    """
    if not isinstance(config, TargetConfig):
        return {}
    scale, v_lr = config.scale, config.v_lr
    if scale is None:
        preset = _preset(adapter)
        known = {config.method, "memit"} if type(config) in RELATIVES else {config.method}
        scale = "published" if preset is not None and known & preset["methods"].keys() else "median"
    if v_lr is None and config.optimiser == "adam":
        v_lr = PUBLISHED_STEP if scale == "published" else RELATIVE_STEP
    return {"scale": scale, "v_lr": v_lr, "steps": config.steps or STEPS[config.optimiser]}


def _untuned(adapter: ModelAdapter, cls: type[EditConfig], asked: tuple[int, ...] | None) -> dict[str, Any]:
    """Layers by depth, and the site of target vectors that asks for nothing that the projection cannot put out.

    Methods of several layers need that behind a norm alone, and there it was measured in the default layers, with a
    quarter of the usual weight; in others it was worse (docs/guide/locate.md).
    """
    values: dict[str, Any] = {"layers": asked or _by_depth(adapter, cls)}
    own, last = cls.settings(), values["layers"][-1]
    if "site" not in own or last not in adapter.layers:  # of a layer that cannot be edited the caller is told elsewhere
        return values
    if cls.single_layer:
        return values if adapter.adds_plainly(last) else {**values, "site": "projection"}
    if asked or adapter.moves_freely(last):
        return values
    return {**values, "site": "projection", **({"weight": adapter.d_k(last) / 4} if "weight" in own else {})}


def _preset(adapter: ModelAdapter) -> dict[str, Any] | None:
    if len(adapter.layers) < adapter.n_layers:
        return None  # the published layers are those of models whose blocks are all alike
    shape = {
        "model_type": getattr(adapter.model.config, "model_type", None),
        "n_layers": adapter.n_layers,
        "d": adapter.d,
        "d_k": adapter.d_k(adapter.layers[0]),
    }
    for preset in load_presets():
        if preset["match"] == shape:
            return preset
    return None


def load_presets() -> list[dict[str, Any]]:
    """All presets that the package ships: ``name``, ``match``, ``source`` and ``methods``."""
    folder = resources.files("fastmemit.methods") / "presets"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".json")), key=lambda f: f.name)
    return [parse_json(file.read_bytes()) for file in files]
